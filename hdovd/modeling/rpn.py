"""The region proposal network: torchvision's, with the L1 loss of the method.

N images, A anchors an image.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import box_iou

from hdovd.config.detector import RpnConfig
from hdovd.core import HdovdError
from hdovd.modeling.batching import Use, image_generator, padded, sample_balanced
from hdovd.modeling.boxes import BoxCoder, limits, nms_of_images
from hdovd.modeling.distributed import divisor

ASPECT_RATIOS = (0.5, 1.0, 2.0)
DROPPED = -1.0  # less than any score


class FloatAnchors(AnchorGenerator):
    """torchvision's anchors take the feature maps' dtype; in bfloat16 their coordinates would be off by pixels."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        wide = [m.new_empty(m.shape, dtype=torch.float32) for m in feature_maps]
        return cast(list[Tensor], super().forward(image_list, wide))


class ExactAnchors(FloatAnchors):
    """The same without rounding: sides are not rounded to pixels, and each level's stride is twice that of the one
    before, where torchvision divides sides of the batch by those of the map, which is 58 for the pooled level of a
    batch 352 pixels wide.
    """

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """(ratios * scales, 4) around the origin."""
        high, side = (
            torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt(),
            torch.as_tensor(scales, dtype=dtype, device=device),
        )
        w, h = ((factor[:, None] * side[None]).flatten() for factor in (1 / high, high))
        return torch.stack([-w, -h, w, h], dim=1) / 2

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        exact = [[finest * 2**level for finest in strides[0]] for level in range(len(strides))]
        return cast(list[Tensor], super().grid_anchors(grid_sizes, exact))


class FloatRPNHead(RPNHead):
    """torchvision's head; its outputs are float32 under autocast too, as decoding and NMS want them."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, deltas = super().forward(x)
        return [s.float() for s in scores], [d.float() for d in deltas]


class ObjectnessRPN(RegionProposalNetwork):
    """Faster R-CNN's RPN with an L1 box loss, divided by the sampled anchors like the objectness loss.

    The target of an image holds `boxes` (n, 4), and may hold the `key` that its anchors are drawn by
    (`sampling.image_generator`). Sampled anchors are counted over all processes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.samples, self.positive_share = (
            self.fg_bg_sampler.batch_size_per_image,
            self.fg_bg_sampler.positive_fraction,
        )

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The proposals (n, 4) that are kept of each image, and their scores (n,), best first.

        torchvision's, which goes image by image, on a CPU; on a GPU all images at once, where the host waits for the
        device twice: for the NMS and for what is left. A trace goes the GPU's way with its one image.
        """
        if proposals.device.type == "cpu" and not torch.jit.is_tracing():  # type: ignore[attr-defined]
            shapes = [(int(height), int(width)) for height, width in image_shapes]
            return super().filter_proposals(proposals, objectness, shapes, num_anchors_per_level)  # type: ignore[no-any-return]
        objectness = objectness.detach().reshape(len(proposals), -1)
        best = self._get_top_n_idx(objectness, num_anchors_per_level)
        scores = objectness.gather(1, best).sigmoid()
        boxes = proposals.gather(1, best[..., None].expand(-1, -1, 4)).clamp(min=0)
        boxes = boxes.minimum(limits(image_shapes, proposals)[:, None])
        dropped = ((boxes[..., 2:] - boxes[..., :2]) < self.min_size).any(dim=2) | (scores < self.score_thresh)
        scores = scores.masked_fill(dropped, DROPPED)  # the last in the NMS: they take no other box along
        levels = [torch.full((n,), level, device=best.device) for level, n in enumerate(num_anchors_per_level)]
        kept = nms_of_images(boxes, scores, self.nms_thresh, torch.cat(levels)[best])
        boxes, scores = boxes.flatten(0, 1), scores.flatten()
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            kept = kept[scores[kept] > DROPPED][: self.post_nms_top_n()]
            return [boxes[kept]], [scores[kept]]
        on_host = kept.masked_fill(scores[kept] == DROPPED, -1).cpu()
        image = torch.where(on_host >= 0, on_host // best.shape[1], -1)
        places = [on_host[image == i][: self.post_nms_top_n()] for i in range(len(best))]
        rows, counts = torch.cat(places).to(kept.device, non_blocking=True), [len(own) for own in places]
        return list(boxes[rows].split(counts)), list(scores[rows].split(counts))

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Any]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels (A,) an image, 1 object and 0 background for the anchors drawn, -1 for all others; and boxes (A, 4)
        matched.
        """
        drawn, matched = [], []
        for grid, target in zip(anchors, targets, strict=True):
            labels, box_of = self._match(grid, target)
            generator = image_generator(target.get("key"), Use.ANCHORS, grid.device)
            positive, negative = sample_balanced(labels == 1, labels == 0, self.samples, self.positive_share, generator)
            drawn.append(labels.masked_fill(~(positive | negative), -1.0))
            matched.append(target["boxes"][box_of] if len(target["boxes"]) else torch.zeros_like(grid))
        return drawn, matched

    def _match(self, anchors: Tensor, target: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Labels (A,) 1 object, 0 background, -1 neither; and the box (A,) that an object is.

        torchvision's rules: the anchors that fit a box best are objects, however badly they fit it.
        """
        if not len(target["boxes"]):
            return anchors.new_zeros(len(anchors)), torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
        iou = box_iou(target["boxes"], anchors)
        best, box_of = iou.max(dim=0)
        is_best = (iou == iou.amax(dim=1, keepdim=True)).any(dim=0)
        low, high = self.proposal_matcher.low_threshold, self.proposal_matcher.high_threshold
        labels = torch.ones_like(best).masked_fill(best < high, -1.0).masked_fill(best < low, 0.0)
        return labels.masked_fill(is_best, 1.0), box_of

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The losses over anchors with labels 1 and 0: all of those that were drawn."""
        wanted = torch.cat(labels)
        positive, sampled = wanted >= 1, wanted >= 0
        count = divisor(sampled.sum())
        # All anchors, with zeros for those that do not count: as many as count would have the host wait for the device.
        box = (pred_bbox_deltas - torch.cat(regression_targets)).masked_fill(
            ~positive[:, None], 0.0
        ).abs().sum() / count
        scores = objectness.flatten()
        score = (
            F.binary_cross_entropy_with_logits(scores, positive.to(scores), sampled.to(scores), reduction="sum") / count
        )
        return score, box

    def scored_proposals(self, images: ImageList, features: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """What `forward` keeps of each image, with its scores: boxes (n, 4) in batch pixels, scores (n,) in 0..1."""
        maps = list(features.values())
        scores, deltas = self.head(maps)
        anchors = self.anchor_generator(images, maps)
        per_level = [s[0].numel() for s in scores]
        flat_scores, flat_deltas = concat_box_prediction_layers(scores, deltas)
        boxes = self.box_coder.decode(flat_deltas, anchors).view(len(anchors), -1, 4)
        kept, kept_scores = self.filter_proposals(boxes, flat_scores, images.image_sizes, per_level)
        return list(zip(kept, kept_scores, strict=True))


class AuthorsRPN(ObjectnessRPN):
    """As the authors' code does it, on mmdetection: anchors are `ExactAnchors`, and a box's best anchor learns it only
    from an IoU of `least_best` on, and then for this box even if it fits another one better; anchors whose centre lies
    outside of the picture's own padding to a multiple of 32 are left out.

    The target of an image also holds its `size` (height, width) in the batch.
    """

    least_best = 0.3

    def _match(self, anchors: Tensor, target: dict[str, Any]) -> tuple[Tensor, Tensor]:
        right, bottom = (padded(side) for side in reversed(target["size"]))
        centre = (anchors[:, :2] + anchors[:, 2:]) / 2
        inside = (centre[:, 0] < right - 0.5) & (centre[:, 1] < bottom - 0.5)
        box_of = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
        if not len(target["boxes"]):
            return torch.where(inside, 0.0, -1.0), box_of
        iou = box_iou(target["boxes"], anchors).masked_fill(~inside, -1.0)
        best, box_of = iou.max(dim=0)
        low, high = self.proposal_matcher.low_threshold, self.proposal_matcher.high_threshold
        labels = torch.full_like(best, -1.0).masked_fill((best >= 0) & (best < low), 0.0).masked_fill(best >= high, 1.0)
        most = iou.max(dim=1, keepdim=True).values
        is_best = (iou == most) & (most >= self.least_best)
        last = (is_best * torch.arange(1, len(iou) + 1, device=iou.device)[:, None]).amax(
            dim=0
        )  # of several boxes the last
        return torch.where(last > 0, 1.0, labels), torch.where(last > 0, last - 1, box_of)


def build_rpn(config: RpnConfig, channels: int, level_count: int) -> ObjectnessRPN:
    """An RPN over `level_count` feature maps (the pooled one included) of `channels` channels."""
    kind = AuthorsRPN if config.rules == "authors" else ObjectnessRPN
    return kind(
        anchors_of(config, level_count, ASPECT_RATIOS),
        FloatRPNHead(channels, len(config.anchor_sizes[0]) * len(ASPECT_RATIOS)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=config.samples,
        positive_fraction=0.5,
        pre_nms_top_n={"training": config.pre_nms, "testing": config.pre_nms // 2},
        post_nms_top_n={"training": config.post_nms, "testing": config.post_nms},
        nms_thresh=config.nms,
    )


def anchors_of(config: RpnConfig, level_count: int, aspect_ratios: tuple[float, ...]) -> FloatAnchors:
    """The anchors of every level. Raises HdovdError if the sizes do not fit the levels."""
    if len(config.anchor_sizes) != level_count:
        raise HdovdError(
            f"detector.rpn.anchor_sizes has {len(config.anchor_sizes)} lists for {level_count} feature levels "
            "(backbone.levels and one pooled level): give one list of sizes a level"
        )
    if len({len(sizes) for sizes in config.anchor_sizes}) != 1:
        raise HdovdError(f"detector.rpn.anchor_sizes {config.anchor_sizes}: every level needs the same number of sizes")
    kind = ExactAnchors if config.rules == "authors" else FloatAnchors
    return kind(tuple(map(tuple, config.anchor_sizes)), (aspect_ratios,) * level_count)
