"""`hdovd audit`: data, cache and run in, a report of leaks out."""
