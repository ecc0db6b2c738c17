"""The [detector] sections of a recipe with `name = "adamixer"`.

Defaults are the authors' (configs/myovd/ov_coco/myadamixer_r50_1x_coco.py, "config" below) or, where that is silent,
the constants of their code ("code"). Papers: AdaMixer arXiv 2203.16507, distinct queries arXiv 2303.12776, HD-OVD arXiv
2503.10152.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hdovd.config.backbone import BackboneConfig, Count, NonNegative, Positive, Section, Share

GROUPS_OF_NORM = 32  # of every GroupNorm, config


class MatchCosts(Section):
    """Weights of the three parts of the cost of pairing a query with a box. Config; those of DETR's successors."""

    objectness: NonNegative = 2.0  # focal
    l1: NonNegative = 5.0  # of corners in 0..1 of the picture
    giou: NonNegative = 2.0


class QueryProposalsConfig(Section):
    """The dense head that the queries come from (distinct queries, arXiv 2303.12776)."""

    pre_nms: Count = 1000  # positions a level that go into the NMS; config
    nms: Share = 0.7  # IoU over which the lower of two candidates is no distinct query; config
    shuffle: Annotated[int, Field(ge=0)] = 64  # channels that a level takes from each neighbour; code
    aux_positives: Count = 8  # of a box in the auxiliary head; config
    iou_power: Positive = 6.0  # of quality = probability * IoU^power; code (TOOD, arXiv 2108.07755)
    class_weight: NonNegative = 1.0  # quality focal loss; config
    box_weight: NonNegative = 2.0  # GIoU; config


class DecoderConfig(Section):
    """The stages (AdaMixer, arXiv 2203.16507, section 3; the numbers are those of its section 4 but `queries`)."""

    queries: Count = 300  # an image; config
    stages: Count = 6
    points: Count = 32  # sampled for a query in each group
    groups: Count = 4  # of channels, that sample and mix apart
    out_points: Count = 128  # that spatial mixing makes of the points
    heads: Count = 8  # of self-attention
    feedforward: Count = 2048
    objectness_channels: Count = 128  # hidden; code: half of the pyramid's
    adapter_channels: Count = 1024  # hidden, of both adapters to text space; code: twice the embedding's
    logit_scale: Positive = 50.0  # of the classifier's cosines; config


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


class AdaMixerConfig(Section):
    """Levels: queries sample from `backbone.levels`; proposals come from all of them but the finest, and the pooled
    one.
    """

    name: Literal["adamixer"]
    backbone: BackboneConfig
    proposals: QueryProposalsConfig = QueryProposalsConfig()
    decoder: DecoderConfig = DecoderConfig()
    matching: MatchCosts = MatchCosts()  # of both, the proposals' main head and the stages
    loss: StageLossConfig = StageLossConfig()
    text: TextLevelConfig = TextLevelConfig()

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
