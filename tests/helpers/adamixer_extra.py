"""A loss of a recipe's own, for test_adamixer.py."""

import torch
from torch import Tensor, nn

from hdovd.modeling.base import StepContext


class Seen(nn.Module):
    """How far classification and distillation feature of paired queries are apart; and the view's shapes are as it
    says.
    """

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.shape = (dim, channels)

    def forward(self, view: StepContext) -> Tensor:
        positive = view.box_of_roi >= 0
        boxes = sum(len(t.all_boxes) for t in view.targets)
        assert view.c.shape == (len(view.box_of_roi), self.shape[0])
        assert [len(rois) for rois in view.rois] == [len(view.deltas) // 2] * 2
        assert sorted(view.box_of_roi[positive].tolist()) == list(range(boxes))
        assert view.features["5"].shape[1] == self.shape[1]
        return (view.c[positive] - torch.nn.functional.normalize(view.d, dim=1)).square().mean()
