"""`hdovd report`: runs in, one HTML page out."""
