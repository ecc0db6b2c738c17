"""Captions in, nouns by image out: what pseudo boxes may be named."""
