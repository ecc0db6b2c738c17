"""What the detectors made of queries share, AdaMixer and RT-DETR: a network that finds a fixed number of boxes in a
picture, each paired with at most one object. `detector.QueryDetector` is what they are made of.

A file a part: `pairs` (which query is which box's), `losses` (what trains queries, and what distils).
"""
