"""The [detector] section of a recipe: one form for each detector that is built in, and one for those of the user's own.

`DETECTORS` is the registry. A detector is a file with its class and a line there; a form of its own, which names wrong
keys and values, is one more line, in `DetectorConfig`. Imports no torch.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from hdovd.config.adamixer import AdaMixerConfig
from hdovd.config.backbone import BackboneConfig, Count, Positive, Section, Share, name_of
from hdovd.config.rtdetr import RTDETRConfig
from hdovd.core.registry import Registry

DETECTORS = Registry(  # classes of `modeling.base.Detector`
    "detector.name",
    {
        "faster_rcnn": "hdovd.modeling.faster_rcnn.model:FasterRCNN",
        "adamixer": "hdovd.modeling.adamixer.model:AdaMixer",
        "rtdetr": "hdovd.modeling.rtdetr.model:RTDETR",
    },
)
_OWN = "own"


class RpnConfig(Section):
    anchor_sizes: list[list[Count]]  # a list a level, P6 included; pixels at the detector's input scale
    samples: Count
    pre_nms: Count  # a level, training; half of it in testing
    post_nms: Count
    nms: Share
    # Where anchors lie and which boxes they learn (`rpn.AuthorsRPN` says how the two differ). The authors' published
    # weights want "authors". Recipes of before there was a choice mean torchvision's.
    rules: Literal["torchvision", "authors"] = "torchvision"


class HeadConfig(Section):
    fc_channels: Count
    samples: Count
    positive_share: Share
    canonical_size: Count  # RoIs of this size go to P4
    sampling_ratio: Annotated[int, Field(ge=0)]  # RoIAlign points a bin and axis; 0 adapts to the RoI
    logit_scale: Positive


class FasterRCNNConfig(Section):
    name: Literal["faster_rcnn"]
    backbone: BackboneConfig
    rpn: RpnConfig
    head: HeadConfig


class OwnDetectorConfig(Section):
    """A detector of the user's own, module:Class (docs/EXTENDING.md). All keys but these two are its options."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: Annotated[str, name_of(DETECTORS, "or my_module:MyDetector")]
    backbone: BackboneConfig

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _form(section: Any) -> str:
    """Which of the forms a section, read or built, has."""
    name = section.get("name") if isinstance(section, dict) else getattr(section, "name", None)
    return name if isinstance(name, str) and name in FORMS else _OWN


DetectorConfig = Annotated[
    Annotated[FasterRCNNConfig, Tag("faster_rcnn")]
    | Annotated[AdaMixerConfig, Tag("adamixer")]
    | Annotated[RTDETRConfig, Tag("rtdetr")]
    | Annotated[OwnDetectorConfig, Tag(_OWN)],
    Discriminator(_form),
]

FORMS: dict[str, type[BaseModel]] = {
    tag.tag: form for form, tag in map(get_args, get_args(get_args(DetectorConfig)[0]))
}
