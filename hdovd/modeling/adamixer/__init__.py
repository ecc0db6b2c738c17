"""AdaMixer with text-space distillation: the detector of the headline number (METHOD section 11). `model.AdaMixer` is
the way in.

A file a part: `proposals` (where queries come from), `sampling`, `mixing` and `decoder` (what refines them), `pairs`
and `losses` (what trains them), `levels` (what distils).
"""
