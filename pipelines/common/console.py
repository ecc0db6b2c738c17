"""What a terminal shows: bytes and seconds in the unit that suits them, and one progress bar for all stages.

In a log file the bar is a line now and then.
"""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float) -> str:
    """Seconds in words that fit: 4.2 s, 45 s, 12 min, 3 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


T = TypeVar("T")


def progress(
    items: Iterable[T] | None, what: str, unit: str, total: int | None = None, *, initial: int = 0
) -> "tqdm[T]":
    """Wrap `items`; `unit` is what one item is ("step", "image"). Without items, count up with `update`."""
    terminal = sys.stderr.isatty()
    return tqdm(
        items,
        desc=what,
        unit=unit,
        total=total,
        disable=total == 0,
        initial=initial,
        mininterval=0.2 if terminal else 20.0,
        maxinterval=10.0 if terminal else 30.0,
        dynamic_ncols=terminal,
    )
