"""`hdovd export`: a run in, one file for other programs out."""
