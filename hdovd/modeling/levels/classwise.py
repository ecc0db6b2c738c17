"""Level 2 as a part of the detector: the classifier's prompts, and the labels and weights of RoIs (METHOD section 5).

R RoIs, B boxes and P pseudo boxes of this process, A pseudo boxes of all processes, K base classes, D embedding size.
Prompts are [t_1..t_K; u_1..u_A; bg]. The level keeps nothing between steps: the background embedding is the detector's
own, which needs it without this level too.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdovd.config.recipe import ClassLossConfig, PseudoBoxConfig
from hdovd.data.targets import Targets
from hdovd.modeling.base import StepContext
from hdovd.modeling.distributed import counts_of_ranks, divisor, gather_rows, rank
from hdovd.modeling.losses import classwise


class ClassLevel(nn.Module):
    """The classification loss. Switched off, prompts are [t_1..t_K; bg] and RoIs of pseudo boxes weigh nothing."""

    def __init__(self, config: ClassLossConfig, pseudo: PseudoBoxConfig, logit_scale: float) -> None:
        super().__init__()
        self.config, self.pseudo, self.logit_scale = config, pseudo, logit_scale

    def forward(self, view: StepContext, backgrounds: Tensor) -> dict[str, Tensor]:
        """`backgrounds`: (B + 1, D), B text embeddings of backgrounds and the learned one."""
        prompts, labels = prompts_and_labels(view.targets, view.texts, backgrounds, with_pseudo=self.config.enabled)
        background = len(prompts) - len(backgrounds)
        weights = box_weights(view.targets, self.config, self.pseudo)
        labels = F.pad(labels, (0, 1), value=background)[view.box_of_roi]  # row -1 serves background
        weights = F.pad(weights, (0, 1), value=1.0)[view.box_of_roi]
        logits = classwise.cosine_logits(view.c, prompts, self.logit_scale)
        logits = classwise.with_one_background(logits, len(backgrounds))
        if self.config.federated:
            rois = torch.tensor([len(part) for part in view.rois])
            image = torch.arange(len(rois)).repeat_interleave(rois).to(logits.device, non_blocking=True)
            logits = classwise.of_judged(logits, [t.judged for t in view.targets], image, labels == background)
        return {"classification": classwise.classification_loss(logits, labels, weights, divisor((weights > 0).sum()))}


def prompts_and_labels(
    targets: Sequence[Targets], texts: Tensor, backgrounds: Tensor, *, with_pseudo: bool
) -> tuple[Tensor, Tensor]:
    """The classifier's prompts (X, D), of which the last are `backgrounds` (B + 1, D), and which of them finds each box
    of the batch, (B,) int64. Without pseudo boxes among them, those are to be found by bg (and weigh nothing).

    Args:
        texts: (K, D) of the base classes.
    """
    parts, counts = [texts.to(backgrounds)], [len(t.pseudo_boxes) for t in targets]
    place = torch.full((sum(counts),), len(texts), device=texts.device)
    if with_pseudo:
        own = torch.cat([t.pseudo_texts for t in targets]).to(backgrounds)
        of_ranks = counts_of_ranks(len(own), own.device)
        parts.append(gather_rows(own, of_ranks))
        first = len(texts) + sum(of_ranks[: rank()])
        place = torch.arange(first, first + len(own), device=texts.device)
    of_images = zip(targets, place.split(counts), strict=True)
    return torch.cat([*parts, backgrounds]), torch.cat([rows for t, own in of_images for rows in (t.labels, own)])


def box_weights(targets: Sequence[Targets], config: ClassLossConfig, pseudo: PseudoBoxConfig) -> Tensor:
    """Weights (B,) of the boxes of a batch: 1, or w_j for a pseudo box (0 without the level)."""
    counts, like = [len(t.pseudo_boxes) for t in targets], targets[0].boxes
    trust = like.new_zeros(sum(counts))
    if config.enabled and any(counts):  # for all images at once: on a CPU it is the number of operations that costs
        v, u = (torch.cat([getattr(t, name) for t in targets]) for name in ("pseudo_embeddings", "pseudo_texts"))
        trust = config.weight * classwise.reliability(v, u, *pseudo.reliability)
    of_images = zip(targets, trust.split(counts), strict=True)
    return torch.cat([rows for t, own in of_images for rows in (like.new_ones(len(t.boxes)), own)])
