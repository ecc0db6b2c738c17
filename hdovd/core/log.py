"""What a stage says as it goes: lines of the logger `hdovd`, quiet unless a program asks for them, as `hdovd` does."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOGGER = logging.getLogger("hdovd")
LOGGER.addHandler(logging.NullHandler())
_quiet = False


class Lines(logging.Handler):
    """Hands each line to `write`, as it is."""

    def __init__(self, write: Callable[[str], object]) -> None:
        super().__init__(logging.INFO)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write(record.getMessage())


def log(*lines: str) -> None:
    """Say some lines."""
    for line in () if _quiet else lines:
        if is_printed():
            LOGGER.disabled = False  # as logging.config leaves every logger that a library's settings do not name
        LOGGER.info(line, stacklevel=2)


def is_printed() -> bool:
    """Whether lines go anywhere by `lines_to`."""
    return any(isinstance(handler, Lines) for handler in LOGGER.handlers)


@contextmanager
def lines_to(write: Callable[[str], object]) -> Iterator[None]:
    """While it lasts, what is logged goes to `write`, and to none of these around it: `print`, or a list's `append`."""
    before, level, propagates = LOGGER.handlers, LOGGER.level, LOGGER.propagate
    LOGGER.handlers = [*(handler for handler in before if not isinstance(handler, Lines)), Lines(write)]
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # a library that sets up the root logger would print every line once more
    try:
        yield
    finally:
        LOGGER.handlers = before
        LOGGER.setLevel(level)
        LOGGER.propagate = propagates


@contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """Nothing is logged while it lasts, if `wanted`: of processes that do not lead, and of data that are read again."""
    global _quiet
    before, _quiet = _quiet, _quiet or wanted
    try:
        yield
    finally:
        _quiet = before
