"""Relabelling: a trained detector proposes and names boxes on the training images, for a new set of pseudo boxes of the
cache that it was trained from: the next round. In: a run and its cache. Out: a set of the cache.
"""
