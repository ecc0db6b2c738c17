"""AdaMixer with text-space distillation: the detector of the headline number (METHOD section 11). `model.AdaMixer` is
the way in.

A file a part: `model` (where queries come from, what trains that, and the whole), `decoder` (what refines them).
"""
