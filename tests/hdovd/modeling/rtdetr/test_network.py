"""The parts of RT-DETR's network: deformable attention, attention, encoder, choice of queries, boxes."""

import math

import pytest
import torch
from adamixer_scenes import DIM, noise, unit
from rtdetr_scenes import small
from torch import Tensor

from hdovd.config.detector import HybridEncoderConfig
from hdovd.modeling.boxes import covered
from hdovd.modeling.rtdetr.model import varifocal_rows
from hdovd.modeling.rtdetr.network import (
    Attention,
    DeformableAttention,
    GridSampling,
    HybridEncoder,
    PictureNorm,
    Selection,
    Stage,
    cells_of,
    logit,
    to_pixels,
    to_shares,
)

N, Q, C, HEADS, POINTS = 2, 3, 8, 2, 3
SHAPES = [(6, 5), (3, 4)]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def bilinear(values: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A map (c, h, w) at a place in cells, whose centres are at halves; zero outside."""
    found = torch.zeros_like(values[:, 0, 0])
    left, top = math.floor(x.item() - 0.5), math.floor(y.item() - 0.5)
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < values.shape[1] and 0 <= column < values.shape[2]:
                weight = (1 - (x - 0.5 - column).abs()) * (1 - (y - 0.5 - row).abs())
                found = found + weight * values[:, row, column]
    return found


def by_loop(
    part: DeformableAttention, content: Tensor, boxes: Tensor, maps: list[Tensor], inside: list[Tensor]
) -> Tensor:
    """arXiv 2010.04159, equation 3, a head, level and point at a time."""
    wide, rows = C // HEADS, []
    for n in range(N):
        for q in range(Q):
            offsets = part.offsets(content[n, q]).view(HEADS, len(maps), POINTS, 2)
            weights = part.weights(content[n, q]).view(HEADS, -1).softmax(dim=1).view(HEADS, len(maps), POINTS)
            heads = []
            for head in range(HEADS):
                total = torch.zeros(wide, dtype=content.dtype)
                for level, pixels in enumerate(maps):
                    values = (part.values(pixels) * inside[level][:, None])[n, head * wide : (head + 1) * wide]
                    for point in range(POINTS):
                        place = boxes[n, q, :2] + offsets[head, level, point] / POINTS * boxes[n, q, 2:] / 2
                        height, width = pixels.shape[2:]
                        total = total + weights[head, level, point] * bilinear(
                            values, place[0] * width, place[1] * height
                        )
                heads.append(total)
            rows.append(part.out(torch.cat(heads)))
    return torch.stack(rows).view(N, Q, C)


@pytest.mark.usefixtures("exact")
def test_a_grid_is_a_loop_over_its_points_row_by_row() -> None:
    torch.manual_seed(0)
    part, side = GridSampling(C, len(SHAPES), 3).double(), 3
    boxes = torch.rand(N, Q, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    maps = [noise(N, C, *shape, seed=3 + i).double() for i, shape in enumerate(SHAPES)]
    inside = [torch.ones(N, *shape, dtype=torch.bool) for shape in SHAPES]
    inside[0][1, -2:] = False
    found = part(boxes, maps, inside)
    for n in range(N):
        for q in range(Q):
            x, y, width, height = boxes[n, q]
            parts = []
            for row in range(side):
                for column in range(side):
                    place = x + ((column + 0.5) / side - 0.5) * width, y + ((row + 0.5) / side - 0.5) * height
                    total = torch.zeros(C // 2, dtype=torch.float64)
                    for values, pixels, within in zip(part.values, maps, inside, strict=True):
                        level = (values(pixels) * within[:, None])[n]
                        total = total + bilinear(level, place[0] * pixels.shape[3], place[1] * pixels.shape[2])
                    parts.append(total)
            torch.testing.assert_close(found[n, q], part.out(torch.cat(parts)), atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("exact")
def test_deformable_attention_is_a_loop_and_so_are_its_gradients() -> None:
    torch.manual_seed(0)
    part = DeformableAttention(C, HEADS, len(SHAPES), POINTS).double()
    for linear in (part.offsets, part.weights):
        torch.nn.init.normal_(linear.weight, std=0.3)
    content = noise(N, Q, C, seed=1).double().requires_grad_()
    boxes = torch.rand(N, Q, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    maps = [noise(N, C, *shape, seed=3 + i).double().requires_grad_() for i, shape in enumerate(SHAPES)]
    inside = [torch.arange(h)[None, :, None] < torch.tensor([h, h - 1])[:, None, None] for h, _ in SHAPES]
    inside = [rows.expand(-1, -1, shape[1]) for rows, shape in zip(inside, SHAPES, strict=True)]
    found, expected = part(content, boxes, maps, inside), by_loop(part, content, boxes, maps, inside)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    pull = noise(N, Q, C, seed=9).double()
    wanted = [content, boxes, *maps, *part.parameters()]
    gradients = [torch.autograd.grad((one * pull).sum(), wanted) for one in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-9)


def test_points_start_around_the_box() -> None:
    """The farthest of each head on a side or corner of the box, in another direction each; all weigh alike."""
    part = DeformableAttention(16, 4, 1, 2)
    offsets = part.offsets(torch.randn(16)).view(4, 2, 2) / part.points
    torch.testing.assert_close(offsets[:, -1], torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(offsets[:, 0], offsets[:, 1] / 2, atol=1e-6, rtol=0)
    assert part.weights(torch.randn(16)).unique().numel() == 1


def test_attention_is_torchs() -> None:
    torch.manual_seed(0)
    part, content, position = Attention(C, HEADS), noise(N, Q, C, seed=1), noise(N, Q, C, seed=2)
    seen = torch.tensor([[True, True, False], [False, True, True], [True, False, True]]).expand(N, -1, -1)
    both, values = part.queries_and_keys, part.values
    weight, bias = torch.cat([both.weight, values.weight]), torch.cat([both.bias, values.bias])
    placed = (content + position).transpose(0, 1)
    expected, _ = torch.nn.functional.multi_head_attention_forward(
        placed,
        placed,
        content.transpose(0, 1),
        C,
        HEADS,
        weight,
        bias,
        None,
        None,
        False,
        0.0,
        part.out.weight,
        part.out.bias,
        attn_mask=~seen[0],
    )
    bias = torch.where(seen, 0.0, -torch.inf)[:, None]
    torch.testing.assert_close(part(content, position, bias), expected.transpose(0, 1), atol=1e-6, rtol=1e-5)


def test_norms_of_whole_pictures_are_torchs() -> None:
    part, theirs, pixels = PictureNorm(12), torch.nn.GroupNorm(6, 12), noise(3, 12, 5, 6, seed=1) + 5
    for seed, (ours, value) in enumerate(((part.weight, theirs.weight), (part.bias, theirs.bias))):
        torch.nn.init.normal_(ours, generator=torch.Generator().manual_seed(seed))
        value.data.copy_(ours)
    everywhere = torch.ones(3, 5, 6, dtype=torch.bool)
    torch.testing.assert_close(part(pixels, everywhere), theirs(pixels), atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = part(pixels.bfloat16(), everywhere)
    assert rounded.dtype == torch.float32


def test_the_encoder_finds_in_a_picture_what_it_finds_in_it_alone() -> None:
    """Whatever the padding holds, and however much of it there is; gradients too."""
    torch.manual_seed(0)
    encoder = HybridEncoder(HybridEncoderConfig(heads=2, feedforward=16, blocks=2, hidden=32), [4, 6, 8], 32)
    alone = [noise(1, c, 12 >> i, 20 >> i, seed=i).requires_grad_() for i, c in enumerate((4, 6, 8))]
    batch = [noise(2, c, 16 >> i, 28 >> i, seed=9 + i) * 7 for i, c in enumerate((4, 6, 8))]
    inside = [torch.ones(2, 16 >> i, 28 >> i, dtype=torch.bool) for i in range(3)]
    for one, padded, cells in zip(alone, batch, inside, strict=True):
        cells[1] = False
        cells[1, : one.shape[2], : one.shape[3]] = True
        padded[1, :, : one.shape[2], : one.shape[3]] = one[0]
    found, expected = (
        encoder(batch, inside),
        encoder(alone, [torch.ones_like(m[:, 0], dtype=torch.bool) for m in alone]),
    )
    pulls = [noise(*m.shape, seed=30 + i) for i, m in enumerate(expected)]
    found = [m[1:, :, : e.shape[2], : e.shape[3]] for m, e in zip(found, expected, strict=True)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    totals = [sum((m * p).sum() for m, p in zip(maps, pulls, strict=True)) for maps in (found, expected)]
    for one, other in zip(*(torch.autograd.grad(t, alone) for t in totals), strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_every_level_of_the_encoder_sees_every_other() -> None:
    torch.manual_seed(0)
    encoder = HybridEncoder(HybridEncoderConfig(heads=2, feedforward=16, blocks=1, hidden=32), [4, 6, 8], 32)
    maps = [noise(1, c, 16 >> i, 16 >> i, seed=i).requires_grad_() for i, c in enumerate((4, 6, 8))]
    inside = [torch.ones(1, 16 >> i, 16 >> i, dtype=torch.bool) for i in range(3)]
    for out in encoder(maps, inside):
        for gradient in torch.autograd.grad((out * noise(*out.shape, seed=7)).sum(), maps, retain_graph=True):
            assert gradient.abs().max() > 0


def test_boxes_there_and_back() -> None:
    sizes = torch.tensor([[96.0, 128.0], [50.0, 20.0]])
    shares = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(to_shares(to_pixels(shares, sizes), sizes[:, None]), shares)
    assert to_pixels(torch.tensor([[[0.5, 0.25, 0.5, 0.5]]]), sizes[:1]).tolist() == [[[32, 0, 96, 48]]]
    torch.testing.assert_close(logit(shares).sigmoid(), shares.clamp(1e-4, 1 - 1e-4))


def test_cells_of_a_picture() -> None:
    """24 x 16 pixels in a batch of 32 x 32, at stride 8: 3 rows and 2 columns; of a pixel, one cell."""
    inside, anchors = cells_of(torch.zeros(2, 1, 4, 4), 8, torch.tensor([[24.0, 16.0], [1.0, 1.0]]))
    assert inside[0].int().tolist() == [[1, 1, 0, 0]] * 3 + [[0, 0, 0, 0]]
    assert inside[1].sum() == inside[1, 0, 0] == 1
    torch.testing.assert_close(anchors.sigmoid()[0, 1], torch.tensor([12 / 16, 4 / 24, 0.05, 0.05]))


def test_queries_are_the_cells_that_are_most_like_an_object() -> None:
    torch.manual_seed(0)
    part = Selection(C, DIM)
    cells, anchors, text = noise(1, 6, C, seed=1), noise(1, 6, 4, seed=2), unit(DIM, seed=3)
    inside = torch.tensor([[True, True, False, True, True, False]])
    content, logits, probability, within = part(cells, anchors, inside, text, 5)
    token = part.token(cells)
    cosine = torch.cosine_similarity(token, part.text(text)[None, None], dim=-1)
    expected = (part.object_scale * cosine + part.object_bias).sigmoid()[0]
    order = sorted(range(6), key=lambda i: (not inside[0, i], -expected[i].item()))[:5]
    assert within.tolist() == [[True] * 4 + [False]]
    torch.testing.assert_close(probability[0], expected[order])
    torch.testing.assert_close(content[0], token[0, order])
    torch.testing.assert_close(logits[0], anchors[0, order])


def test_queries_look_at_those_that_cover_their_box() -> None:
    """As far as the head's amount says: at none, a query far away counts as much as one on the same object."""
    torch.manual_seed(0)
    stage = Stage(small().detector, DIM)
    content, maps = noise(1, 3, 32, seed=1), [noise(1, 32, 4 >> i, 4 >> i, seed=i) for i in range(3)]
    inside = [torch.ones(1, 4 >> i, 4 >> i, dtype=torch.bool) for i in range(3)]
    boxes = torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.22, 0.2, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2]]])
    nearness = (covered(to_pixels(boxes, torch.tensor([[96.0, 96.0]]))) + 1e-7).log()
    moved = {}
    for amount in (0.0, 4.0):
        torch.nn.init.constant_(stage.iof_tau, amount)
        for other in (1, 2):
            changed = content.clone()
            changed[0, other] += noise(32, seed=5)
            one, two = (stage(c, torch.zeros_like(c), nearness, boxes, maps, inside, None) for c in (content, changed))
            moved[amount, other] = (one - two)[0, 0].abs().max().item()
    assert moved[4.0, 2] < 1e-5 < 1e-3 < min(moved[4.0, 1], moved[0.0, 1], moved[0.0, 2])


def test_cells_are_told_apart_under_autocast() -> None:
    """The cosines of thousands of cells with the text of "object" differ by less than bfloat16 can say."""
    torch.manual_seed(0)
    part = Selection(64, DIM)
    cells, anchors = noise(1, 4000, 64, seed=1), torch.zeros(1, 4000, 4)
    inside = torch.ones(1, 4000, dtype=torch.bool)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        probability = part(cells, anchors, inside, unit(1, DIM, seed=2)[0], 300)[2]
    assert len(probability.unique()) > 250


def test_varifocal_loss_is_that_of_the_paper_and_no_number_stays_none() -> None:
    p, q = torch.rand(50, generator=torch.Generator().manual_seed(3)), torch.zeros(50)
    q[:20] = torch.rand(20, generator=torch.Generator().manual_seed(4))
    weight = torch.where(q > 0, q, 0.75 * p**2)
    expected = weight * torch.nn.functional.binary_cross_entropy(p, q, reduction="none")
    torch.testing.assert_close(varifocal_rows(p, q), expected)
    ends = torch.tensor([0.0, 1.0, 0.0, 1.0]).requires_grad_()
    varifocal_rows(ends, torch.tensor([0.0, 0.0, 0.7, 0.7])).sum().backward()
    assert ends.grad is not None
    assert ends.grad.isfinite().all()
    assert varifocal_rows(torch.tensor([math.nan]), torch.zeros(1)).isnan().all()
