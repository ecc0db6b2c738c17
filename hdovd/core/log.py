"""What a stage says as it goes: lines of the logger `hdovd`, quiet unless a program asks for them, as `hdovd` does."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOGGER = logging.getLogger("hdovd")
LOGGER.addHandler(logging.NullHandler())
log = LOGGER.info


class Lines(logging.Handler):
    """Hands each line to `write`, as it is."""

    def __init__(self, write: Callable[[str], object]) -> None:
        super().__init__(logging.INFO)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write(record.getMessage())


@contextmanager
def lines_to(write: Callable[[str], object]) -> Iterator[None]:
    """While it lasts, what is logged goes to `write`: `print`, or a list's `append`."""
    handler, level, propagates = Lines(write), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # a library that sets up the root logger would print every line once more
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagates


@contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """Nothing is logged while it lasts, if `wanted`: of processes that do not lead, and of data that are read again."""
    before, LOGGER.disabled = LOGGER.disabled, LOGGER.disabled or wanted
    try:
        yield
    finally:
        LOGGER.disabled = before
