"""What one image brings: geometry, and that rows stay with their boxes."""

from dataclasses import replace

import pytest
import torch

from hdovd.data.targets import Targets, with_large_pseudo_boxes

DIM = 3


def example(pseudo_sides: list[tuple[float, float]] = ((10.0, 20.0), (30.0, 5.0))) -> Targets:
    """Row r of base embeddings is full of r, of pseudo embeddings 10 + r, of pseudo texts 20 + r."""
    count = len(pseudo_sides)
    pseudo = [[3.0 + r, 4.0, 3.0 + r + w, 4.0 + h] for r, (w, h) in enumerate(pseudo_sides)]
    full = lambda start, n: torch.arange(start, start + n, dtype=torch.float32)[:, None].expand(n, DIM)  # noqa: E731
    return Targets(
        torch.tensor([[1.0, 2.0, 11.0, 22.0], [40.0, 0.0, 100.0, 50.0]]),
        torch.tensor([5, 1]),
        full(0, 2),
        torch.tensor(pseudo).reshape(count, 4),
        full(10, count),
        full(20, count),
        torch.full((DIM,), 7.0),
    )


def test_all_boxes_puts_base_first() -> None:
    targets = example()
    assert targets.all_boxes.tolist() == [[1, 2, 11, 22], [40, 0, 100, 50], [3, 4, 13, 24], [4, 4, 34, 9]]


def test_flip_mirrors_boxes_and_leaves_rows() -> None:
    targets = example()
    flipped = targets.flipped(100)
    assert flipped.boxes.tolist() == [[89, 2, 99, 22], [0, 0, 60, 50]]
    assert flipped.pseudo_boxes.tolist() == [[87, 4, 97, 24], [66, 4, 96, 9]]
    for name in ("labels", "embeddings", "pseudo_embeddings", "pseudo_texts", "image_embedding"):
        assert torch.equal(getattr(flipped, name), getattr(targets, name))
    again = flipped.flipped(100)
    assert torch.equal(again.all_boxes, targets.all_boxes)


def test_flip_agrees_with_the_flipped_picture() -> None:
    picture = torch.zeros(20, 30)
    picture[2:7, 4:9] = 1.0
    targets = example()
    box = torch.tensor([[4.0, 2.0, 9.0, 7.0]])
    x0, y0, x1, y1 = replace(targets, boxes=box).flipped(30).boxes[0].int().tolist()
    mirrored = picture.flip(-1)
    assert mirrored[y0:y1, x0:x1].min() == 1.0
    assert mirrored.sum() == mirrored[y0:y1, x0:x1].sum()


def test_scale_takes_each_axis_by_its_factor() -> None:
    scaled = example().scaled(2.0, 0.5)
    assert scaled.boxes.tolist() == [[2, 1, 22, 11], [80, 0, 200, 25]]
    assert scaled.pseudo_boxes.tolist() == [[6, 2, 26, 12], [8, 2, 68, 4.5]]
    assert scaled.labels.tolist() == [5, 1]


def test_both_sides_must_be_over_the_minimum() -> None:
    targets = with_large_pseudo_boxes([example([(33, 33), (32, 40), (40, 32), (32.5, 99), (10, 500)])], 32.0)[
        0
    ].with_first_pseudo_boxes(5)
    assert targets.pseudo_boxes.tolist() == [[3, 4, 36, 37], [6, 4, 38.5, 103]]
    assert targets.pseudo_embeddings[:, 0].tolist() == [10, 13]
    assert targets.pseudo_texts[:, 0].tolist() == [20, 23]
    assert targets.boxes.shape == (2, 4)  # base boxes of any size stay


def test_the_best_of_the_large_ones_are_kept() -> None:
    sides = [(40, 40), (5, 5), (41, 41), (42, 42), (43, 43)]
    targets = with_large_pseudo_boxes([example(sides)], 32.0)[0].with_first_pseudo_boxes(3)
    assert targets.pseudo_embeddings[:, 0].tolist() == [10, 12, 13]  # small ones do not use up places
    assert targets.pseudo_texts[:, 0].tolist() == [20, 22, 23]
    assert (targets.pseudo_boxes[:, 2] - targets.pseudo_boxes[:, 0]).tolist() == [40, 41, 42]


@pytest.mark.parametrize("sides", [[], [(5.0, 5.0)]])
def test_none_left(sides: list[tuple[float, float]]) -> None:
    targets = with_large_pseudo_boxes([example(sides)], 32.0)[0].with_first_pseudo_boxes(5)
    assert targets.pseudo_boxes.shape == (0, 4)
    assert targets.pseudo_embeddings.shape == (0, DIM)
    assert targets.pseudo_texts.shape == (0, DIM)
    assert targets.flipped(100).scaled(2.0, 2.0).all_boxes.shape == (2, 4)


def test_to_keeps_every_field_in_its_place() -> None:
    targets = replace(example(), judged=torch.tensor([True, False]))
    moved = targets.to("cpu")
    assert example().to("cpu").judged is None
    for name in Targets.__slots__:
        assert torch.equal(getattr(moved, name), getattr(targets, name)), name
