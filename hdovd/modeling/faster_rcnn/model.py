"""Faster R-CNN with a text-embedding classifier and three levels of distillation (METHOD sections 3 to 6).

The levels are parts of their own (`levels`), their losses pure functions (`losses`).
N images, R RoIs, K base classes, D embedding size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from hdovd.config.recipe import Recipe
from hdovd.data.targets import Targets, scale_all, with_large_pseudo_boxes
from hdovd.modeling.backbones.pyramid import build_backbone
from hdovd.modeling.base import Detector, ExtraLosses, Regions, StepContext, Students
from hdovd.modeling.batching import batch_images, draw_short_sides, keys_of
from hdovd.modeling.boxes import BoxCoder, limits
from hdovd.modeling.distributed import divisor
from hdovd.modeling.levels.classwise import ClassLevel
from hdovd.modeling.levels.imagewise import ImageLevel
from hdovd.modeling.levels.instance import InstanceLevel
from hdovd.modeling.losses import classwise
from hdovd.modeling.losses.instance import box_students
from hdovd.modeling.rois import PyramidRoIAlign, RoIHead, number_boxes, sample_rois_of_images
from hdovd.modeling.rpn import build_rpn

CODER = BoxCoder((10.0, 10.0, 5.0, 5.0))


class BoxHead(RoIHead):
    """Box deltas, classification feature c and what the distillation feature d is made of, if it is wanted."""

    def __init__(self, channels: int, fc_channels: int, dim: int, with_distillation: bool) -> None:
        super().__init__(channels, fc_channels)
        self.class_feature = nn.Linear(fc_channels, dim)
        self.distillation = nn.Linear(fc_channels, dim) if with_distillation else None
        self.initialise(self.class_feature)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(R, C, 7, 7) -> deltas (R, 4), c (R, D), float32; and r (R, F), what `distill` takes."""
        r = self.hidden(pooled)
        return self.deltas(r).float(), self.class_feature(r).float(), r

    def distill(self, r: Tensor) -> Tensor | None:
        """Any rows of r, (n, F) -> d (n, D) float32, or None if the head has no such feature."""
        return None if self.distillation is None else self.distillation(r).float()


class FasterRCNN(Detector):
    """The compact detector. Text embeddings are arguments: it holds no class list.

    Without `initialise` the backbone is left as it is, because weights are loaded over it.
    """

    exportable = "hdovd.modeling.export.detectors:ExportableDetector"
    knows_backgrounds = True
    training_parts = ("class_level.", "instance_level.", "image_level.", "extra.")

    def __init__(self, recipe: Recipe, dim: int, initialise: bool = True) -> None:
        super().__init__()
        self.recipe, self.dim = recipe, dim
        detector, loss = recipe.faster_rcnn, recipe.loss
        self.config, self.uses_pseudo_boxes = detector, True
        self.backbone = build_backbone(detector.backbone, initialise)
        channels, levels = detector.backbone.fpn_channels, detector.backbone.levels
        self.rpn = build_rpn(detector.rpn, channels, len(levels) + 1)
        self.pool = PyramidRoIAlign(levels, detector.head.canonical_size, detector.head.sampling_ratio)
        self.head = BoxHead(channels, detector.head.fc_channels, dim, loss.instance.enabled)
        self.background = nn.Parameter(torch.randn(dim))
        self.class_level = ClassLevel(loss.class_, recipe.pseudo_boxes, detector.head.logit_scale)
        self.instance_level = InstanceLevel(loss.instance, dim) if loss.instance.enabled else None
        self.image_level = ImageLevel(loss.image, levels, channels, dim) if loss.image.enabled else None
        self.extra = ExtraLosses(loss.extra, dim, channels)
        self.register_load_state_dict_pre_hook(_rename_old)

    def begin_epoch(self, epoch: int) -> None:
        """Pseudo boxes take part from the recipe's epoch on; base boxes and whole images do in all."""
        self.uses_pseudo_boxes = epoch >= self.recipe.pseudo_boxes.from_epoch

    def forward(
        self, images: list[Tensor], targets: list[Targets], texts: Tensor, keys: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """The weighted losses of one batch, by name; with several processes those of the global batch in the mean
        (`distributed`).

        With keys the losses do not depend on the order of the images, nor what is drawn for an image on what else is in
        the batch, as far as its features do not: padding reaches into them, and batch norm where it is not frozen.
        The order of rows in the levels' queues is that of the images.

        Args:
            images: (3, h, w) uint8 RGB each. targets: one an image, in its pixels.
            texts: (K, D) text embeddings of the base classes.
            keys: a whole number below 2**63 an image, which seeds all random choices about it: anchors, RoIs, scale.
                None draws from torch's global generator.

        Raises HdovdError for keys that do not fit.
        """
        view, rpn_losses = self._view(images, targets, texts, keys)
        losses = {
            "rpn_objectness": rpn_losses["loss_objectness"],
            "rpn_box": rpn_losses["loss_rpn_box_reg"],
            **self.class_level(view, self.backgrounds(self.background[None])),
            "box": _box_loss(view),
        }
        for level in (self.instance_level, self.image_level, self.extra):
            if level is not None:
                losses |= level(view)
        return losses

    def _view(
        self, images: list[Tensor], targets: list[Targets], texts: Tensor, keys: Sequence[int] | None
    ) -> tuple[StepContext, dict[str, Tensor]]:
        """What the levels' losses are made of, and the RPN's losses, of which there are none in evaluation mode."""
        image_keys = keys_of(keys, len(images))
        batch, factors = batch_images(images, self.recipe.input, draw_short_sides(image_keys, self.recipe.input))
        pseudo = self.recipe.pseudo_boxes
        most = pseudo.max_per_image if self.uses_pseudo_boxes else 0
        large = with_large_pseudo_boxes(scale_all(targets, factors), pseudo.min_side)
        targets = [t.with_first_pseudo_boxes(most) for t in large]
        features = self.backbone(batch.tensors)
        # To the authors' RPN pseudo boxes are objects also beyond `max_per_image`.
        of_rpn = large if self.config.rpn.rules == "authors" and self.uses_pseudo_boxes else targets
        wanted = [
            {"boxes": t.all_boxes, "key": key, "size": size}
            for t, key, size in zip(of_rpn, image_keys, batch.image_sizes, strict=True)
        ]
        proposals, rpn_losses = self.rpn(batch, features, wanted)
        config = self.config.head
        rois, matches, positive = sample_rois_of_images(
            proposals, [t.all_boxes for t in targets], config.samples, config.positive_share, image_keys
        )
        deltas, c, r = self.head(self.pool(features, rois))
        box_of_roi = number_boxes(matches, [len(t.all_boxes) for t in targets])
        d = self.head.distill(r[positive])  # no loss asks for the others: three quarters of the rows
        return StepContext(features, batch.image_sizes, targets, texts, rois, box_of_roi, deltas, c, d), rpn_losses

    @torch.inference_mode()
    def students(self, images: list[Tensor], targets: list[Targets], keys: Sequence[int] | None = None) -> Students:
        """The student embeddings of a batch, as `forward` makes them for the instance level; no loss, and no memory
        changes.

        In evaluation mode batch norms that are not frozen take their running statistics. Raises ValueError if the
        recipe does without the instance level.
        """
        view, _ = self._view(images, targets, images[0].new_zeros(0, self.dim, dtype=torch.float32), keys)
        if view.d is None:
            raise ValueError("a detector without the instance level has no student embeddings")
        boxes = sum(len(t.all_boxes) for t in view.targets)
        return Students(*box_students(view.d, view.box_of_roi[view.box_of_roi >= 0], boxes), view.targets)

    def regions(self, batch: ImageList) -> Regions:
        """Every proposal of a batch."""
        features = self.backbone(batch.tensors)
        proposals, _ = self.rpn(batch, features)
        deltas, c, r = self.head(self.pool(features, proposals))
        boxes = CODER.decode_single(deltas, torch.cat(proposals)).clamp(min=0)
        last = [limit.expand_as(own) for limit, own in zip(limits(batch.image_sizes, boxes), proposals, strict=True)]
        return Regions(boxes.minimum(torch.cat(last)), c, self.head.distill(r), [len(own) for own in proposals])

    def scores(self, c: Tensor, d: Tensor | None, texts: Tensor) -> tuple[Tensor, Tensor | None]:
        backgrounds, scale = self.backgrounds(self.background[None]), self.recipe.inference.distillation_scale
        first = classwise.class_probability(c, texts, backgrounds, self.config.head.logit_scale)
        return first, None if d is None else classwise.cosine_logits(d, texts, scale).sigmoid()


def _box_loss(view: StepContext) -> Tensor:
    boxes = F.pad(torch.cat([t.all_boxes for t in view.targets]), (0, 0, 0, 1))  # row -1 serves background
    base = torch.cat([torch.arange(len(t.all_boxes), device=boxes.device) < len(t.boxes) for t in view.targets])
    wanted = CODER.encode_single(boxes[view.box_of_roi], torch.cat(view.rois))
    count = divisor(torch.full((), len(view.deltas), device=view.deltas.device))
    return classwise.box_loss(view.deltas, wanted, F.pad(base, (0, 1))[view.box_of_roi], count)


def _rename_old(_: nn.Module, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
    """Checkpoints of before the levels were parts of their own have their rows and weights under other names."""
    for old, new in (
        ("student_queue.", "instance_level.student_queue."),
        ("teacher_queue.", "instance_level.teacher_queue."),
        ("image_head.", "image_level.head."),
        ("image_student_queue.", "image_level.student_queue."),
        ("image_teacher_queue.", "image_level.teacher_queue."),
    ):
        for name in [n for n in state if n.startswith(prefix + old)]:
            state[prefix + new + name.removeprefix(prefix + old)] = state.pop(name)
