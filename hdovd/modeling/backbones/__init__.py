"""Backbones with their feature pyramids: pictures in, maps of several scales out."""
