"""The networks of `hdovd propose`: what they have in common, the plain region proposal network, and the object
localisation network (OLN, arXiv 2108.06753), whose proposals are scored by how well they fit, with no background class
anywhere.

They are trained on base boxes alone and never see a class label. OLN's RPN predicts the centerness of its anchors, its
box head the IoU of its RoIs; both learn from what lies near a base box and from nothing else, so that an object which
nobody labelled is never taught to be background. N images, A anchors an image, R RoIs, C channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, clip_boxes_to_image, nms

from hdovd.config.recipe import ProposalsConfig, Recipe
from hdovd.modeling.backbones.pyramid import build_backbone
from hdovd.modeling.batching import Use, batch_images, draw_short_sides, image_generator, keys_of, sample_balanced
from hdovd.modeling.boxes import BoxCoder
from hdovd.modeling.distributed import divisor
from hdovd.modeling.losses import localisation
from hdovd.modeling.rois import PyramidRoIAlign, RoIHead
from hdovd.modeling.rpn import FloatRPNHead, ObjectnessRPN, anchors_of, build_rpn


class ProposalNetwork(nn.Module, ABC):
    """A backbone, and what finds boxes on its feature maps. Without `initialise` it is left as it is, because
    weights are loaded over it.
    """

    def __init__(self, recipe: Recipe, initialise: bool = True) -> None:
        super().__init__()
        self.recipe = recipe
        self.backbone = build_backbone(recipe.detector.backbone, initialise)

    @abstractmethod
    def losses(self, batch: ImageList, features: dict[str, Tensor], targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Weighted losses by name. A target holds `boxes` (n, 4) xyxy in batch pixels, and the `key` of its image or
        None.
        """

    @abstractmethod
    def scored(self, batch: ImageList, features: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Boxes (n, 4) xyxy in batch pixels, inside the picture, and scores (n,) in 0..1 of each image, in any
        order."""

    def forward(
        self, images: list[Tensor], boxes: list[Tensor], keys: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """The losses of one batch, by name; with several processes those of the global batch in the mean
        (`distributed`).

        Args:
            images: (3, h, w) uint8 each. boxes: (n, 4) xyxy pixels each, n may be 0.
            keys: one an image, which seeds all random choices about it; None draws from torch's global generator.
        """
        image_keys = keys_of(keys, len(images))
        batch, factors = batch_images(images, self.recipe.input, draw_short_sides(image_keys, self.recipe.input))
        targets = [
            {"boxes": b * b.new_tensor([*f, *f]), "key": key}
            for b, f, key in zip(boxes, factors, image_keys, strict=True)
        ]
        return self.losses(batch, self.backbone(batch.tensors), targets)

    @torch.inference_mode()
    def propose(self, images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Boxes (n, 4) xyxy pixels of the original image and scores (n,), best first, after NMS at `proposals.nms`."""
        batch, factors = batch_images(images, self.recipe.input)
        found = []
        for (boxes, scores), factor in zip(self.scored(batch, self.backbone(batch.tensors)), factors, strict=True):
            keep = nms(boxes, scores, self.recipe.proposals.nms)
            found.append((boxes[keep] / boxes.new_tensor([*factor, *factor]), scores[keep]))
        return found


class ObjectnessNetwork(ProposalNetwork):
    """A class-agnostic RPN that tells objects from background: an unlabelled object is background to it. The baseline
    of OLN.
    """

    def __init__(self, recipe: Recipe, initialise: bool = True) -> None:
        super().__init__(recipe, initialise)
        backbone = recipe.detector.backbone
        self.rpn = build_rpn(recipe.faster_rcnn.rpn, backbone.fpn_channels, len(backbone.levels) + 1)

    def losses(self, batch: ImageList, features: dict[str, Tensor], targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        _, losses = self.rpn(batch, features, targets)
        return {"objectness": losses["loss_objectness"], "box": losses["loss_rpn_box_reg"]}

    def scored(self, batch: ImageList, features: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        return self.rpn.scored_proposals(batch, features)


# --- the object localisation network ---

_CODER = BoxCoder((10.0, 10.0, 5.0, 5.0))
_SCORE, _BOX = 1, 2  # what a sampled anchor learns: a sum of these


class CenternessRPN(ObjectnessRPN):
    """An RPN whose score is the centerness of an anchor in the object about it. One square anchor a location and size.

    Losses: L1 of the centerness over anchors near a base box, IoU of the boxes of the best anchors. There are no other
    samples.
    """

    def __init__(self, recipe: Recipe) -> None:
        rpn, channels = recipe.faster_rcnn.rpn, recipe.detector.backbone.fpn_channels
        self.config: ProposalsConfig = recipe.proposals
        rois = self.config.rois
        super().__init__(
            anchors_of(rpn, len(recipe.detector.backbone.levels) + 1, (1.0,)),
            FloatRPNHead(channels, len(rpn.anchor_sizes[0])),
            fg_iou_thresh=self.config.box_iou,
            bg_iou_thresh=min(0.3, self.config.box_iou),
            batch_size_per_image=rpn.samples,
            positive_fraction=1.0,
            pre_nms_top_n={"training": rois, "testing": rois},
            post_nms_top_n={"training": rois, "testing": rois},
            nms_thresh=self.config.rpn_nms,
        )

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Any]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What each anchor learns (A,) int64 an image, a sum of _SCORE and _BOX or 0; and the box (A, 4) it learns
        from.
        """
        learns, boxes = [], []
        for own, target in zip(anchors, targets, strict=True):
            score, box, matched = self._near(own, target["boxes"])
            generator, nothing = image_generator(target.get("key"), Use.ANCHORS, own.device), torch.zeros_like(score)
            score, _ = sample_balanced(score, nothing, self.samples, 1.0, generator)
            box, _ = sample_balanced(box, nothing, self.samples, 1.0, generator)
            learns.append(_SCORE * score.long() + _BOX * box.long())
            boxes.append(matched)
        return learns, boxes

    def _near(self, anchors: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whether an anchor may learn the score (A,), the box (A,), and from which box (A, 4)."""
        if not len(boxes):
            nothing = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
            return nothing, nothing, anchors
        overlap = box_iou(boxes, anchors)
        best, whose = overlap.max(dim=0)
        near = best >= self.config.score_iou
        closest = (overlap == overlap.amax(dim=1, keepdim=True)).any(
            dim=0
        ) & near  # every box is learnt by its best anchor
        return near, (best >= self.config.box_iou) | closest, boxes[whose]

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Centerness and box loss, each over the anchors that were drawn for it."""
        learns, wanted = torch.cat(labels), torch.cat(regression_targets)
        score, box = (learns & _SCORE) > 0, (learns & _BOX) > 0
        return (
            localisation.quality_loss(
                objectness.flatten()[score], localisation.centerness(wanted[score]), divisor(score.sum())
            ),
            localisation.iou_loss(pred_bbox_deltas[box], wanted[box], divisor(box.sum())),
        )


class QualityHead(RoIHead):
    """Box offsets, and a logit of the RoI's IoU with the object that it is about."""

    def __init__(self, channels: int, fc_channels: int) -> None:
        super().__init__(channels, fc_channels)
        self.iou = nn.Linear(fc_channels, 1)
        self.initialise(self.iou)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, 7, 7) -> offsets (R, 4), IoU logits (R,), float32."""
        r = self.hidden(pooled)
        return self.deltas(r).float(), self.iou(r).float().flatten()


class ObjectLocalisationNetwork(ProposalNetwork):
    def __init__(self, recipe: Recipe, initialise: bool = True) -> None:
        super().__init__(recipe, initialise)
        detector = recipe.faster_rcnn
        self.rpn = CenternessRPN(recipe)
        self.pool = PyramidRoIAlign(
            detector.backbone.levels, detector.head.canonical_size, detector.head.sampling_ratio
        )
        self.head = QualityHead(detector.backbone.fpn_channels, detector.head.fc_channels)

    def losses(self, batch: ImageList, features: dict[str, Tensor], targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        config = self.recipe.proposals
        proposals, rpn_losses = self.rpn(batch, features, targets)
        drawn = [
            sample_near(p, t["boxes"], self.recipe.faster_rcnn.head.samples, config.roi_iou, t["key"])
            for p, t in zip(proposals, targets, strict=True)
        ]
        rois, boxes, overlaps = ([one[k] for one in drawn] for k in range(3))
        deltas, logits = self.head(self.pool(features, rois))
        wanted = _CODER.encode_single(torch.cat(boxes), torch.cat(rois))
        count = divisor(torch.full((), len(deltas), device=deltas.device))
        return {
            "rpn_centerness": config.centerness_weight * rpn_losses["loss_objectness"],
            "rpn_box": config.rpn_box_weight * rpn_losses["loss_rpn_box_reg"],
            "head_iou": config.iou_weight * localisation.quality_loss(logits, torch.cat(overlaps), count),
            "head_box": config.box_weight * localisation.offset_loss(deltas, wanted, count),
        }

    def scored(self, batch: ImageList, features: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The score is the geometric mean of centerness and IoU (arXiv 2108.06753, section 3)."""
        found = self.rpn.scored_proposals(batch, features)
        rois, counts = [boxes for boxes, _ in found], [len(boxes) for boxes, _ in found]
        deltas, logits = self.head(self.pool(features, rois))
        boxes = _CODER.decode_single(deltas, torch.cat(rois))
        scores = (torch.cat([centerness for _, centerness in found]) * logits.sigmoid()).sqrt()
        return [
            (clip_boxes_to_image(own, size), score)
            for own, score, size in zip(boxes.split(counts), scores.split(counts), batch.image_sizes, strict=True)
        ]


def sample_near(
    proposals: Tensor, boxes: Tensor, samples: int, least_iou: float, key: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw at most `samples` of the proposals that lie near a box, and of the boxes themselves.

    Args:
        proposals: (n, 4). boxes: (B, 4), may be empty. key: the image's; None draws from torch's global generator.

    Returns:
        RoIs (R, 4), the box that each one is about (R, 4), and its IoU with it (R,), `least_iou` or more.
    """
    candidates = torch.cat([boxes, proposals])
    if not len(boxes):
        return candidates[:0], candidates[:0], candidates.new_zeros(0)
    best, whose = box_iou(boxes, candidates).max(dim=0)
    near = best >= least_iou
    near, _ = sample_balanced(
        near, torch.zeros_like(near), samples, 1.0, image_generator(key, Use.ROIS, candidates.device)
    )
    keep = near.nonzero().flatten()
    return candidates[keep], boxes[whose[keep]], best[keep]
