"""Commands about caches: list, verify, view, import."""
