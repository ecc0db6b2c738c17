"""What the sections of a recipe are made of, and the one that every detector has: the backbone.

Apart from the recipe, so that a detector's own sections, in a file of its own, can be made of them.
"""

import difflib
from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from hdovd.core.registry import Registry

PRESETS: dict[str, tuple[str, ...]] = {
    "base-only": (
        "loss.instance.enabled=false",
        "loss.class.enabled=false",
        "loss.image.enabled=false",
        "loss.extra={}",
    )
}
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet-tiny")
LIBRARIES = Registry(  # functions from (config, model's name) to a `Body`, by what stands before the colon of a name
    "detector.backbone.name",
    {
        "timm": "hdovd.modeling.backbones.third_party:timm_body",
        "torchvision": "hdovd.modeling.backbones.third_party:torchvision_body",
    },
)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]
AUTO = "auto"
Auto = Literal["auto"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, strict=True)


def name_of(known: Collection[str], others: str) -> AfterValidator:
    """Accepts a name of a registry and library:name or module:attribute; `others`: what else is expected, for the
    message.
    """

    def check(name: str) -> str:
        if name not in known and not all(name.partition(":")):
            near = difflib.get_close_matches(name, known, 1, cutoff=0.4)
            raise ValueError(
                (f"did you mean {near[0]}? " if near else "") + f"Expected one of {', '.join(known)}, {others}"
            )
        return name

    return AfterValidator(check)


class BackboneConfig(Section):
    """`name`: one of BACKBONES, timm:NAME, torchvision:NAME (a classifier), or module:function of the user's own
    (`third_party`). `weights`: "auto" (those that torchvision or timm download), "none", or a file (.pth,
    .safetensors).
    """

    name: Annotated[str, name_of(BACKBONES, "timm:NAME, torchvision:NAME or my_module:function")]
    weights: str
    norm: Literal["frozen", "batch"]
    frozen_stages: Annotated[int, Field(ge=0, le=5)]  # 1 is the stem, 2 the stem and the first stage, ...
    fpn_channels: Count
    levels: Annotated[list[Annotated[int, Field(ge=2, le=5)]], Field(min_length=1)]  # 5 has stride 32; P6 is pooled

    @field_validator("levels")
    @classmethod
    def _without_gaps(cls, levels: list[int]) -> list[int]:
        if sorted(levels) != list(range(min(levels), max(levels) + 1)):
            raise ValueError("levels must be without gaps, such as [2, 3, 4, 5]")
        return sorted(levels)
