"""One stage of AdaMixer: queries look at each other, sample the pyramid, mix what they found, and say what and where
they are.

arXiv 2203.16507, section 3; in adaptive mixing (3.3) channels, then points, are mixed by matrices made of the query
itself. Departures of HD-OVD's released code, which are followed here: the residual of self-attention keeps the
positional code; the class branch has no ReLU; a third branch says how likely there is any object. N pictures, Q queries
of each (M of a batch), C channels, G groups, P points in, O points out, D embedding size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdovd.config.detector import DecoderConfig
from hdovd.modeling.adamixer.boxes import SamplingTable, refine, sides, to_corners
from hdovd.modeling.queries.detector import RARE, QueryStage
from hdovd.modeling.queries.overlaps import covered


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
        points = self.points_of(content, xyzr)
        sampled = table.sample(points, self.groups).flatten(0, 1)
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
        out: Tensor = self.out_proj((shares.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return out


def positional_code(xyzr: Tensor, channels: int) -> Tensor:
    """Boxes (..., 4) -> (..., C): C / 4 channels for each of x, y, z, r, sines and cosines in turn (arXiv 1706.03762,
    section 3.5).
    """
    unit = torch.tensor([PICTURE, PICTURE, 1.0, 1.0], dtype=xyzr.dtype).to(xyzr.device, non_blocking=True)
    waves = channels // 8
    wavelength = 10000 ** (torch.arange(waves, device=xyzr.device, dtype=xyzr.dtype) / waves)
    phase = (xyzr / unit)[..., None] / wavelength
    return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(-3)
