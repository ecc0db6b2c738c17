"""`hdovd serve`: a run, a cache or both behind a page for a browser."""
