"""The [detector] section of a recipe: one form for each detector that is built in, and one for those of the user's own;
the backbone that all of them have; and what the sections of a recipe are made of.

`DETECTORS` is the registry. A detector is a file with its class and a line there; a form of its own, which names wrong
keys and values, is one more line, in `DetectorConfig`. Imports no torch.
"""

import difflib
from collections.abc import Collection
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from hdovd.core.registry import Registry

PRESETS: dict[str, tuple[str, ...]] = {
    "base-only": (
        "loss.instance.enabled=false",
        "loss.class.enabled=false",
        "loss.image.enabled=false",
        "loss.extra={}",
    )
}

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]
AUTO = "auto"
Auto = Literal["auto"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, strict=True)


class OpenSection(Section):
    """A section of the user's own code. All keys but those that are declared are its options."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


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


# --- the backbone ---

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet-tiny")
LIBRARIES = Registry(  # functions from (config, model's name) to a `Body`, by what stands before the colon of a name
    "detector.backbone.name",
    {
        "timm": "hdovd.modeling.backbones.pyramid:timm_body",
        "torchvision": "hdovd.modeling.backbones.pyramid:torchvision_body",
    },
)


class BackboneConfig(Section):
    """`name`: one of BACKBONES, timm:NAME, torchvision:NAME (a classifier), or module:function of the user's own
    (`pyramid`). `weights`: "auto" (those that torchvision or timm download), "none", or a file (.pth,
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


# --- Faster R-CNN ---


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


# --- what the detectors made of queries share, AdaMixer and RT-DETR ---
# Defaults, AdaMixer's too, are those of HD-OVD's authors (configs/myovd/ov_coco/myadamixer_r50_1x_coco.py, "config")
# or, where that is silent, the constants of their code ("code").

GROUPS_OF_NORM = 32  # of every GroupNorm, config


class MatchCosts(Section):
    """Weights of the three parts of the cost of pairing a query with a box. Config; those of DETR's successors."""

    objectness: NonNegative = 2.0  # focal
    l1: NonNegative = 5.0  # of corners in 0..1 of the picture
    giou: NonNegative = 2.0


class StageLossConfig(Section):
    """Weights and exceptions of a stage's own losses. Config, but what is said to be code."""

    classification: NonNegative = 0.5
    objectness: NonNegative = 2.0
    box: NonNegative = 5.0  # L1
    giou: NonNegative = 2.0
    unmatched_weight: NonNegative = 0.5  # of a query without a box in the classification loss; code
    near_iou: Share = 0.7  # a query without a box of more IoU than this with a matched box weighs nothing; code
    poor_iou: Share = 0.4  # a query of less IoU than this with its own box weighs nothing; code


class TextLevelConfig(Section):
    """The losses in text space (HD-OVD, METHOD section 5). On where loss.class is on. Config."""

    alignment_weight: NonNegative = 0.5
    relation_weight: NonNegative = 5.0
    tau: Positive = 20.0
    relation_tau: Positive = 5.0
    relation_temperature: Positive = 10.0
    decay: Share = 0.9999  # of the moving mean of a class's centroid; code
    decay_updates: Positive = 2000.0  # over which the decay grows to that: decay * (1 - exp(-updates / this)); code


class QueryDecoderConfig(Section):
    """What every decoder of queries is made of."""

    queries: Count = 300  # an image; config, and RT-DETR (arXiv 2304.08069, section 5.1)
    stages: Count = 6  # config, and RT-DETR
    heads: Count = 8  # of self-attention
    feedforward: Count = 2048
    adapter_channels: Count = 1024  # hidden, of both adapters to text space; code: twice the embedding's
    logit_scale: Positive = 50.0  # of the classifier's cosines; config


class QueryDetectorConfig(Section):
    """The [detector] section of a detector that is made of queries. A detector's own has its own `name` and
    `decoder`.
    """

    name: str
    backbone: BackboneConfig
    decoder: QueryDecoderConfig
    matching: MatchCosts = MatchCosts()  # of both, what queries come from and the stages
    loss: StageLossConfig = StageLossConfig()
    text: TextLevelConfig = TextLevelConfig()


# --- AdaMixer (arXiv 2203.16507) with distinct queries (2303.12776), as in HD-OVD (2503.10152) ---


class QueryProposalsConfig(Section):
    """The dense head that the queries come from (distinct queries, arXiv 2303.12776)."""

    pre_nms: Count = 1000  # positions a level that go into the NMS; config
    nms: Share = 0.7  # IoU over which the lower of two candidates is no distinct query; config
    shuffle: Annotated[int, Field(ge=0)] = 64  # channels that a level takes from each neighbour; code
    aux_positives: Count = 8  # of a box in the auxiliary head; config
    iou_power: Positive = 6.0  # of quality = probability * IoU^power; code (TOOD, arXiv 2108.07755)
    class_weight: NonNegative = 1.0  # quality focal loss; config
    box_weight: NonNegative = 2.0  # GIoU; config


class DecoderConfig(QueryDecoderConfig):
    """The stages (AdaMixer, arXiv 2203.16507, section 3; the numbers are those of its section 4 but `queries`)."""

    points: Count = 32  # sampled for a query in each group
    groups: Count = 4  # of channels, that sample and mix apart
    out_points: Count = 128  # that spatial mixing makes of the points
    objectness_channels: Count = 128  # hidden; code: half of the pyramid's


class AdaMixerConfig(QueryDetectorConfig):
    """Levels: queries sample from `backbone.levels`; proposals come from all of them but the finest, and the pooled
    one.
    """

    name: Literal["adamixer"]
    proposals: QueryProposalsConfig = QueryProposalsConfig()
    decoder: DecoderConfig = DecoderConfig()

    @model_validator(mode="after")
    def _fits(self) -> "AdaMixerConfig":
        channels = self.backbone.fpn_channels
        for value, name in (
            (GROUPS_OF_NORM, "GroupNorm's groups"),
            (self.decoder.groups, "decoder.groups"),
            (self.decoder.heads, "decoder.heads"),
            (8, "the positional code, 8"),
        ):
            if channels % value:
                raise ValueError(f"backbone.fpn_channels = {channels} must be a multiple of {value} ({name})")
        if 2 * self.proposals.shuffle >= channels:
            raise ValueError(
                f"proposals.shuffle = {self.proposals.shuffle}: twice that must be under backbone.fpn_channels = "
                f"{channels}"
            )
        if len(self.backbone.levels) < 2:
            raise ValueError(f"backbone.levels = {self.backbone.levels}: AdaMixer needs two levels or more")
        return self


# --- RT-DETR ---
# Defaults are those of its paper (arXiv 2304.08069, "paper"), of its authors' configuration for ResNet-50 ("config"
# from here on), and for what only HD-OVD has those above.


class HybridEncoderConfig(Section):
    """One layer of attention on the coarsest level, and a fusion of levels by convolutions (paper, section 4.2)."""

    heads: Count = 8  # config
    feedforward: Count = 1024  # config
    blocks: Count = 3  # convolutions of a fusion; paper
    hidden: Count = 256  # channels of those; config, half of it for ResNet-18


class RTDETRDecoderConfig(QueryDecoderConfig):
    """The stages: attention between queries, and to a few points of each level (arXiv 2010.04159, section 4.1)."""

    feedforward: Count = 1024  # config
    points: Count = 4  # sampled by a head at each level; config
    grid: Annotated[int, Field(ge=0)] = 5  # side of a grid of points within the box, sampled too; here; 0: none


class DenoisingConfig(Section):
    """Boxes with noise, which the stages are to find again (arXiv 2203.03605, section 3.3). 0 queries: none."""

    queries: Annotated[int, Field(ge=0)] = 100  # near a box, an image, and as many too far from it; config
    label_noise: Share = 0.25  # of the queries that get the text of a class drawn by chance; config: half of its 0.5
    box_noise: NonNegative = 1.0  # most that a corner moves, half sides of the box; twice that for the others; config


class RTDETRLossConfig(StageLossConfig):
    """Weights of the stages' losses; those of objectness and boxes also of the choice of queries and of denoising."""

    objectness: NonNegative = 1.0  # varifocal; config
    near_iou: Share = 1.0  # none: without an NMS a second query on an object is a negative (METHOD section 12)


class RTDETRConfig(QueryDetectorConfig):
    """Levels: `backbone.levels`, all of which the encoder fuses and the stages sample from. `backbone.fpn_channels`:
    channels of the encoder and of queries.
    """

    name: Literal["rtdetr"]
    encoder: HybridEncoderConfig = HybridEncoderConfig()
    decoder: RTDETRDecoderConfig = RTDETRDecoderConfig()
    denoising: DenoisingConfig = DenoisingConfig()
    loss: RTDETRLossConfig = RTDETRLossConfig()

    @model_validator(mode="after")
    def _fits(self) -> "RTDETRConfig":
        for key, channels, value, why in (
            ("backbone.fpn_channels", self.backbone.fpn_channels, GROUPS_OF_NORM, "GroupNorm's groups"),
            ("backbone.fpn_channels", self.backbone.fpn_channels, self.encoder.heads, "encoder.heads"),
            ("backbone.fpn_channels", self.backbone.fpn_channels, self.decoder.heads, "decoder.heads"),
            ("encoder.hidden", self.encoder.hidden, GROUPS_OF_NORM, "GroupNorm's groups"),
        ):
            if channels % value:
                raise ValueError(f"{key} = {channels} must be a multiple of {value} ({why})")
        return self


# --- the registry, and the forms ---

DETECTORS = Registry(  # classes of `modeling.base.Detector`
    "detector.name",
    {
        "faster_rcnn": "hdovd.modeling.faster_rcnn.model:FasterRCNN",
        "adamixer": "hdovd.modeling.adamixer.model:AdaMixer",
        "rtdetr": "hdovd.modeling.rtdetr.model:RTDETR",
    },
)
_OWN = "own"


class OwnDetectorConfig(OpenSection):
    """A detector of the user's own, module:Class (docs/EXTENDING.md)."""

    name: Annotated[str, name_of(DETECTORS, "or my_module:MyDetector")]
    backbone: BackboneConfig


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
