"""Faster R-CNN with a text-embedding classifier: the compact detector."""
