"""COCO files and protocols in, images with checked boxes and labels out, and what one image brings to a detector."""
