"""The hybrid encoder (arXiv 2304.08069, section 4.2): attention within the coarsest level, convolutions between levels.

Every convolution has a norm over groups of channels of the cells within the picture, where the paper has batch norms:
what is found in a picture depends neither on what another picture shows nor on its size. N pictures, C channels, Q
queries, H heads; `inside`: (N, h, w) bool, the cells of a level that lie in a picture.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdovd.config.detector import GROUPS_OF_NORM, HybridEncoderConfig

TINY = 1e-5  # added to variances; as torch's GroupNorm


class PictureNorm(nn.Module):
    """GroupNorm (arXiv 1803.08494) whose means and variances are those of the cells within the picture; float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = min(GROUPS_OF_NORM, channels // 2)  # one channel of one cell has no norm
        self.of_group = channels // self.groups
        self.weight, self.bias = (nn.Parameter(start(channels)) for start in (torch.ones, torch.zeros))

    def forward(self, pixels: Tensor, inside: Tensor) -> Tensor:
        """(N, C, h, w) -> the same; what is outside is as much moved and scaled as what is inside."""
        with torch.autocast(pixels.device.type, enabled=False):
            pixels = pixels.float()
            cells = inside.flatten(1)[..., None].to(pixels.dtype)
            mean = self._means(pixels, cells)
            variance = self._means((pixels - mean[..., None, None]).square(), cells)
            scale = self.weight / (variance + TINY).sqrt()  # onnxruntime 1.32 cannot multiply it by a quotient
            shift = self.bias - mean * scale
            moved: Tensor = pixels * scale[..., None, None] + shift[..., None, None]
        return moved

    def _means(self, pixels: Tensor, cells: Tensor) -> Tensor:
        """(N, C): of each channel the mean of its group over cells (N, h w, 1) that are 1."""
        of_channel = (pixels.flatten(2) @ cells)[..., 0] / cells.sum(dim=1)
        of_group = of_channel.view(-1, self.groups, self.of_group).mean(dim=2, keepdim=True)
        return of_group.expand(-1, -1, self.of_group).flatten(1)


class Convolution(nn.Module):
    """A convolution, its norm and, if it is activated, a SiLU. Beside the picture it sees zeros, as beyond the
    edge."""

    def __init__(self, inner: int, out: int, size: int = 1, stride: int = 1, *, activated: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inner, out, size, stride, padding=size // 2, bias=False)
        self.norm = PictureNorm(out)
        self.activated = activated

    def forward(self, pixels: Tensor, inside: Tensor) -> Tensor:
        """(N, inner, h, w) -> (N, out, h / stride, w / stride)."""
        size, stride = self.conv.kernel_size[0], self.conv.stride[0]
        seen = pixels * inside[:, None].to(pixels.dtype) if size > 1 else pixels
        moved: Tensor = self.norm(self.conv(seen), inside[:, ::stride, ::stride])
        return F.silu(moved) if self.activated else moved


class Fusion(nn.Module):
    """Two maps (N, C, h, w) to one: a row of 3 x 3 convolutions beside a 1 x 1 one (cross stage partial, arXiv
    1911.11929; the paper's blocks without what is folded away after training).
    """

    def __init__(self, channels: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.deep = nn.ModuleList(
            Convolution(hidden if block else 2 * channels, hidden, 3 if block else 1) for block in range(blocks + 1)
        )
        self.flat, self.out = Convolution(2 * channels, hidden), Convolution(hidden, channels)

    def forward(self, one: Tensor, two: Tensor, inside: Tensor) -> Tensor:
        both = deep = torch.cat([one, two], dim=1)
        for block in self.deep:
            deep = block(deep, inside)
        return cast(Tensor, self.out(deep + self.flat(both, inside), inside))


class Attention(nn.Module):
    """Self-attention; queries and keys are made of contents with their positions, values of contents alone. The softmax
    is float32, under autocast too.
    """

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
        return cast(Tensor, self.out((logits.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)))


class LevelAttention(nn.Module):
    """A transformer's encoder layer over the cells of a level."""

    def __init__(self, channels: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(channels, heads), nn.LayerNorm(channels)
        self.feedforward = feed_forward(channels, feedforward, nn.GELU)
        self.feedforward_norm = nn.LayerNorm(channels)
        initialise(self.feedforward)

    def forward(self, pixels: Tensor, inside: Tensor) -> Tensor:
        """(N, C, h, w) -> the same. No cell outside is looked at."""
        cells = pixels.flatten(2).transpose(1, 2)
        position = cell_positions(pixels)
        bias = torch.where(inside.flatten(1)[:, None, None], 0.0, -torch.inf)
        cells = self.attention_norm(cells + self.attention(cells, position, bias))
        cells = self.feedforward_norm(cells + self.feedforward(cells))
        return cast(Tensor, cells.transpose(1, 2).unflatten(2, pixels.shape[-2:]))


class HybridEncoder(nn.Module):
    """Maps of the backbone to maps of C channels, fine to coarse: down the pyramid, then up again."""

    def __init__(self, config: HybridEncoderConfig, inputs: list[int], channels: int) -> None:
        super().__init__()
        steps = len(inputs) - 1
        self.project = nn.ModuleList(Convolution(width, channels, activated=False) for width in inputs)
        self.coarsest = LevelAttention(channels, config.heads, config.feedforward)
        self.lateral = nn.ModuleList(Convolution(channels, channels) for _ in range(steps))
        self.downward = nn.ModuleList(Convolution(channels, channels, 3, 2) for _ in range(steps))
        self.finer, self.coarser = (
            nn.ModuleList(Fusion(channels, config.hidden, config.blocks) for _ in range(steps)) for _ in range(2)
        )

    def forward(self, maps: list[Tensor], inside: Sequence[Tensor]) -> list[Tensor]:
        """`maps`: (N, width, h, w) each, with `inside` of each."""
        projected = [project(m, i) for project, m, i in zip(self.project, maps, inside, strict=True)]
        found = [self.coarsest(projected[-1], inside[-1])]
        for level, (lateral, fuse) in enumerate(zip(self.lateral, self.finer, strict=True)):
            fine = len(maps) - 2 - level
            found[0] = lateral(found[0], inside[fine + 1])
            wider = F.interpolate(found[0], scale_factor=2.0, mode="nearest")
            found.insert(0, fuse(wider, projected[fine], inside[fine]))
        out = found[:1]
        for level, (downward, fuse) in enumerate(zip(self.downward, self.coarser, strict=True)):
            coarse = level + 1
            out.append(fuse(downward(out[-1], inside[level]), found[coarse], inside[coarse]))
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


def feed_forward(channels: int, hidden: int, activation: type[nn.Module], out: int | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, hidden), activation(), nn.Linear(hidden, out or channels))


def initialise(module: nn.Module) -> None:
    """Xavier for weights, zero for biases; norms as they are."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
