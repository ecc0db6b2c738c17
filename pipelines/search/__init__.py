"""`hdovd search`: a cache and a question in, the boxes that answer it best out."""
