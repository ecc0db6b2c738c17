"""`hdovd eval`: a run and validation images in, detections, AP and analyses out."""
