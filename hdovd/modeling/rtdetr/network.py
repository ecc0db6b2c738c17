"""What RT-DETR is behind its backbone (arXiv 2304.08069): the hybrid encoder (section 4.2), attention within the
coarsest level and convolutions between levels; which of its cells become queries; the stages that refine them (4.3 and
4.4).

Every convolution has a norm over groups of channels of the cells within the picture, where the paper has batch norms:
what is found in a picture depends neither on what another picture shows nor on its size. A box is (x, y, w, h), centre
and sides, in sides of its own picture, and kept as its logit, to which stages add. All of it is float32, under autocast
too, and so are the places where attention to the pyramid (arXiv 2010.04159, section 4.1) samples: by `grid_sample`,
since there is no operator then that a runtime would lack. Cells of the padding are never looked at, nor chosen while
there are others. N pictures, Q queries of each and M more of the denoising, A cells of all levels, C channels in H
heads, L levels, P points of a head at each level, G points of a grid, D embedding size; `inside`: (N, h, w) bool, the
cells of a level that lie in a picture.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdovd.config.detector import GROUPS_OF_NORM, HybridEncoderConfig, RTDETRConfig
from hdovd.modeling.boxes import best_places, covered, taken
from hdovd.modeling.queries.detector import RARE, ForwardOutput, QueryStage, xavier
from hdovd.modeling.queries.pairs import Candidates

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
            return pixels * scale[..., None, None] + shift[..., None, None]

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
        xavier(self)

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
        xavier(self.feedforward)

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
        for fine, lateral, fuse in zip(reversed(range(len(maps) - 1)), self.lateral, self.finer, strict=True):
            found[0] = lateral(found[0], inside[fine + 1])
            wider = F.interpolate(found[0], scale_factor=2.0, mode="nearest")
            found.insert(0, fuse(wider, projected[fine], inside[fine]))
        out = found[:1]
        for coarse, (downward, fuse) in enumerate(zip(self.downward, self.coarser, strict=True), start=1):
            out.append(fuse(downward(out[-1], inside[coarse - 1]), found[coarse], inside[coarse]))
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


# --- queries and the stages ---

SOME = 1e-7  # added to a covered share before its logarithm is taken; as AdaMixer
LEAST = 1e-4  # of a side of the picture, and 1 less it the most, before a logit is taken
ANCHOR = 0.05  # sides of the picture: of a box that a cell of stride 8 starts from; doubles with the stride; config
OBJECT_SCALE = 20.0  # of the cosine with the text of "object" at the start; METHOD section 7 has it for s2


class Selection(nn.Module):
    """A cell is as good a query as it is like the text of "object", which is brought to its C channels: there are many
    cells, and one text.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.token = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels))
        self.text = nn.Linear(dim, channels)
        self.deltas = box_branch(channels)
        xavier(self.token, self.text)
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
        content = taken(token, chosen)
        logits = taken(anchors, chosen) + self.deltas(content).float()
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
        xavier(self)
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
        xavier(self)

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
        xavier(self.feedforward, self.class_feature, self.objectness)
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
        xavier(self.position)
        self.stages = nn.ModuleList(Stage(config, dim) for _ in range(config.decoder.stages))

    def forward(
        self,
        levels: dict[str, Tensor],
        sizes: Tensor,
        whole: Tensor,
        object_text: Tensor,
        extra: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> ForwardOutput:
        """Refine queries: features of the encoder; contents (N, Q + M, C) and boxes (N, Q + M, 4) after each stage;
        deltas (N, Q, 4) that the last stage added to logits.

        Args:
            levels: (N, width, h, w) of the backbone, by level name. sizes: (N, 2) height and width of each picture.
            whole: (2,) those of the padded batch. object_text: (D,) the embedding of "object". extra: queries beside
            the chosen ones, content (N, M, C) and logits (N, M, 4) of their boxes; and which queries each query looks
            at, (N, Q + M, Q + M) bool, chosen ones first.
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
            more, more_logits, seen = extra
            content, logits = torch.cat([content, more.to(content.dtype)], 1), torch.cat([logits, more_logits], 1)
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
    xavier(branch)
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
