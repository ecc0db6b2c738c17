"""Runs and caches on the Hugging Face Hub: what goes there, and the card that tells of it. `hdovd.cache.hub` pulls."""
