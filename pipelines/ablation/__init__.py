"""`hdovd ablate`: a grid of settings in, runs and their table out."""
