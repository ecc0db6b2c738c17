"""The boxes of a training step, in the forms that its parts want: a list for the batch, and padded by picture for costs.

Called by `model`. N pictures, G boxes of the batch, picture by picture, base before pseudo; T columns: base boxes of a picture from
0 on, padded to the most of any picture, then pseudo boxes likewise; H objects of a picture, padded; D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hdovd.config.recipe import ClassLossConfig, PseudoBoxConfig
from hdovd.data.targets import Targets, with_large_pseudo_boxes
from hdovd.modeling.losses.classwise import reliability


@dataclass(frozen=True, slots=True)
class StepBoxes:
    """targets: an image each, with the pseudo boxes that are used. base, pseudo: how many boxes each picture has.

    boxes (G, 4), is_base (G,) bool; picture (G,) and column (G,) int64, its place among the padded (N, T); padded (N, T, 4).
    labels (G,) int64: the class, or -1 for a pseudo box. weights (G,): 1, or w_j for a pseudo box (0 without the class level).
    embeddings (G, D).
    objects (N, H, 4), is_object (N, H) bool, object_counts of each picture: what the proposals are trained on, base boxes and all
    pseudo boxes that are large enough.
    sizes (N, 2) height, width of each picture, pixels.
    """

    targets: list[Targets]
    base: list[int]
    pseudo: list[int]
    boxes: Tensor
    is_base: Tensor
    picture: Tensor
    column: Tensor
    padded: Tensor
    labels: Tensor
    weights: Tensor
    embeddings: Tensor
    objects: Tensor
    is_object: Tensor
    object_counts: list[int]
    sizes: Tensor

    @property
    def places(self) -> list[tuple[int, int]]:
        """The picture and the column of each of the G boxes."""
        return _places(self.base, self.pseudo)

    @property
    def base_on_host(self) -> NDArray[np.bool_]:
        """`is_base`, without waiting for the device."""
        return np.array([column < max(self.base) for _, column in self.places], dtype=bool)


def boxes_of_step(targets: Sequence[Targets], sizes: Sequence[tuple[int, int]], config: PseudoBoxConfig,
                  of_class: ClassLossConfig, *, with_pseudo: bool) -> StepBoxes:
    """Sort the boxes of a batch.

    Args:
        targets: at the detector's scale. sizes: (height, width) of each picture.
        with_pseudo: whether the stages see pseudo boxes; the proposals always do (released code: in every epoch, and all of them).
    """
    device = targets[0].boxes.device
    large = with_large_pseudo_boxes(targets, config.min_side)
    used = [t.with_first_pseudo_boxes(config.max_per_image if with_pseudo else 0) for t in large]
    base, pseudo = [len(t.boxes) for t in used], [len(t.pseudo_boxes) for t in used]
    picture, column = torch.tensor(_places(base, pseudo), dtype=torch.int64).reshape(-1, 2).to(device, non_blocking=True).unbind(1)
    padded = torch.cat([pad_sequence([t.boxes for t in used], batch_first=True),
                        pad_sequence([t.pseudo_boxes for t in used], batch_first=True)], dim=1)
    trust = padded.new_zeros(sum(pseudo))  # without the class level no pseudo box has a prompt, and its query's loss no weight
    if of_class.enabled and any(pseudo):
        trust = of_class.weight * reliability(torch.cat([t.pseudo_embeddings for t in used]), torch.cat([t.pseudo_texts for t in used]),
                                              *config.reliability)
    labels, weights = [], []
    for t, trusted in zip(used, trust.split(pseudo), strict=True):
        labels += [t.labels, t.labels.new_full(trusted.shape, -1)]
        weights += [padded.new_ones(len(t.boxes)), trusted]
    objects = pad_sequence([torch.cat([t.all_boxes, t.boxes.new_zeros(1, 4)]) for t in large], batch_first=True)  # never without a column
    counts = [len(t.all_boxes) for t in large]
    return StepBoxes(
        used, base, pseudo, torch.cat([t.all_boxes for t in used]), column < max(base), picture, column, padded, torch.cat(labels),
        torch.cat(weights), torch.cat([rows for t in used for rows in (t.embeddings, t.pseudo_embeddings)]), objects,
        torch.arange(objects.shape[1], device=device) < torch.tensor(counts).to(device, non_blocking=True)[:, None], counts,
        torch.tensor(sizes, dtype=padded.dtype).to(device, non_blocking=True))


def _places(base: list[int], pseudo: list[int]) -> list[tuple[int, int]]:
    start = max(base)
    return [(n, column) for n in range(len(base)) for column in (*range(base[n]), *range(start, start + pseudo[n]))]
