"""Which cells of the encoder become queries, and the stages that refine them (arXiv 2304.08069, sections 4.3 and 4.4).

A box is (x, y, w, h), centre and sides, in sides of its own picture, and kept as its logit, to which stages add. All of
it is float32, under autocast too, and so are the places where attention to the pyramid (arXiv 2010.04159, section 4.1)
samples: by `grid_sample`, since there is no operator then that a runtime would lack. Cells of the padding are never
looked at, nor chosen while there are others. N pictures, Q queries of each and M more of the denoising, A cells of all
levels, C channels in H heads, L levels, P points of a head at each level, G points of a grid, D embedding size.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdovd.config.detector import RTDETRConfig
from hdovd.modeling.boxes import best_places, covered
from hdovd.modeling.queries.detector import RARE, ForwardOutput, QueryStage
from hdovd.modeling.queries.pairs import Candidates
from hdovd.modeling.rtdetr.encoder import Attention, HybridEncoder, feed_forward, initialise

SOME = 1e-7  # added to a covered share before its logarithm is taken; as AdaMixer
LEAST = 1e-4  # of a side of the picture, and 1 less it the most, before a logit is taken
ANCHOR = 0.05  # sides of the picture: of a box that a cell of stride 8 starts from; doubles with the stride; config
OBJECT_SCALE = 20.0  # of the cosine with the text of "object" at the start; METHOD section 7 has it for s2


@dataclass(frozen=True, slots=True)
class Extra:
    """Queries beside the chosen ones: content (N, M, C), logits (N, M, 4) of their boxes; seen (N, Q + M, Q + M) bool,
    which queries each query looks at, chosen ones first.
    """

    content: Tensor
    logits: Tensor
    seen: Tensor


class Selection(nn.Module):
    """A cell is as good a query as it is like the text of "object", which is brought to its C channels: there are many
    cells, and one text.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.token = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels))
        self.text = nn.Linear(dim, channels)
        self.deltas = box_branch(channels)
        for part in (self.token, self.text):
            initialise(part)
        self.object_scale = nn.Parameter(torch.full((1,), OBJECT_SCALE))
        self.object_bias = nn.Parameter(torch.full((1,), RARE))

    def forward(
        self, cells: Tensor, anchors: Tensor, inside: Tensor, object_text: Tensor, queries: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best cells: contents (N, Q, C), logits of boxes (N, Q, 4), probabilities of an object (N, Q), and whether
        they lie in the picture (N, Q) bool.

        Args:
            cells: (N, A, C). anchors: (N, A, 4) logits. inside: (N, A) bool. object_text: (D,).
        """
        token = self.token(cells)
        text = F.normalize(self.text(object_text).float(), dim=0)
        with torch.autocast(cells.device.type, enabled=False):  # rounded, thousands of cells would be alike
            aligned = F.normalize(token.float(), dim=-1) @ text
        probability = torch.sigmoid(self.object_scale * aligned + self.object_bias)
        chosen = best_places(torch.where(inside, probability, probability.detach() - 1), queries)
        content = _taken(token, chosen)
        logits = _taken(anchors, chosen) + self.deltas(content).float()
        return content, logits, probability.gather(1, chosen), inside.gather(1, chosen)


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
        return cast(Tensor, self.out(found.unflatten(0, (-1, heads)).flatten(1, 2).transpose(1, 2)))


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
        return cast(Tensor, self.out(found.permute(0, 2, 3, 1).flatten(2)))


class Stage(QueryStage):
    """Attention between queries, to points of the pyramid, feed-forward; and the three branches.

    Attention between queries is biased by how much of the one's box the other's covers, a learned amount a head
    (arXiv 2203.16507, section 3.4): queries on one object have to agree which of them is sure of it.
    """

    def __init__(self, config: RTDETRConfig, dim: int) -> None:
        super().__init__()
        channels, decoder = config.backbone.fpn_channels, config.decoder
        self.attention, self.attention_norm = Attention(channels, decoder.heads), nn.LayerNorm(channels)
        self.sampling = DeformableAttention(channels, decoder.heads, len(config.backbone.levels), decoder.points)
        self.grid = GridSampling(channels, len(config.backbone.levels), decoder.grid) if decoder.grid else None
        self.sampling_norm = nn.LayerNorm(channels)
        self.feedforward = feed_forward(channels, decoder.feedforward, nn.ReLU)
        self.feedforward_norm = nn.LayerNorm(channels)
        self.class_feature = nn.Sequential(
            nn.Linear(channels, channels), nn.LayerNorm(channels), nn.Linear(channels, dim)
        )
        self.objectness = nn.Sequential(nn.Linear(channels, 1))
        for part in (self.feedforward, self.class_feature, self.objectness):
            initialise(part)
        nn.init.constant_(self.objectness[0].get_parameter("bias"), RARE)
        self.deltas = box_branch(channels)
        self.iof_tau = nn.Parameter(torch.rand(decoder.heads) * 4)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        nearness: Tensor,
        boxes: Tensor,
        maps: list[Tensor],
        inside: list[Tensor],
        seen: Tensor | None,
    ) -> Tensor:
        """Contents and positions (N, Q, C) -> new contents.

        Args:
            nearness: (N, Q, Q) logarithms of the share of the one's box that the other's covers. seen: (N, Q, Q) bool,
            whom the one looks at; None: all. The rest is as `DeformableAttention` takes it.
        """
        bias = nearness[:, None] * self.iof_tau.view(-1, 1, 1)
        if seen is not None:
            bias = bias.masked_fill(~seen[:, None], -torch.inf)
        content = self.attention_norm(content + self.attention(content, position, bias))
        sampled = self.sampling(content + position, boxes, maps, inside)
        if self.grid is not None:
            sampled = sampled + self.grid(boxes, maps, inside)
        content = self.sampling_norm(content + sampled)
        return cast(Tensor, self.feedforward_norm(content + self.feedforward(content)))


class Network(nn.Module):
    """All behind the backbone that detection needs."""

    def __init__(self, config: RTDETRConfig, inputs: list[int], dim: int) -> None:
        """`inputs`: channels of the backbone's maps."""
        super().__init__()
        channels = config.backbone.fpn_channels
        self.queries, self.strides = config.decoder.queries, [2**level for level in config.backbone.levels]
        self.encoder = HybridEncoder(config.encoder, inputs, channels)
        self.selection = Selection(channels, dim)
        self.position = nn.Sequential(nn.Linear(4, 2 * channels), nn.ReLU(), nn.Linear(2 * channels, channels))
        initialise(self.position)
        self.stages = nn.ModuleList(Stage(config, dim) for _ in range(config.decoder.stages))

    def forward(
        self, levels: dict[str, Tensor], sizes: Tensor, whole: Tensor, object_text: Tensor, extra: Extra | None = None
    ) -> ForwardOutput:
        """Refine queries: features of the encoder; contents (N, Q + M, C) and boxes (N, Q + M, 4) after each stage;
        deltas (N, Q, 4) that the last stage added to logits.

        Args:
            levels: (N, width, h, w) of the backbone, by level name. sizes: (N, 2) height and width of each picture.
            whole: (2,) those of the padded batch. object_text: (D,) the embedding of "object".
        """
        maps = list(levels.values())
        inside, anchors = zip(*(cells_of(m, s, sizes) for m, s in zip(maps, self.strides, strict=True)), strict=True)
        maps = self.encoder(maps, inside)
        content, logits, probability, within = self.selection(
            torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1),
            torch.cat(anchors, dim=1),
            torch.cat([cells.flatten(1) for cells in inside], dim=1),
            object_text,
            self.queries,
        )
        chosen, content, logits, seen = logits, content.detach(), logits.detach(), None
        if extra is not None:
            content, seen = torch.cat([content, extra.content.to(content.dtype)], dim=1), extra.seen
            logits = torch.cat([logits, extra.logits], dim=1)
        scale = (sizes / whole).flip(-1).repeat(1, 2)[:, None]
        contents, boxes, before = [], [], logits
        for stage in self.stages:
            assert isinstance(stage, Stage)
            place = logits.sigmoid()
            nearness = (covered(to_pixels(place, sizes)) + SOME).log()
            content = stage(content, self.position(place), nearness, place * scale, maps, inside, seen)
            deltas = stage.deltas(content).float()
            contents.append(content)
            boxes.append(to_pixels((before + deltas).sigmoid(), sizes))  # a stage's boxes teach the stage before too
            before = logits + deltas  # (arXiv 2203.03605, section 3.5)
            logits = before.detach()
        candidates = Candidates(probability, to_pixels(chosen.sigmoid(), sizes), within)
        features = dict(zip(levels, maps, strict=True))
        return ForwardOutput(features, candidates, contents, boxes, deltas[:, : chosen.shape[1]])


def box_branch(channels: int) -> nn.Sequential:
    """What is to be added to a box's logits: nothing at the start."""
    layers = [part for _ in range(2) for part in (nn.Linear(channels, channels), nn.ReLU())]
    branch = nn.Sequential(*layers, nn.Linear(channels, 4))
    initialise(branch)
    nn.init.zeros_(branch[-1].get_parameter("weight"))
    return branch


def cells_of(pixels: Tensor, stride: int, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Of the cells of maps (N, C, h, w): which begin within the picture (N, h, w) bool, and the logits (N, h w, 4) of
    the boxes that they start from.
    """
    down, across = (
        torch.arange(side, device=pixels.device, dtype=torch.float32) * stride for side in pixels.shape[-2:]
    )
    inside = (down < sizes[:, :1])[:, :, None] & (across < sizes[:, 1:])[:, None]
    y, x = ((line + stride / 2) / sizes[:, axis : axis + 1] for axis, line in enumerate((down, across)))
    centres = torch.stack([x[:, None] + 0 * y[:, :, None], y[:, :, None] + 0 * x[:, None]], dim=-1)
    sides = torch.full_like(centres, ANCHOR * stride / 8)
    return inside, logit(torch.cat([centres, sides], dim=-1).flatten(1, 2))


def logit(share: Tensor) -> Tensor:
    share = share.clamp(LEAST, 1 - LEAST)
    return (share / (1 - share)).log()


def to_pixels(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (N, Q, 4) in sides of pictures of sizes (N, 2) -> xyxy pixels."""
    half = boxes[..., 2:] / 2
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], dim=-1) * sizes.flip(-1).repeat(1, 2)[:, None]


def to_shares(boxes: Tensor, sizes: Tensor) -> Tensor:
    """The inverse of `to_pixels`, of boxes (..., 4) and sizes (..., 2)."""
    low, high = (boxes / sizes.flip(-1).repeat_interleave(1, -1).tile(2)).split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def _taken(rows: Tensor, places: Tensor) -> Tensor:
    """Rows (N, A, X) at places (N, Q): (N, Q, X)."""
    return rows.gather(1, places[..., None].expand(-1, -1, rows.shape[-1]))
