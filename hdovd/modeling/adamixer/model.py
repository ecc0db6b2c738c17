"""AdaMixer (arXiv 2203.16507) with distinct queries (2303.12776), as HD-OVD distils into it (2503.10152; METHOD section
11).

A training step waits for the device three times: for the sides of the pseudo boxes, for the proposals' NMS, and for the
costs that queries and boxes are paired by. N pictures, Q queries of each, C channels, D embedding size.
"""

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from hdovd.config.detector import GROUPS_OF_NORM, AdaMixerConfig
from hdovd.config.recipe import Recipe
from hdovd.core.errors import HdovdError
from hdovd.modeling.adamixer.decoder import DecoderStage, SamplingTable, to_corners, to_xyzr
from hdovd.modeling.adamixer.proposals import (
    DensePredictions,
    QueryProposals,
    auxiliary_losses,
    main_losses,
    valid_positions,
)
from hdovd.modeling.backbones.pyramid import build_backbone
from hdovd.modeling.queries.detector import ForwardOutput, QueryDetector, QueryStage, Step


@dataclass(frozen=True, slots=True)
class AdaMixerOutput(ForwardOutput):
    """auxiliary: what the auxiliary head of the proposals found, None where nobody asked. Features are normalised; each
    box has the gradient of its own stage's deltas alone.
    """

    auxiliary: DensePredictions | None


class AdaMixer(QueryDetector):
    """The query-based detector of the paper's headline: backbone, proposals, stages, adapters, levels."""

    training_parts = ("proposals.auxiliary.", "instance_level.", "text_level.", "image_level.", "extra.")
    exportable = "hdovd.modeling.export.detectors:ExportableDetector"
    config: AdaMixerConfig

    def __init__(self, recipe: Recipe, dim: int, initialise: bool = True) -> None:
        super().__init__()
        if not isinstance(recipe.detector, AdaMixerConfig):
            raise HdovdError(
                f"detector.name = {recipe.detector.name!r}: this detector needs a recipe with detector.name = "
                f"'adamixer'"
            )
        config = recipe.detector
        self.recipe, self.dim, self.config = recipe, dim, config
        channels, levels = config.backbone.fpn_channels, config.backbone.levels
        self.strides = [2**level for level in (*levels, levels[-1] + 1)]
        pyramid = build_backbone(config.backbone, initialise)
        self.backbone = pyramid
        for conv in pyramid.fpn.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.xavier_uniform_(conv.weight)
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS_OF_NORM, channels) for _ in self.strides)
        self.proposals = QueryProposals(config.proposals, channels, dim, len(levels))
        self.stages = nn.ModuleList(DecoderStage(config.decoder, channels, dim) for _ in range(config.decoder.stages))
        self.finish(recipe, dim, config)

    def stage(self, number: int) -> QueryStage:
        return cast(QueryStage, self.stages[number])

    def find(self, batch: ImageList, step: Step | None = None) -> AdaMixerOutput:
        self.require_object_text()
        features = {
            name: norm(maps)
            for norm, (name, maps) in zip(self.norms, self.backbone(batch.tensors).items(), strict=True)
        }
        maps, proposals = list(features.values()), self.proposals
        trunk = proposals.trunk(maps[1:])
        dense = proposals.main(trunk, self.strides[1:], self.object_text)
        auxiliary = proposals.auxiliary(trunk, self.strides[1:], self.object_text) if step is not None else None
        candidates = proposals.candidates(dense, [m.shape[2] * m.shape[3] for m in trunk])
        table = SamplingTable(maps[:-1], self.strides[:-1])
        start = proposals.choose(candidates, self.config.decoder.queries)
        content, xyzr, deltas = proposals.content(table, start), to_xyzr(start), start
        contents, boxes = [], []
        for stage in self.stages:
            content, moved, deltas = stage(table, content, xyzr)
            contents.append(content)
            boxes.append(to_corners(moved))
            xyzr = moved.detach()  # arXiv 2203.16507, section 3.4
        return AdaMixerOutput(features, candidates, contents, boxes, deltas, auxiliary)

    def own_losses(self, look: ForwardOutput, step: Step, paired: Tensor) -> dict[str, Tensor]:
        """Those of the proposals' two heads."""
        assert isinstance(look, AdaMixerOutput)
        assert look.auxiliary is not None
        config, boxes = self.config.proposals, step.boxes
        main = main_losses(look.candidates, boxes.objects, boxes.is_object, paired, config)
        shapes = [m.shape[-2:] for m in list(look.features.values())[1:]]
        centres, valid = valid_positions(shapes, self.strides[1:], boxes.sizes)
        auxiliary = auxiliary_losses(look.auxiliary, centres, valid, boxes.objects, boxes.is_object, config)
        return dict(zip(("rpn_cls", "rpn_box", "rpn_aux_cls", "rpn_aux_box"), (*main, *auxiliary), strict=True))
