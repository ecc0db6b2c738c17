"""`hdovd extract-clip`: a data set and a teacher in, products of the cache out; and what a cache was made from."""
