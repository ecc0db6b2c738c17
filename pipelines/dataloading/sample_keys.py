"""What is random about an image in an epoch, as a function of seed, epoch and image id alone.

So a sample does not depend on the number of processes or workers, nor on what was drawn before it: a run that is
resumed in mid-epoch, or spread over other GPUs, sees the very same samples.
"""

from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True, slots=True)
class Draw:
    """One image of one epoch, as batches ask a data set for it: `index` into the data set, `step` of the epoch, both
    from 0.
    """

    epoch: int
    step: int
    index: int


def as_draw(wanted: Draw | int) -> Draw:
    """A plain index is that of the first epoch."""
    return Draw(0, 0, wanted) if isinstance(wanted, int) else wanted


def key_of(seed: int, epoch: int, image_id: int) -> int:
    """A number below 2**63 that seeds all random choices about this image in this epoch."""
    return int.from_bytes(blake2b(f"{seed} {epoch} {image_id}".encode(), digest_size=8).digest()) >> 1


def is_flipped(key: int, probability: float) -> bool:
    """Whether the image is mirrored, by its key."""
    return (key % 2**32) / 2**32 < probability
