"""`hdovd detect`: a run, pictures and any names in, detections out."""
