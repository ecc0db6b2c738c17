"""One stage of AdaMixer: queries look at each other, sample the pyramid, mix what they found, and say what and where
they are (arXiv 2203.16507, section 3); with boxes as it moves them, and features sampled at points.

A box of centre (x, y) and sides (w, h), in pixels of the padded batch, is x, y, z = log2(sqrt(w h)), r = log2(h / w)
(3.1). Boxes and samples are float32, under autocast too. In adaptive mixing (3.3) channels, then points, are mixed by
matrices made of the query itself. Departures of HD-OVD's released code, which are followed here: the residual of
self-attention keeps the positional code; the class branch has no ReLU; a third branch says how likely there is any
object. N pictures, Q queries of each (M of a batch), C channels in G groups, P points of each in each group, O points
out, L levels, D embedding size.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdovd.config.detector import DecoderConfig
from hdovd.modeling.boxes import covered
from hdovd.modeling.queries.detector import RARE, QueryStage

# --- boxes, and features sampled at points ---


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
    """The cells of a batch's pyramid as rows of a table, with a border of zeros around each map.

    Sampling (section 3.2) is bilinear in the picture, and a softmax between pyramid levels: a point takes 4 cells of
    each of L levels, 4 L rows of the table, weighted: an embedding bag. That neither copies values a level nor asks for
    maps of another layout, and its gradient is one pass over the rows.
    """

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


# --- the stage ---


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
        return cast(Tensor, self.out(_normalised(values, self.out_points, self.width).view(-1, self.out.in_features)))


def _normalised(values: Tensor, points: int, width: int) -> Tensor:
    """LayerNorm over both, points and channels, without weights; then ReLU."""
    return F.layer_norm(values, (points, width)).relu_()


PICTURE = 1000.0  # pixels, the unit of x and y in the positional code; released code


class DecoderStage(QueryStage):
    """Attention, sampling with mixing, feed-forward; and the three branches, of which the class feature is read apart
    (`describe`).
    """

    def __init__(self, config: DecoderConfig, channels: int, dim: int) -> None:
        super().__init__()
        self.groups, self.points = config.groups, config.points
        self.attention = BoxAttention(channels, config.heads)
        self.attention_norm = nn.LayerNorm(channels)
        self.offsets = nn.Linear(channels, config.groups * config.points * 3)
        self.mixing = AdaptiveMixing(channels, config.groups, config.points, config.out_points)
        self.mixing_norm = nn.LayerNorm(channels)
        self.feedforward = nn.Sequential(
            nn.Linear(channels, config.feedforward), nn.ReLU(inplace=True), nn.Linear(config.feedforward, channels)
        )
        self.feedforward_norm = nn.LayerNorm(channels)
        self.class_feature = nn.Sequential(
            nn.Linear(channels, channels), nn.LayerNorm(channels), nn.Linear(channels, dim)
        )
        layers = [
            layer
            for _ in range(3)
            for layer in (nn.Linear(channels, channels), nn.LayerNorm(channels), nn.ReLU(inplace=True))
        ]
        self.deltas = nn.Sequential(*layers, nn.Linear(channels, 4))
        hidden = config.objectness_channels
        self.objectness = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, 1))
        self._initialise()

    def _initialise(self) -> None:
        """Xavier but where it says otherwise: boxes stay, points lie within half a side, one level finer than the
        box."""
        for part in (self.attention, self.feedforward, self.class_feature, self.deltas, self.objectness):
            for weight in part.parameters():
                if weight.dim() > 1:
                    nn.init.xavier_uniform_(weight)
        with torch.no_grad():
            for start in self.deltas[-1].parameters():
                start.zero_()
            self.objectness[-1].get_parameter("bias").fill_(RARE)
            self.offsets.weight.zero_()
            points = self.offsets.bias.view(-1, 3)
            points[:, :2].uniform_(-0.5, 0.5)
            points[:, 2] = -1.0

    def forward(self, table: SamplingTable, content: Tensor, xyzr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Refine queries of content (N, Q, C) and boxes (N, Q, 4) xyzr: the new content, the new xyzr, and the deltas
        between.
        """
        content = content + positional_code(xyzr, content.shape[-1])
        content = self.attention_norm(content + self.attention(content, (covered(to_corners(xyzr)) + 1e-7).log()))
        sampled = table.sample(self.points_of(content, xyzr), self.groups).flatten(0, 1)
        content = self.mixing_norm(content + self.mixing(sampled, content.flatten(0, 1)).view_as(content))
        content = self.feedforward_norm(content + self.feedforward(content))
        deltas = self.deltas(content).float()
        return content, refine(xyzr, deltas), deltas

    def points_of(self, content: Tensor, xyzr: Tensor) -> Tensor:
        """Where queries sample: (N, Q, G, P, 3) x, y, z, offsets from the box in its sides and in levels (section
        3.2)."""
        offsets: Tensor = self.offsets(content).float().unflatten(-1, (self.groups, self.points, 3))
        unit = torch.cat([sides(xyzr), torch.ones_like(xyzr[..., :1])], dim=-1)
        return xyzr[..., None, None, :3] + offsets * unit[..., None, None, :]


class BoxAttention(nn.Module):
    """Self-attention of queries, biased by how much of the one's box the other's covers (section 3.4: IoF), a learned
    amount a head.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(channels, 3 * channels)
        self.out_proj = nn.Linear(channels, channels)
        self.iof_tau = nn.Parameter(torch.rand(heads) * 4)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, queries: Tensor, log_iof: Tensor) -> Tensor:
        """(N, Q, C), with (N, Q, Q) logarithms of the covered shares -> (N, Q, C)."""
        q, k, v = self.in_proj(queries).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        shares = torch.addcmul(logits.float(), log_iof[:, None], self.iof_tau.view(-1, 1, 1)).softmax(dim=-1)
        return cast(Tensor, self.out_proj((shares.to(v.dtype) @ v).transpose(1, 2).flatten(2)))


def positional_code(xyzr: Tensor, channels: int) -> Tensor:
    """Boxes (..., 4) -> (..., C): C / 4 channels for each of x, y, z, r, sines and cosines in turn (arXiv 1706.03762,
    section 3.5).
    """
    unit = torch.tensor([PICTURE, PICTURE, 1.0, 1.0], dtype=xyzr.dtype).to(xyzr.device, non_blocking=True)
    waves = channels // 8
    wavelength = 10000 ** (torch.arange(waves, device=xyzr.device, dtype=xyzr.dtype) / waves)
    phase = (xyzr / unit)[..., None] / wavelength
    return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(-3)
