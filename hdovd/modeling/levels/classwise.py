"""Level 2 as a part of the detector: the classifier's prompts, and the labels and weights of RoIs (METHOD section 5).

R RoIs, B boxes and P pseudo boxes of this process, A pseudo boxes of all processes, K base classes, D embedding size.
Prompts are [t_1..t_K; u_1..u_A; bg]. The level keeps nothing between steps: the background embedding is the detector's
own, which needs it without this level too.
"""

import torch
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
        texts, first = [view.texts], len(view.texts)
        if self.config.enabled:
            own = torch.cat([t.pseudo_texts for t in view.targets])
            counts = counts_of_ranks(len(own), own.device)
            texts.append(gather_rows(own, counts))
            first += sum(counts[: rank()])
        prompts = torch.cat([*texts, backgrounds])
        background = len(prompts) - len(backgrounds)
        labels, weights = self.labels_and_weights(view.box_of_roi, view.targets, first, background)
        logits = classwise.cosine_logits(view.c, prompts, self.logit_scale)
        logits = classwise.with_one_background(logits, len(backgrounds))
        if self.config.federated:
            rois = torch.tensor([len(part) for part in view.rois])
            image = torch.arange(len(rois)).repeat_interleave(rois).to(logits.device, non_blocking=True)
            logits = classwise.of_judged(logits, [t.judged for t in view.targets], image, labels == background)
        return {"classification": classwise.classification_loss(logits, labels, weights, divisor((weights > 0).sum()))}

    def labels_and_weights(
        self, box_of_roi: Tensor, targets: list[Targets], first: int, background: int
    ) -> tuple[Tensor, Tensor]:
        """The prompt that every RoI should be found by, and its weight.

        Without the level a RoI of a pseudo box has no prompt of its own: the background's label, and weight 0.

        Args:
            box_of_roi: (R,) box in 0..B-1, or -1. first: place of this process's first pseudo text among the prompts.
            background: place of the background.

        Returns:
            labels (R,) int64, weights (R,).
        """
        device = box_of_roi.device
        counts = [len(t.pseudo_boxes) for t in targets]
        trust, own = torch.zeros(sum(counts), device=device), torch.full((sum(counts),), background, device=device)
        if self.config.enabled:  # for all images at once: on a CPU it is the number of operations that costs
            trust = self.config.weight * classwise.reliability(
                torch.cat([t.pseudo_embeddings for t in targets]),
                torch.cat([t.pseudo_texts for t in targets]),
                *self.pseudo.reliability,
            )
            own = torch.arange(first, first + len(trust), device=device)
        last = torch.full((1,), background, device=device)  # row -1 serves background
        of_images = list(zip(targets, own.split(counts), trust.split(counts), strict=True))
        labels = [rows for t, of_pseudo, _ in of_images for rows in (t.labels, of_pseudo)]
        weights = [rows for t, _, trusted in of_images for rows in (trust.new_ones(len(t.boxes)), trusted)]
        return torch.cat([*labels, last])[box_of_roi], torch.cat([*weights, trust.new_ones(1)])[box_of_roi]
