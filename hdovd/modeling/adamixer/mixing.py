"""Adaptive mixing (arXiv 2203.16507, section 3.3): channels, then points, are mixed by matrices made of the query
itself.

M queries of a batch, C channels in G groups, P points in, O points out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AdaptiveMixing(nn.Module):
    def __init__(self, channels: int, groups: int, points: int, out_points: int) -> None:
        super().__init__()
        self.groups, self.points, self.out_points, self.width = groups, points, out_points, channels // groups
        self.parameters_of = nn.Linear(channels, groups * (self.width**2 + points * out_points))
        self.out = nn.Linear(channels * out_points, channels)
        nn.init.zeros_(self.parameters_of.weight)  # at the start all queries mix alike; the bias is random
        nn.init.xavier_uniform_(self.out.weight)

    def forward(self, sampled: Tensor, content: Tensor) -> Tensor:
        """What sampled values (M, G, P, C / G) say to queries of content (M, C): (M, C)."""
        made = self.parameters_of(content).view(-1, self.width**2 + self.points * self.out_points)
        of_channels, of_points = made.split([self.width**2, self.points * self.out_points], dim=1)
        values = torch.bmm(sampled.flatten(0, 1).to(made.dtype), of_channels.unflatten(1, (self.width, self.width)))
        values = torch.bmm(
            of_points.unflatten(1, (self.out_points, self.points)), _normalised(values, self.points, self.width)
        )
        mixed: Tensor = self.out(_normalised(values, self.out_points, self.width).view(-1, self.out.in_features))
        return mixed


def _normalised(values: Tensor, points: int, width: int) -> Tensor:
    """LayerNorm over both, points and channels, without weights; then ReLU."""
    return F.layer_norm(values, (points, width)).relu_()
