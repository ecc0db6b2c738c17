"""Detectors. Batches of pictures, boxes and cached embeddings in, losses or detections out; this level holds what all
detectors share.
"""
