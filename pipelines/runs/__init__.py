"""Run folders: written by training, listed, compared, and read by all that comes after."""
