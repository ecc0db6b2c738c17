"""Random choices about one image: which anchors and RoIs are trained on, and at which scale.

Each is drawn from a generator of its own, seeded by the image's key, so that it depends neither on the other
images of the batch, nor on their order, nor on the number of processes.
n candidates of an image.
"""

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from hdovd.core.errors import HdovdError

_MASK = 2**64 - 1
MAX_KEY = 2**63


class Use(IntEnum):
    """What a random choice is about; choices of one image do not share random numbers."""

    ANCHORS = 1
    ROIS = 2
    SCALE = 3


def keys_of(keys: Sequence[int] | None, images: int) -> Sequence[int | None]:
    """One key or None an image. Raises HdovdError if there are not as many keys as images, or one is out of range."""
    if keys is None:
        return [None] * images
    if len(keys) != images:
        raise HdovdError(f"keys: expected one an image, {images}; found {len(keys)}")
    for key in keys:
        if not 0 <= key < MAX_KEY:
            raise HdovdError(f"key {key}: expected a whole number from 0 to 2**63 - 1")
    return keys


def image_generator(key: int | None, use: Use, device: torch.device | str = "cpu") -> torch.Generator | None:
    """The generator of one choice about one image; None, which stands for torch's global one, without a key."""
    if key is None:
        return None
    generator = torch.Generator(device)
    generator.manual_seed(_mixed(key, use))
    return generator


def sample_balanced(
    positive: Tensor, negative: Tensor, samples: int, positive_share: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw at most `samples * positive_share` positives, and negatives for the rest of `samples`.

    Args:
        positive, negative: (n,) bool, never both.
        generator: on the device of the masks; None draws from torch's global one.

    Returns:
        (n,) bool positives drawn, (n,) bool negatives drawn. Nothing waits for the device.
    """
    lot = torch.rand(len(positive), device=positive.device, generator=generator)
    drawn = _lowest(lot, positive, int(samples * positive_share), None)
    return drawn, _lowest(lot, negative, samples, samples - drawn.sum())


def _lowest(lot: Tensor, allowed: Tensor, most: int, wanted: Tensor | None) -> Tensor:
    """(n,) bool: the `most` allowed ones with the lowest lots, or the first `wanted` () of those."""
    places = lot.masked_fill(~allowed, 2.0).topk(min(most, len(lot)), largest=False).indices
    keep = torch.ones_like(places, dtype=torch.bool)
    if wanted is not None:
        keep = torch.arange(len(places), device=lot.device) < wanted
    return torch.zeros_like(allowed).scatter(0, places, keep) & allowed


def _mixed(key: int, use: Use) -> int:
    """All bits of key and use in every bit of the seed: torch's CPU generator looks at the lower 32 alone.

    The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    z = (key + use * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
