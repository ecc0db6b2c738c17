"""`hdovd propose`: base boxes in, a proposal network and its boxes out."""
