"""The reliability weight of pseudo labels: fitted to a cache, written to a file, applied to a recipe."""
