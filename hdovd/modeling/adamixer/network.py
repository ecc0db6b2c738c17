"""AdaMixer without what trains it: from pictures to queries' contents and boxes, and to predictions. `model.AdaMixer` adds the training.

N pictures, Q queries of each, S stages, C channels, D embedding size, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdovd.config.adamixer import GROUPS_OF_NORM, AdaMixerConfig
from hdovd.config.recipe import Recipe
from hdovd.core.errors import HdovdError
from hdovd.modeling.adamixer.adapters import TextAdapters
from hdovd.modeling.adamixer.boxes import to_corners, to_xyzr
from hdovd.modeling.adamixer.decoder import DecoderStage
from hdovd.modeling.adamixer.proposals import Candidates, DensePredictions, QueryProposals
from hdovd.modeling.adamixer.sampling import SamplingTable
from hdovd.modeling.backbones.pyramid import build_backbone
from hdovd.modeling.base import Detector, RoIPredictions
from hdovd.modeling.batching import batch_images
from hdovd.modeling.losses.classwise import cosine_logits


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """What the network finds in a batch.

    features: pyramid maps by level name, normalised. candidates, auxiliary (None where nobody asked): what the proposals found.
    contents: (N, Q, C) after each stage. boxes: (N, Q, 4) xyxy pixels of the padded batch, after each stage; each has the gradient
    of its own stage's deltas alone. deltas: (N, Q, 4) of the last stage.
    """

    features: dict[str, Tensor]
    candidates: Candidates
    auxiliary: DensePredictions | None
    contents: list[Tensor]
    boxes: list[Tensor]
    deltas: Tensor


class AdaMixerNetwork(Detector):
    """Backbone, proposals, stages, adapters. It knows objects by the text embedding of the word "object", which it keeps."""

    def __init__(self, recipe: Recipe, dim: int, log: Callable[[str], None] | None) -> None:
        super().__init__()
        if not isinstance(recipe.detector, AdaMixerConfig):
            raise HdovdError(f"detector.name = {recipe.detector.name!r}: this detector needs a recipe with detector.name = 'adamixer'")
        config = recipe.detector
        self.recipe, self.dim, self.log, self.config = recipe, dim, log, config
        channels, levels = config.backbone.fpn_channels, config.backbone.levels
        self.strides = [2**level for level in (*levels, levels[-1] + 1)]
        pyramid = build_backbone(config.backbone, log)
        self.backbone = pyramid
        for conv in pyramid.fpn.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.xavier_uniform_(conv.weight)
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS_OF_NORM, channels) for _ in self.strides)
        self.proposals = QueryProposals(config.proposals, channels, dim, len(levels))
        self.stages = nn.ModuleList(DecoderStage(config.decoder, channels, dim) for _ in range(config.decoder.stages))
        self.adapters = TextAdapters(dim, config.decoder.adapter_channels)
        self.background = nn.Parameter(torch.randn(1, dim))
        self.object_text: Tensor
        self.register_buffer("object_text", torch.zeros(dim))
        self.knows_objects = False
        self.register_load_state_dict_post_hook(AdaMixerNetwork._see_object_text)

    @staticmethod
    def _see_object_text(module: nn.Module, _: object) -> None:
        assert isinstance(module, AdaMixerNetwork)
        module.knows_objects = bool(module.object_text.any())

    def set_object_text(self, row: Tensor) -> None:
        """(D,) the text embedding of "object", which the proposals are measured against; it is in the checkpoint."""
        self.object_text.copy_(row.detach())
        self.knows_objects = bool(row.any())

    def stage(self, number: int) -> DecoderStage:
        stage = self.stages[number]
        assert isinstance(stage, DecoderStage)
        return stage

    def look(self, pixels: Tensor, *, with_auxiliary: bool) -> ForwardOutput:
        """Run a padded batch (N, 3, H, W) through the network. Raises HdovdError if the text of "object" is not known."""
        if not self.knows_objects:
            raise HdovdError("this AdaMixer was not trained and was given no text embedding of \"object\" (set_object_text)")
        features = {name: norm(maps) for norm, (name, maps) in zip(self.norms, self.backbone(pixels).items(), strict=True)}
        maps, proposals = list(features.values()), self.proposals
        trunk = proposals.trunk(maps[1:])
        dense = proposals.main(trunk, self.strides[1:], self.object_text)
        auxiliary = proposals.auxiliary(trunk, self.strides[1:], self.object_text) if with_auxiliary else None
        candidates = proposals.candidates(dense, [m.shape[2] * m.shape[3] for m in trunk])
        table = SamplingTable(maps[:-1], self.strides[:-1])
        start = proposals.choose(candidates, self.config.decoder.queries)
        content, xyzr, deltas = proposals.content(table, start), to_xyzr(start), start
        contents, boxes = [], []
        for number in range(len(self.stages)):
            content, moved, deltas = self.stage(number)(table, content, xyzr)
            contents.append(content)
            boxes.append(to_corners(moved))
            xyzr = moved.detach()  # arXiv 2203.16507, section 3.4
        return ForwardOutput(features, candidates, auxiliary, contents, boxes, deltas)

    @torch.inference_mode()
    def predict(self, images: list[Tensor], texts: Tensor) -> list[RoIPredictions]:
        """The last stage's queries of every image, with their scores for any classes (METHOD section 7).

        s2 is a softmax over the classes here. Objectness takes no part, and boxes are not clipped to the image (released code).

        Args:
            images: (3, h, w) uint8 RGB each. texts: (K, D) text embeddings of the classes asked for.
        """
        batch, factors = batch_images(images, self.recipe.input)
        look = self.look(batch.tensors, with_auxiliary=False)
        c = self.stage(-1).describe(look.contents[-1]).flatten(0, 1)
        prompts = torch.cat([texts.to(self.background), self.background])
        s1 = cosine_logits(self.adapters.classified(c), prompts, self.config.decoder.logit_scale).softmax(dim=1)
        s2 = None
        if self.recipe.loss.uses_pseudo_boxes:  # one of the levels that teach c, or its adapter, what CLIP says
            s2 = cosine_logits(self.adapters.distilled(c), texts, self.recipe.inference.distillation_scale).softmax(dim=1)
        queries = look.boxes[-1].shape[1]
        seconds = [None] * len(images) if s2 is None else s2.split(queries)
        return [RoIPredictions(boxes / boxes.new_tensor([*factor, *factor]), one, two)
                for boxes, factor, one, two in zip(look.boxes[-1], factors, s1.split(queries), seconds, strict=True)]


def mean_text(texts: Tensor) -> Tensor:
    """What stands in for the text of "object": the mean direction (D,) of class texts (K, D)."""
    return F.normalize(F.normalize(texts.float(), dim=1).mean(dim=0), dim=0)
