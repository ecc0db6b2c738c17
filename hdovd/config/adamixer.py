"""The [detector] sections of a recipe with `name = "adamixer"`.

Defaults are the authors' (configs/myovd/ov_coco/myadamixer_r50_1x_coco.py, "config" below) or, where that is silent,
the constants of their code ("code"). Papers: AdaMixer arXiv 2203.16507, distinct queries arXiv 2303.12776, HD-OVD arXiv
2503.10152.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hdovd.config.backbone import Count, NonNegative, Positive, Section, Share
from hdovd.config.queries import GROUPS_OF_NORM, QueryDecoderConfig, QueryDetectorConfig


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
