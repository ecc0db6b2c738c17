"""What an extraction is asked to do. Imports no CLIP, so that the command line can name it at no cost."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hdovd.coco import DataPaths
from hdovd.errors import HdovdError

DEFAULT_TEMPLATES = ("a photo of a {}",)


class Precision(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class Activation(StrEnum):
    AUTO = "auto"
    GELU = "gelu"
    QUICK_GELU = "quickgelu"


@dataclass(frozen=True, slots=True)
class ExtractConfig:
    """What to extract. `clip` and `pretrained` as in `clip_teacher.load_clip`; sizes in crops."""

    data: DataPaths
    cache: Path
    clip: str
    pretrained: str | None = None
    proposals: Path | None = None
    vocabulary: Path | None = None
    captions: Path | None = None
    protocol: str = "ov-coco"
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    device: str = "auto"
    precision: Precision = Precision.FP32
    activation: Activation = Activation.AUTO
    batch_size: int = 256
    workers: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.captions is not None and self.vocabulary is None:
            raise HdovdError("--captions needs --vocabulary too: the names, one a line, that are looked for in the captions")
        if self.vocabulary is not None and self.proposals is None:
            raise HdovdError("--vocabulary names pseudo boxes, and there are none without --proposals")
        wrong = [t for t in self.templates if t.count("{}") != 1]
        if wrong or not self.templates:
            raise HdovdError(f"a prompt template holds {{}} once, where the name goes; got {wrong}")
