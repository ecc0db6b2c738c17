"""Boxes as AdaMixer moves them, (x, y, z, r), and features sampled at points of the pyramid.

A box of centre (x, y) and sides (w, h), in pixels of the padded batch, is x, y, z = log2(sqrt(w h)), r = log2(h / w)
(arXiv 2203.16507, section 3.1). Everything is float32, under autocast too.

Sampling (section 3.2) is bilinear in the picture, and a softmax between pyramid levels: a point takes 4 cells of each
of L levels, 4 L rows of one table, weighted: an embedding bag. That neither copies values a level nor asks for maps of
another layout, and its gradient is one pass over the rows. N pictures, C channels in G groups, Q queries, P points of
each in each group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def to_xyzr(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) xyxy of positive sides -> (..., 4) x, y, z, r."""
    low, high = boxes[..., :2], boxes[..., 2:]
    width, height = (high - low).unbind(-1)
    z, r = (width * height).sqrt().log2(), (height / width).log2()
    return torch.cat([(low + high) / 2, z[..., None], r[..., None]], dim=-1)


def sides(xyzr: Tensor) -> Tensor:
    """(..., 4) x, y, z, r -> (..., 2) width and height, pixels."""
    z, half = xyzr[..., 2], xyzr[..., 3] / 2
    return 2.0 ** torch.stack([z - half, z + half], dim=-1)


def to_corners(xyzr: Tensor) -> Tensor:
    """(..., 4) x, y, z, r -> (..., 4) xyxy."""
    half = sides(xyzr) / 2
    return torch.cat([xyzr[..., :2] - half, xyzr[..., :2] + half], dim=-1)


def refine(xyzr: Tensor, deltas: Tensor) -> Tensor:
    """Boxes moved by (..., 4) deltas: the centre by parts of 2^z, z and r by addition (arXiv 2203.16507, section
    3.1)."""
    return torch.cat([xyzr[..., :2] + deltas[..., :2] * 2.0 ** xyzr[..., 2:3], xyzr[..., 2:] + deltas[..., 2:]], dim=-1)


SOFTNESS = 2.0  # of the weights between levels, tau in arXiv 2203.16507, section 3.2


class SamplingTable:
    """The cells of a batch's pyramid as rows of a table, with a border of zeros around each map."""

    def __init__(self, maps: list[Tensor], strides: list[int]) -> None:
        """`maps`: (N, C, h, w) each. `strides`: pixels a cell, of each."""
        device = maps[0].device
        sizes = torch.stack(
            [torch._shape_as_tensor(m)[2:] for m in maps]
        )  # (L, 2) height, width; tensors, so that a trace keeps them
        wide = sizes + 2  # with the border
        bordered = [F.pad(m.float(), (1, 1, 1, 1)).permute(0, 2, 3, 1).flatten(1, 2) for m in maps]
        self.rows = torch.cat(bordered, dim=1).contiguous()  # (N, cells, C) float32
        cells = wide.prod(dim=1)
        self.strides = torch.tensor(strides, dtype=torch.float32).to(device, non_blocking=True)
        self.sizes = sizes.to(device, torch.float32, non_blocking=True)
        self.width = wide[:, 1].to(device, torch.int32, non_blocking=True)  # (L,)
        before = (cells.cumsum(0) - cells).to(device, torch.int32, non_blocking=True)
        self.first = before + self.width + 1  # of the cell in the upper left corner

    def sample(self, points: Tensor, groups: int) -> Tensor:
        """The values at points, of the group's own channels.

        Args:
            points: (N, Q, G, P, 3) x, y in pixels of the padded batch, and z, the logarithm (base 2) of the stride
            looked for. groups: G.

        Returns:
            (N, Q, G, P, C / G) float32. Outside of the maps there are zeros.
        """
        index, weight = self._cells(points.float())
        pictures, cells, channels = self.rows.shape
        picture = torch.arange(pictures, device=index.device, dtype=torch.int32).view(-1, 1, 1, 1, 1) * cells
        group = torch.arange(groups, device=index.device, dtype=torch.int32).view(-1, 1, 1)
        index = (index + picture) * groups + group  # a row of the table is a cell's channels of one group
        step = self.width * groups
        steps = torch.stack([torch.zeros_like(step), torch.full_like(step, groups), step, step + groups], dim=1)
        index = (
            index[..., None] + steps
        )  # (N, Q, G, P, L, 4): of 32 bits, which are sorted several times faster than 64
        table = self.rows.reshape(-1, channels // groups)
        index, weight = index.flatten(0, 3).flatten(1), weight.flatten(0, 3).flatten(1)
        if torch.onnx.is_in_onnx_export():  # whose embedding bag is a loop over the points
            taken = (table[index] * weight[..., None]).sum(dim=1)
        else:
            taken = F.embedding_bag(index, table, mode="sum", per_sample_weights=weight)
        return taken.view(*points.shape[:-1], channels // groups)

    def _cells(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The upper left of the four cells around each point, (..., L) int32, and the weights of the four, (..., L,
        4)."""
        across, down = (self._axis(points[..., axis], 1 - axis) for axis in (0, 1))
        index = down[0].int() * self.width + across[0].int() + self.first
        of_level = (-((points[..., 2:] - self.strides.log2()) ** 2) / SOFTNESS).softmax(dim=-1)
        lower = of_level * down[1]
        upper = of_level - lower
        right_up, right_low = upper * across[1], lower * across[1]
        return index, torch.stack([upper - right_up, right_up, lower - right_low, right_low], dim=-1)

    def _axis(self, place: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Whole cell and rest, (..., L) each, of a coordinate (...) in pixels; what lies outside ends up in the
        border."""
        last = self.sizes[:, side]
        cell = (place[..., None] / self.strides - 0.5).clamp(min=-1.0).minimum(last)
        whole = cell.detach().floor().minimum(last - 1)
        return whole, cell - whole
