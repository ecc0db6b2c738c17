"""Frozen models that extraction asks for embeddings, with their preprocessing and prompts."""
