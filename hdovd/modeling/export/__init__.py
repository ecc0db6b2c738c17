"""Detectors as functions of tensors alone, which torch can trace: a picture and class embeddings in, detections out."""
