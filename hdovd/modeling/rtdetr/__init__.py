"""RT-DETR (arXiv 2304.08069) with the distillation of queries: the detector that needs no NMS (METHOD section 12).
`model.RTDETR` is the way in.

A file a part: `network` (which fuses levels, chooses queries and refines them), `model` (what trains them beside what
all queries have, denoising among it, and the whole).
"""
