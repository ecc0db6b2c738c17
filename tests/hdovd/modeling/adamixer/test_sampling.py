"""Boxes, 3-D sampling, mixing and attention: against torch's own operations, and against loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from adamixer_scenes import noise
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou

from hdovd.config.detector import DecoderConfig
from hdovd.modeling.adamixer.decoder import (
    AdaptiveMixing,
    BoxAttention,
    DecoderStage,
    SamplingTable,
    positional_code,
    refine,
    sides,
    to_corners,
    to_xyzr,
)
from hdovd.modeling.boxes import covered, overlap

BOXES = torch.tensor([[0.0, 0.0, 8.0, 2.0], [4.0, 1.0, 12.0, 5.0], [20.0, 20.0, 24.0, 40.0]])


def test_box_by_hand() -> None:
    """8 x 2: centre (4, 1), z = log2(4), r = log2(1 / 4)."""
    assert to_xyzr(BOXES[0]).tolist() == [4.0, 1.0, 2.0, -2.0]
    assert sides(to_xyzr(BOXES[0])).tolist() == [8.0, 2.0]
    torch.testing.assert_close(to_corners(to_xyzr(BOXES)), BOXES)
    moved = refine(to_xyzr(BOXES[0]), torch.tensor([0.5, -1.0, 1.0, 0.25]))
    assert moved.tolist() == [6.0, -3.0, 3.0, -1.75]  # half of 2^z, once 2^z


def test_overlaps_are_torchvisions() -> None:
    iou, giou = overlap(BOXES[:, None], BOXES[None])
    torch.testing.assert_close(iou, box_iou(BOXES, BOXES))
    torch.testing.assert_close(giou, generalized_box_iou(BOXES, BOXES))


def test_covered_by_hand_and_empty_boxes() -> None:
    """Of the first box, 16 square pixels, the second covers 4; of the second, 32, the first covers 4."""
    assert covered(BOXES)[:2, :2].tolist() == [[1.0, 0.25], [0.125, 1.0]]
    nothing = torch.zeros(1, 4, requires_grad=True)
    iou, giou = overlap(nothing, nothing)
    (iou + giou).sum().backward()
    assert iou.item() == 0
    assert bool(nothing.grad.isfinite().all())


def naive_sample(maps: list[Tensor], strides: list[int], points: Tensor, groups: int) -> Tensor:
    """torch's grid_sample a level, group and picture, weighted by a Gaussian of the distance in levels."""
    out = torch.zeros(*points.shape[:-1], maps[0].shape[1] // groups)
    weights = torch.stack([torch.exp(-((points[..., 2] - math.log2(s)) ** 2) / 2) for s in strides], dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    for level, (pixels, stride) in enumerate(zip(maps, strides, strict=True)):
        size = torch.tensor([pixels.shape[3] * stride, pixels.shape[2] * stride])
        for n in range(len(points)):
            for g in range(groups):
                part = pixels[n].chunk(groups)[g]
                values = F.grid_sample(part[None], (points[n, :, g, :, :2] / size * 2 - 1)[None], align_corners=False)[
                    0
                ]
                out[n, :, g] = out[n, :, g] + values.permute(1, 2, 0) * weights[n, :, g, :, level, None]
    return out


@pytest.mark.parametrize("groups", [1, 2])
def test_sampling_is_grid_sample_a_level(groups: int) -> None:
    """With points in the middle, at the edges, beyond them and far away; values and all gradients."""
    strides = [4, 8]
    maps = [noise(2, 4, 6, 9, seed=1), noise(2, 4, 3, 5, seed=2)]
    points = torch.cat([noise(2, 7, groups, 5, 2, seed=3) * 20 + 12, noise(2, 7, groups, 5, 1, seed=4) + 2.5], dim=-1)
    points[0, 0, 0, 0, :2] = 1e6
    points[1, 2, 0, 1, 0] = -1.9  # the outer half of the first cell
    results = []
    for sample in (naive_sample, lambda m, s, p, g: SamplingTable(m, s).sample(p, g)):
        leaves = [m.clone().requires_grad_() for m in (*maps, points)]
        out = sample(leaves[:2], strides, leaves[2], groups)
        (out * noise(*out.shape, seed=5)).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert results[1][0][0, 0, 0, 0].abs().max() == 0


def test_sampling_without_queries() -> None:
    assert SamplingTable([noise(1, 4, 3, 3, seed=0)], [4]).sample(torch.zeros(1, 0, 2, 3, 3), 2).shape == (
        1,
        0,
        2,
        3,
        2,
    )


def test_mixing_query_by_query() -> None:
    mixing = AdaptiveMixing(8, 2, 3, 5)
    torch.nn.init.normal_(mixing.parameters_of.weight, std=0.3)
    sampled, content = noise(4, 2, 3, 4, seed=1), noise(4, 8, seed=2)
    made = mixing.parameters_of(content)
    rows = []
    for m in range(4):
        parts = []
        for g in range(2):
            numbers = made[m].chunk(2)[g]
            channels, points = numbers[:16].view(4, 4), numbers[16:].view(5, 3)
            values = F.layer_norm(sampled[m, g] @ channels, (3, 4)).relu()
            parts.append(F.layer_norm(points @ values, (5, 4)).relu().flatten())
        rows.append(mixing.out(torch.cat(parts)))
    torch.testing.assert_close(mixing(sampled, content), torch.stack(rows))


def test_attention_is_torchs_with_a_mask() -> None:
    attention = BoxAttention(8, 2)
    queries, log_iof = noise(2, 3, 8, seed=1), noise(2, 3, 3, seed=2)
    mask = (log_iof[:, None] * attention.iof_tau.view(1, 2, 1, 1)).flatten(0, 1)
    turned = queries.transpose(0, 1)
    expected, _ = F.multi_head_attention_forward(
        turned,
        turned,
        turned,
        8,
        2,
        attention.in_proj.weight,
        attention.in_proj.bias,
        None,
        None,
        False,
        0.0,
        attention.out_proj.weight,
        attention.out_proj.bias,
        attn_mask=mask,
    )
    torch.testing.assert_close(attention(queries, log_iof), expected.transpose(0, 1))


def test_positional_code_by_hand() -> None:
    """16 channels: four a number, of wavelengths 1 and 100; x and y count in thousands of pixels."""
    code = positional_code(torch.tensor([500.0, 0.0, 3.0, -1.0]), 16)
    expected = [f(v / w) for v in (0.5, 0.0, 3.0, -1.0) for w in (1, 100) for f in (math.sin, math.cos)]
    torch.testing.assert_close(code, torch.tensor(expected))


def test_a_new_stage_leaves_boxes_where_they_are() -> None:
    """And samples within half a side of them, one level finer."""
    stage = DecoderStage(
        DecoderConfig(groups=2, points=3, heads=2, feedforward=16, objectness_channels=4, out_points=4), 32, 6
    )
    table = SamplingTable([noise(1, 32, 4, 4, seed=1)], [8])
    xyzr = to_xyzr(BOXES)[None]
    content, moved, deltas = stage(table, noise(1, 3, 32, seed=2), xyzr)
    assert torch.equal(moved, xyzr)
    assert deltas.abs().max() == 0
    points = stage.points_of(content, xyzr)
    assert points.shape == (1, 3, 2, 3, 3)
    away = (points[..., :2] - xyzr[:, :, None, None, :2]).abs() / sides(xyzr)[:, :, None, None]
    assert 0 < away.max() <= 0.5
    assert torch.equal(points[..., 2], (xyzr[..., 2] - 1)[..., None, None].expand(1, 3, 2, 3))
    assert stage.object_logits(content).sigmoid().max() < 0.2
