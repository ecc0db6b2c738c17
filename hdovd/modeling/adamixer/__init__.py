"""AdaMixer with text-space distillation: the detector of the headline number (METHOD section 11). `model.AdaMixer` is the way in.

A file a part: `proposals` and `proposal_loss` (where queries come from), `sampling`, `mixing` and `decoder` (what refines them),
`matching` and `losses` (what trains them), `text_level` and `instance_level` (what distils), `published` (the authors' names).
"""
