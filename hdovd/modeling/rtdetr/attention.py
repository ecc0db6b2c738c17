"""Attention of queries to each other, and to points of the pyramid (arXiv 2010.04159, section 4.1).

Softmax and sampling places are float32, under autocast too. Points are sampled by `grid_sample`: there is no operator
that a runtime would lack. N pictures, Q queries, C channels in H heads, L levels, P points of a head at each level, G
points of a grid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention; queries and keys are made of contents with their positions, values of contents alone."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries_and_keys, self.values = nn.Linear(channels, 2 * channels), nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        initialise(self)

    def forward(self, content: Tensor, position: Tensor, bias: Tensor) -> Tensor:
        """(N, Q, C) twice -> (N, Q, C). `bias`: (N, H or 1, Q or 1, Q), added to logits: -inf where a row looks not."""
        placed = self.queries_and_keys(content + position).unflatten(-1, (2, self.heads, -1))
        q, k = placed.permute(2, 0, 3, 1, 4).unbind(0)
        v = self.values(content).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        logits = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).float() + bias
        out: Tensor = self.out((logits.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return out


class DeformableAttention(nn.Module):
    """Each head of a query looks at P points of each level, around the query's box, and weighs them."""

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(channels, heads * levels * points * 2)
        self.weights = nn.Linear(channels, heads * levels * points)
        self.values = nn.Conv2d(channels, channels, 1)
        self.out = nn.Linear(channels, channels)
        initialise(self)
        self._spread()

    @torch.no_grad()
    def _spread(self) -> None:
        """At the start heads look into directions all around, point by point farther, with equal weights."""
        for start in (self.offsets.weight, self.weights.weight):
            start.zero_()
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)[:, None]
        self.offsets.bias.view(self.heads, self.levels, self.points, 2).copy_(direction[:, None, None] * steps)

    def forward(self, content: Tensor, boxes: Tensor, maps: list[Tensor], inside: list[Tensor]) -> Tensor:
        """What queries see, (N, Q, C).

        Args:
            content: (N, Q, C), with positions. boxes: (N, Q, 4) centre and sides, in sides of the padded batch.
            maps: (N, C, h, w) each. inside: (N, h, w) bool each, the cells that count; the others hold zeros.
        """
        heads, points = self.heads, self.points
        offsets = self.offsets(content).float().unflatten(-1, (heads, self.levels, points, 2)) / points
        boxes = boxes[:, :, None, None, None]
        grid = 2 * (boxes[..., :2] + offsets * boxes[..., 2:] / 2) - 1
        grid = grid.permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, N H, Q, P, 2)
        weights = self.weights(content).float().unflatten(-1, (heads, -1)).softmax(dim=-1)
        weights = weights.transpose(1, 2).flatten(0, 1)  # (N H, Q, L P)
        sampled = []
        for level, (pixels, within) in enumerate(zip(maps, inside, strict=True)):
            values = self.values(pixels).float() * within[:, None]
            values = values.unflatten(1, (heads, -1)).flatten(0, 1)
            sampled.append(F.grid_sample(values, grid[level], align_corners=False))  # (N H, C / H, Q, P)
        found = (torch.cat(sampled, dim=-1) * weights[:, None]).sum(dim=-1)
        out: Tensor = self.out(found.unflatten(0, (-1, heads)).flatten(1, 2).transpose(1, 2))
        return out


class GridSampling(nn.Module):
    """What lies at the points of a grid within a query's box, summed over levels; each point has weights of its own,
    so that the query knows what lies where, which a weighted mean of points does not tell.
    """

    def __init__(self, channels: int, levels: int, side: int) -> None:
        super().__init__()
        width = channels // 2
        steps = (torch.arange(side) + 0.5) / side - 0.5
        self.places: Tensor  # (G, 2) from the box's centre, in its sides
        self.register_buffer("places", torch.cartesian_prod(steps, steps).flip(1), persistent=False)
        self.values = nn.ModuleList(nn.Conv2d(channels, width, 1) for _ in range(levels))
        self.out = feed_forward(width * side**2, channels, nn.ReLU, channels)
        initialise(self)

    def forward(self, boxes: Tensor, maps: list[Tensor], inside: list[Tensor]) -> Tensor:
        """(N, Q, C). Arguments are as those of `DeformableAttention`."""
        grid = 2 * (boxes[:, :, None, :2] + self.places * boxes[:, :, None, 2:]) - 1
        found = torch.zeros((), device=boxes.device)
        for values, pixels, within in zip(self.values, maps, inside, strict=True):
            level = values(pixels).float() * within[:, None]
            found = found + F.grid_sample(level, grid, align_corners=False)  # (N, C / 2, Q, G)
        out: Tensor = self.out(found.permute(0, 2, 3, 1).flatten(2))
        return out


def feed_forward(channels: int, hidden: int, activation: type[nn.Module], out: int | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, hidden), activation(), nn.Linear(hidden, out or channels))


def initialise(module: nn.Module) -> None:
    """Xavier for weights, zero for biases; norms as they are."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
