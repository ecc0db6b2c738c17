"""`hdovd train`: a cache and a recipe in, a run folder out."""
