"""The RPN as the authors' code has it, against values worked out by hand, and what of it torchvision does otherwise."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from hdovd.config.detector import RpnConfig
from hdovd.modeling.batching import input_size
from hdovd.modeling.rpn import AuthorsRPN, ObjectnessRPN, build_rpn

CONFIG = RpnConfig(anchor_sizes=[[8], [16], [32]], samples=10_000, pre_nms=50, post_nms=20, nms=0.7, rules="authors")


def build(rules: str = "authors") -> ObjectnessRPN:
    return build_rpn(CONFIG.model_copy(update={"rules": rules}), 4, 3)


def anchors_of(rpn: ObjectnessRPN, side: int = 96) -> list[Tensor]:
    """Of strides 8, 16 and 32 over a batch of `side`, the last map a cell larger than half of the one before, as
    pooling makes it.
    """
    cells = [side // 8, side // 16, (side // 16 + 1) // 2]
    maps = [torch.zeros(1, 4, n, n) for n in cells]
    grid = rpn.anchor_generator(ImageList(torch.zeros(1, 3, side, side), [(side, side)]), maps)[0]
    return list(grid.split([3 * n * n for n in cells]))


def test_sides_are_not_rounded() -> None:
    first = anchors_of(build())[0][:3]
    wide, high = 8 * math.sqrt(2), 8 / math.sqrt(2)
    torch.testing.assert_close(
        first, torch.tensor([[-wide, -high, wide, high], [-8, -8, 8, 8], [-high, -wide, high, wide]]) / 2
    )
    assert (
        anchors_of(build("torchvision"))[0][:3] == torch.tensor([[-6, -3, 6, 3], [-4, -4, 4, 4], [-3, -6, 3, 6]])
    ).all()


def test_strides_double_where_the_map_is_a_cell_larger() -> None:
    """A batch of 80: maps of 10, 5 and 3 cells; torchvision takes 80 // 3 = 26 for the last stride."""
    for rules, stride in (("authors", 32), ("torchvision", 26)):
        last = anchors_of(build(rules), 80)[-1]
        centres = ((last[:, :2] + last[:, 2:]) / 2)[::3]
        torch.testing.assert_close(centres[:3, 0], torch.tensor([0.0, stride, 2 * stride]))


def match(
    rows: list[list[float]], boxes: list[list[float]], size: tuple[int, int] = (96, 96)
) -> tuple[list[float], list[int]]:
    rpn = build()
    assert isinstance(rpn, AuthorsRPN)
    labels, box_of = rpn._match(torch.tensor(rows), {"boxes": torch.tensor(boxes).reshape(-1, 4), "size": size})
    return labels.tolist(), box_of.tolist()


def test_matching() -> None:
    """One box of 20 x 20. IoUs: 1, 0.75, 0.5, 0.25, 0: object, object, neither, background, background."""
    rows = [[0.0, 0, 20, 20], [0, 0, 20, 15], [0, 0, 20, 10], [0, 0, 20, 5], [40, 40, 60, 60]]
    assert match(rows, [[0, 0, 20, 20]])[0] == [1, 1, -1, 0, 0]


def test_the_best_anchor_learns_a_box_from_an_iou_of_03_on() -> None:
    rows = [[0.0, 0, 20, 10], [0, 0, 20, 5]]
    assert match(rows, [[0, 0, 20, 20]])[0] == [1, 0]  # 0.5 is the best
    assert match(rows[1:], [[0, 0, 20, 20]])[0] == [0]  # 0.25 is the best, and too little


def test_the_best_anchor_of_a_box_learns_this_box_even_if_it_fits_another_better() -> None:
    """An anchor of IoU 1 with the first box and 0.5 with the second, whose best it is."""
    assert match([[0.0, 0, 20, 20]], [[0, 0, 20, 20], [0, 0, 20, 10]]) == ([1.0], [1])


def test_anchors_in_the_padding_are_left_out() -> None:
    """A picture of 40 x 30 in a batch: its own padding ends at 64 x 32."""
    rows = [
        [20.0, 20, 40, 40],
        [50, 10, 70, 30],
        [60, 0, 80, 20],
        [10, 30, 30, 60],
    ]  # centres (30, 30), (60, 20), (70, 10), (20, 45)
    assert match(rows, [], size=(30, 40))[0] == [0, 0, -1, -1]
    assert match(rows, [[56.0, 6, 76, 26]], size=(30, 40))[0] == [0, 1, -1, -1]  # IoU 0.39, as the third has


def test_what_is_drawn_are_the_matched_anchors() -> None:
    rpn = build()
    grid = torch.cat(anchors_of(rpn))
    box = torch.tensor([[10.0, 10, 40, 42]])
    labels, matched = rpn.assign_targets_to_anchors(
        [grid, grid], [{"boxes": box, "size": (96, 96), "key": 3}, {"boxes": box[:0], "size": (96, 96), "key": 4}]
    )
    assert (labels[0] == 1).any()
    assert (matched[0][labels[0] == 1] == box).all()
    assert (labels[1] == 0).all()  # all are drawn
    assert matched[1].shape == grid.shape


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (640, 642, (800, 803)),  # 802.5 goes up; Python's round() would say 802
        (640, 646, (800, 808)),  # 807.5
        (480, 640, (800, 1067)),
        (375, 500, (800, 1067)),
        (100, 400, (333, 1333)),
    ],
)
def test_sizes_are_rounded_half_up(height: int, width: int, expected: tuple[int, int]) -> None:
    assert input_size(height, width, 800, 1333) == expected
