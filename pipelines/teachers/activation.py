"""Activations of CLIP's transformers. Imports nothing, for the sake of --help."""

from enum import StrEnum


class Activation(StrEnum):
    AUTO = "auto"
    GELU = "gelu"
    QUICK_GELU = "quickgelu"
