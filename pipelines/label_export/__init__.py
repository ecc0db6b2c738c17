"""Detections, pseudo boxes of a cache or boxes that a search found in, files that labelling tools open out."""
