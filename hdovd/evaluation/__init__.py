"""Detections and annotations in, numbers out: COCO AP, TIDE errors, curves, confusion, reliability of scores,
recall."""
