"""Sections that the detectors made of queries share, AdaMixer and RT-DETR.

Defaults are those of HD-OVD's authors (configs/myovd/ov_coco/myadamixer_r50_1x_coco.py, "config" below) or, where that
is silent, the constants of their code ("code").
"""

from hdovd.config.backbone import BackboneConfig, Count, NonNegative, Positive, Section, Share

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
