"""Faster R-CNN with a text-embedding classifier and three levels of distillation (METHOD sections 3 to 6).

N images, R RoIs, K base classes, P pseudo boxes of the batch, B boxes of the batch, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image

from hdovd.backbone import build_backbone
from hdovd.batching import batch_images
from hdovd.config import Recipe
from hdovd.feature_queue import FeatureQueue
from hdovd.losses import classwise, instance
from hdovd.losses.contrastive import alignment_loss
from hdovd.losses.imagewise import ImageHead
from hdovd.rois import POOL_SIZE, PyramidRoIAlign, sample_rois
from hdovd.rpn import build_rpn
from hdovd.targets import Targets

_CODER = BoxCoder((10.0, 10.0, 5.0, 5.0))


@dataclass(frozen=True, slots=True)
class RoIPredictions:
    """What the head says of one image's RoIs, before thresholds and NMS.

    boxes (R, 4) xyxy pixels of the original image; class_probability (R, C+1) softmax s1, background last;
    distillation_score (R, C) sigmoid s2, or None if the model has no distillation feature.
    """

    boxes: Tensor
    class_probability: Tensor
    distillation_score: Tensor | None


class BoxHead(nn.Module):
    """RoI features -> two FC -> box deltas, classification feature c and (if wanted) distillation feature d."""

    def __init__(self, channels: int, fc_channels: int, dim: int, with_distillation: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels * POOL_SIZE**2, fc_channels)
        self.fc2 = nn.Linear(fc_channels, fc_channels)
        self.deltas = nn.Linear(fc_channels, 4)
        self.class_feature = nn.Linear(fc_channels, dim)
        self.distillation = nn.Linear(fc_channels, dim) if with_distillation else None
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer, std in ((self.deltas, 0.001), (self.class_feature, 0.01)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(R, C, 7, 7) -> deltas (R, 4), c (R, D), d (R, D) or None, float32."""
        r = self.fc2(self.fc1(pooled.flatten(1)).relu()).relu()
        d = None if self.distillation is None else self.distillation(r).float()
        return self.deltas(r).float(), self.class_feature(r).float(), d


class FasterRCNN(nn.Module):
    """The compact detector. Text embeddings are arguments: it holds no class list.

    `log` None: the backbone is not initialised, because weights are loaded over it.
    """

    def __init__(self, recipe: Recipe, dim: int, log: Callable[[str], None] | None) -> None:
        super().__init__()
        self.recipe, self.dim = recipe, dim
        detector, loss = recipe.detector, recipe.loss
        self.backbone = build_backbone(detector.backbone, log)
        channels = detector.backbone.fpn_channels
        self.rpn = build_rpn(detector.rpn, channels, len(detector.backbone.levels) + 1)
        self.pool = PyramidRoIAlign(detector.backbone.levels, detector.head.canonical_size, detector.head.sampling_ratio)
        self.head = BoxHead(channels, detector.head.fc_channels, dim, loss.instance.enabled)
        self.background = nn.Parameter(torch.randn(dim))
        if loss.instance.enabled:
            self.student_queue = FeatureQueue(loss.instance.queue, dim)
            self.teacher_queue = FeatureQueue(loss.instance.queue, dim)
        if loss.image.enabled:
            self.image_head = ImageHead(channels, dim)
            self.image_student_queue = FeatureQueue(loss.image.queue, dim)
            self.image_teacher_queue = FeatureQueue(loss.image.queue, dim)

    def forward(self, images: list[Tensor], targets: list[Targets], texts: Tensor) -> dict[str, Tensor]:
        """The weighted losses of one batch, by name.

        Args:
            images: (3, h, w) uint8 RGB each. targets: one an image, in its pixels.
            texts: (K, D) text embeddings of the base classes.
        """
        batch, factors = batch_images(images, self.recipe.input)
        pseudo = self.recipe.pseudo_boxes
        targets = [t.scaled(*f).with_best_pseudo_boxes(pseudo.min_side, pseudo.max_per_image)
                   for t, f in zip(targets, factors, strict=True)]
        features = self.backbone(batch.tensors)
        proposals, rpn_losses = self.rpn(batch, features, [{"boxes": t.all_boxes} for t in targets])
        losses = {"rpn_objectness": rpn_losses["loss_objectness"], "rpn_box": rpn_losses["loss_rpn_box_reg"]}
        losses |= self._head_losses(features, proposals, targets, texts)
        if self.recipe.loss.image.enabled:
            losses["image_alignment"] = self._image_loss(batch, features, targets)
        return losses

    def _head_losses(self, features: dict[str, Tensor], proposals: list[Tensor], targets: list[Targets],
                     texts: Tensor) -> dict[str, Tensor]:
        config = self.recipe.detector.head
        rois, matches = zip(*(sample_rois(p, t.all_boxes, config.samples, config.positive_share)
                              for p, t in zip(proposals, targets, strict=True)), strict=True)
        deltas, c, d = self.head(self.pool(features, list(rois)))
        matched, boxes, labels, weights = self._assign(matches, targets, len(texts))
        pseudo_texts = [t.pseudo_texts for t in targets] if self.recipe.loss.class_.enabled else []
        prompts = torch.cat([texts, *pseudo_texts, self.background[None]])
        is_base = labels < len(texts)
        wanted = _CODER.encode_single(boxes[matched.clamp(min=0)], torch.cat(rois)) if len(boxes) else torch.zeros_like(deltas)
        losses = {
            "classification": classwise.classification_loss(
                classwise.cosine_logits(c, prompts, config.logit_scale), labels, weights),
            "box": classwise.box_loss(deltas, wanted, is_base),
        }
        if d is not None:
            losses |= self._instance_losses(d, matched, targets)
        return losses

    def _assign(self, matches: tuple[Tensor, ...], targets: list[Targets],
                base_count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Number the boxes of the batch and give every RoI its box, label and weight.

        Returns matched (R,) box number or -1, boxes (B, 4), labels (R,) as in `losses.classwise`, weights (R,).
        Without the class level a RoI of a pseudo box has no prompt of its own: weight 0, and the background's label.
        """
        level, pseudo = self.recipe.loss.class_, self.recipe.pseudo_boxes
        boxes = torch.cat([t.all_boxes for t in targets])
        labels, weights, first_box, first_pseudo, matched = [], [], 0, 0, []
        for match, t in zip(matches, targets, strict=True):
            matched.append(torch.where(match >= 0, match + first_box, -1))
            count = len(t.pseudo_boxes)
            own = torch.arange(count, device=boxes.device) if level.enabled else torch.zeros(count, dtype=torch.int64, device=boxes.device)
            labels += [t.labels, base_count + first_pseudo + own]
            trust = classwise.reliability(t.pseudo_embeddings, t.pseudo_texts, pseudo.reliability_centre,
                                          pseudo.reliability_width, pseudo.reliability_scale)
            weights += [torch.ones(len(t.boxes), device=boxes.device), trust * (level.weight if level.enabled else 0.0)]
            first_box += len(t.all_boxes)
            first_pseudo += count if level.enabled else 0
        roi_box = torch.cat(matched)
        background = base_count + first_pseudo
        box_labels = torch.cat([*labels, torch.tensor([background], device=boxes.device)])  # row -1 serves background
        box_weights = torch.cat([*weights, torch.ones(1, device=boxes.device)])
        return roi_box, boxes, box_labels[roi_box], box_weights[roi_box]

    def _instance_losses(self, d: Tensor, matched: Tensor, targets: list[Targets]) -> dict[str, Tensor]:
        config = self.recipe.loss.instance
        teachers = torch.cat([rows for t in targets for rows in (t.embeddings, t.pseudo_embeddings)])
        q, used = instance.box_students(d, matched, len(teachers))
        e = teachers[used]
        if len(q) < instance.MIN_PAIRS:
            return {"instance_alignment": d.sum() * 0, "instance_relation": d.sum() * 0}
        aligned = alignment_loss(q, e, self.student_queue.read(), self.teacher_queue.read(), config.tau)
        related = instance.relation_loss(q, e, config.relation_tau, config.relation_temperature)
        self.student_queue.push(q)
        self.teacher_queue.push(e)
        return {"instance_alignment": config.alignment_weight * aligned, "instance_relation": config.relation_weight * related}

    def _image_loss(self, batch: ImageList, features: dict[str, Tensor], targets: list[Targets]) -> Tensor:
        config = self.recipe.loss.image
        levels = sorted(self.recipe.detector.backbone.levels)
        g = self.image_head([features[str(level)] for level in levels], batch.image_sizes, 2 ** levels[-1])
        f = torch.stack([t.image_embedding for t in targets])
        loss = alignment_loss(g, f, self.image_student_queue.read(), self.image_teacher_queue.read(), config.tau)
        self.image_student_queue.push(g)
        self.image_teacher_queue.push(f)
        return config.weight * loss

    @torch.inference_mode()
    def predict(self, images: list[Tensor], texts: Tensor) -> list[RoIPredictions]:
        """Scores of every proposal of a batch for any classes.

        Args:
            images: (3, h, w) uint8 RGB each. texts: (C, D) text embeddings of the classes asked for.
        """
        batch, factors = batch_images(images, self.recipe.input)
        features = self.backbone(batch.tensors)
        proposals, _ = self.rpn(batch, features)
        deltas, c, d = self.head(self.pool(features, proposals))
        prompts = torch.cat([texts, self.background[None]])
        s1 = classwise.cosine_logits(c, prompts, self.recipe.detector.head.logit_scale).softmax(dim=1)
        s2 = None if d is None else classwise.cosine_logits(d, texts, self.recipe.inference.distillation_scale).sigmoid()
        decoded = _CODER.decode_single(deltas, torch.cat(proposals))
        counts = [len(p) for p in proposals]
        per_image = zip(decoded.split(counts), s1.split(counts), [None] * len(counts) if s2 is None else s2.split(counts),
                        batch.image_sizes, factors, strict=True)
        return [RoIPredictions(clip_boxes_to_image(boxes, size) / boxes.new_tensor([*factor, *factor]), one, two)
                for boxes, one, two, size, factor in per_image]
