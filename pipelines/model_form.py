"""The forms of file that a detector can be exported to. Imports no torch, for the sake of --help."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from hdovd.errors import HdovdError


class ModelForm(StrEnum):
    """What `hdovd export` writes."""

    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"
    SAFETENSORS = "safetensors"

    @classmethod
    def of(cls, file: Path, asked: ModelForm | None) -> ModelForm:
        """What the file's name says, or else what is `asked` for. Raises HdovdError if there is neither, or they do not agree."""
        said = ENDINGS.get(file.suffix.lower())
        if asked is None and said is None:
            raise HdovdError(f"--out {file}: give --format, or a name that ends in one of {', '.join(ENDINGS)}")
        if asked is not None and said is not None and said is not asked:
            raise HdovdError(f"--out {file} is named as {said.value}, and --format says {asked.value}: give a name that ends otherwise")
        return asked or said or cls.ONNX


ENDINGS = {".onnx": ModelForm.ONNX, ".pt": ModelForm.TORCHSCRIPT, ".ts": ModelForm.TORCHSCRIPT, ".safetensors": ModelForm.SAFETENSORS}
