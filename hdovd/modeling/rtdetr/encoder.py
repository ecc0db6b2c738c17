"""The hybrid encoder (arXiv 2304.08069, section 4.2): attention within the coarsest level, convolutions between levels.

Every convolution has a GroupNorm, where the paper has batch norms: what is found in a picture depends on what no other
picture shows. It does depend on the padding, which the norms count, and so on the largest size in the batch. N
pictures, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdovd.config.queries import GROUPS_OF_NORM
from hdovd.config.rtdetr import HybridEncoderConfig
from hdovd.modeling.rtdetr.attention import Attention, feed_forward, initialise


def conv(inner: int, out: int, size: int = 1, stride: int = 1, *, activated: bool = True) -> nn.Sequential:
    """A convolution, its norm and, if it is activated, a SiLU."""
    parts: list[nn.Module] = [
        nn.Conv2d(inner, out, size, stride, padding=size // 2, bias=False),
        nn.GroupNorm(min(GROUPS_OF_NORM, out // 2), out),  # of a map of one cell a group of one channel has no norm
    ]
    return nn.Sequential(*parts, *([nn.SiLU(inplace=True)] if activated else []))


class Fusion(nn.Module):
    """Two maps (N, C, h, w) to one: a row of 3 x 3 convolutions beside a 1 x 1 one (cross stage partial, arXiv
    1911.11929; the paper's blocks without what is folded away after training).
    """

    def __init__(self, channels: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.deep = nn.Sequential(conv(2 * channels, hidden), *(conv(hidden, hidden, 3) for _ in range(blocks)))
        self.flat, self.out = conv(2 * channels, hidden), conv(hidden, channels)

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        both = torch.cat([one, two], dim=1)
        fused: Tensor = self.out(self.deep(both) + self.flat(both))
        return fused


class LevelAttention(nn.Module):
    """A transformer's encoder layer over the cells of a level."""

    def __init__(self, channels: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(channels, heads), nn.LayerNorm(channels)
        self.feedforward = feed_forward(channels, feedforward, nn.GELU)
        self.feedforward_norm = nn.LayerNorm(channels)
        initialise(self.feedforward)

    def forward(self, pixels: Tensor, inside: Tensor) -> Tensor:
        """(N, C, h, w) -> the same. `inside`: (N, h, w) bool, the cells that are looked at."""
        cells = pixels.flatten(2).transpose(1, 2)
        position = cell_positions(pixels)
        bias = torch.where(inside.flatten(1)[:, None, None], 0.0, -torch.inf)
        cells = self.attention_norm(cells + self.attention(cells, position, bias))
        cells = self.feedforward_norm(cells + self.feedforward(cells))
        out: Tensor = cells.transpose(1, 2).unflatten(2, pixels.shape[-2:])
        return out


class HybridEncoder(nn.Module):
    """Maps of the backbone to maps of C channels, fine to coarse: down the pyramid, then up again."""

    def __init__(self, config: HybridEncoderConfig, inputs: list[int], channels: int) -> None:
        super().__init__()
        steps = len(inputs) - 1
        self.project = nn.ModuleList(conv(width, channels, activated=False) for width in inputs)
        self.coarsest = LevelAttention(channels, config.heads, config.feedforward)
        self.lateral = nn.ModuleList(conv(channels, channels) for _ in range(steps))
        self.downward = nn.ModuleList(conv(channels, channels, 3, 2) for _ in range(steps))
        self.finer, self.coarser = (
            nn.ModuleList(Fusion(channels, config.hidden, config.blocks) for _ in range(steps)) for _ in range(2)
        )

    def forward(self, maps: list[Tensor], inside: Tensor) -> list[Tensor]:
        """`maps`: (N, width, h, w) each. `inside`: (N, h, w) bool, the cells of the coarsest level that lie in a
        picture."""
        projected = [project(pixels) for project, pixels in zip(self.project, maps, strict=True)]
        found = [self.coarsest(projected[-1], inside)]
        for lateral, fuse, pixels in zip(self.lateral, self.finer, projected[-2::-1], strict=True):
            found[0] = lateral(found[0])
            found.insert(0, fuse(F.interpolate(found[0], scale_factor=2.0, mode="nearest"), pixels))
        out = found[:1]
        for downward, fuse, pixels in zip(self.downward, self.coarser, found[1:], strict=True):
            out.append(fuse(downward(out[-1]), pixels))
        return out


def cell_positions(pixels: Tensor) -> Tensor:
    """(h w, C) sines and cosines of the columns and rows of maps (N, C, h, w), a quarter of C each (arXiv 1706.03762,
    section 3.5)."""
    waves = pixels.shape[1] // 4
    wavelength = 10000 ** (torch.arange(waves, device=pixels.device, dtype=torch.float32) / waves)
    down, across = (
        torch.arange(side, device=pixels.device, dtype=torch.float32)[:, None] / wavelength
        for side in pixels.shape[-2:]
    )
    y, x = (torch.cat([phase.sin(), phase.cos()], dim=1) for phase in (down, across))
    rows, columns = y[:, None] + torch.zeros_like(x)[None], torch.zeros_like(y)[:, None] + x[None]
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)
