"""The forms of file that a detector can be exported to. Imports nothing, for the sake of --help."""

from enum import StrEnum


class ModelForm(StrEnum):
    """What `hdovd export` writes."""

    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"
    SAFETENSORS = "safetensors"
