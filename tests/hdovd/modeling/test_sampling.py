"""Random choices about an image: counts, shares, evenness, and that they follow from its key alone."""

import pytest
import torch
from torch import Tensor

from hdovd.modeling.batching import Use, image_generator, sample_balanced


def masks(positives: int, negatives: int, neither: int = 0) -> tuple[Tensor, Tensor]:
    kinds = torch.tensor([1] * positives + [0] * negatives + [-1] * neither)
    kinds = kinds[torch.randperm(len(kinds), generator=torch.Generator().manual_seed(1))]
    return kinds == 1, kinds == 0


def drawn(positive: Tensor, negative: Tensor, samples: int, share: float, key: int | None = 3) -> tuple[int, int]:
    one, two = sample_balanced(positive, negative, samples, share, image_generator(key, Use.ROIS))
    assert not (one & ~positive).any()
    assert not (two & ~negative).any()
    return int(one.sum()), int(two.sum())


@pytest.mark.parametrize(
    ("positives", "negatives", "neither", "expected"),
    [
        (10, 50, 20, (4, 12)),
        (2, 50, 0, (2, 14)),  # background makes up for positives
        (10, 5, 9, (4, 5)),  # positives do not make up for background
        (0, 3, 2, (0, 3)),
        (0, 50, 0, (0, 16)),
        (9, 0, 4, (4, 0)),
        (0, 0, 7, (0, 0)),
        (0, 0, 0, (0, 0)),
    ],
)
@pytest.mark.parametrize("key", [None, 0, 3])
def test_counts(positives: int, negatives: int, neither: int, expected: tuple[int, int], key: int | None) -> None:
    assert drawn(*masks(positives, negatives, neither), 16, 0.25, key) == expected


def test_every_candidate_is_drawn_as_often_as_another() -> None:
    positive, negative = masks(20, 30, 10)
    counts = sum(
        torch.stack(sample_balanced(positive, negative, 16, 0.5, image_generator(key, Use.ANCHORS)))
        for key in range(2000)
    )
    for count, mask, expected in ((counts[0], positive, 2000 * 8 / 20), (counts[1], negative, 2000 * 8 / 30)):
        assert (count[mask] - expected).abs().max() < 6 * expected**0.5
        assert not count[~mask].any()


def numbers(key: int, use: Use) -> tuple[float, ...]:
    return tuple(torch.rand(4, generator=image_generator(key, use)).tolist())


def test_a_key_and_a_use_always_draw_the_same_and_no_other_does() -> None:
    """Keys that differ in high bits alone too: torch's CPU generator would ignore them in a seed."""
    keys = [0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**40, 2**62, 2**63 - 1]
    found = {(key, use): numbers(key, use) for key in keys for use in Use}
    assert len(set(found.values())) == len(found)
    torch.manual_seed(8)
    assert all(numbers(key, use) == values for (key, use), values in found.items())


def test_without_a_key_the_global_generator_decides() -> None:
    assert image_generator(None, Use.ROIS) is None
    positive, negative = masks(20, 30)
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(torch.stack(sample_balanced(positive, negative, 16, 0.5, None)))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
