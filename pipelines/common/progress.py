"""One progress bar for all stages: rate and time left; in a log file a line now and then instead."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

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
