"""A backbone of five convolutions, each with a batch norm: small enough to be compiled in a test."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

SETTINGS = (
    "detector.backbone.name=plain_backbone:plain",
    "detector.backbone.weights=none",
    "detector.backbone.norm=batch",
    "detector.backbone.frozen_stages=0",
)


class Plain(nn.Module):
    def __init__(self, levels: list[int]) -> None:
        super().__init__()
        widths = [3, *(4 * level for level in range(1, max(levels) + 1))]
        self.levels, self.channels = levels, [widths[level] for level in levels]
        self.steps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in pairwise(widths)
        )

    def forward(self, pictures: Tensor) -> list[Tensor]:
        maps = []
        for level, step in enumerate(self.steps, start=1):
            pictures = step(pictures)
            if level in self.levels:
                maps.append(pictures)
        return maps


def plain(levels: list[int]) -> nn.Module:
    return Plain(levels)
