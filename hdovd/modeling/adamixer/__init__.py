"""AdaMixer with text-space distillation: the detector of the headline number (METHOD section 11). `model.AdaMixer` is
the way in.

A file a part: `proposals` (where queries come from, and what trains that), `decoder` (what refines them).
"""
