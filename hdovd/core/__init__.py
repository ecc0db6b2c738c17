"""What every room needs: the version, the errors that users see, whose text `cli` prints without a traceback, what the
system says of files, in words, and the lines that a stage says as it goes: of the logger `hdovd`, quiet unless a
program asks for them, as the commands do.
"""

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__version__ = "0.2.0"


def user_cache_folder() -> Path:
    """What is kept between commands: $XDG_CACHE_HOME/hdovd, or ~/.cache/hdovd."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hdovd"


# --- errors ---

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit (ulimit -f)",
    errno.EROFS: "give a place that can be written to",
    errno.ENAMETOOLONG: "a name has at most 255 bytes, a path 4,095",
    errno.ENOENT: "was it moved, or mistyped?",
    errno.EMFILE: "raise the limit (ulimit -n)",
}
_SHOWN = 160  # letters of a path


class HdovdError(Exception):
    """Bad input. The text names the file and id, what was expected, what was found and what to do."""


class Unfit(HdovdError):
    """Why a file, or a value in it, cannot be taken."""


class Stopped(HdovdError):
    """A signal ended the work: it was saved and can go on. `code`: the exit code of a command that ends so."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def shorten(items: Sequence[object], most: int = 8) -> str:
    """`items` in one line, cut after `most` with a count of the rest."""
    shown = ", ".join(map(str, items[:most]))
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def counted(count: int, one: str, many: str = "") -> str:
    """`1 picture`, `3 pictures`; `many`: what follows other counts, where it is more than an s: `counted(n, "box is",
    "boxes are")`.
    """
    return f"{count:,d} {one if count == 1 else many or one + 's'}"


def system_reason(error: OSError) -> str:
    """Why the system refused a file: with mode and owner where a right is missing, and with what to do."""
    if error.filename is not None and error.errno in (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        path = Path(os.fsdecode(error.filename)).absolute()
        place = next((one for one in (path, *path.parents) if os.path.lexists(one)), path)
        return (
            _missing_right(place)
            if error.errno in (errno.EACCES, errno.EPERM)
            else f"{place} is a file, expected a folder"
        )
    advice = _ADVICE.get(error.errno or 0)
    return (error.strerror or str(error)) + (f" ({advice})" if advice else "")


def system_line(error: OSError) -> str:
    """The reason, after the file that an error names, cut if it is long."""
    reason = system_reason(error)
    if error.filename is None:
        try:
            os.getcwd()
        except FileNotFoundError:
            return "the current folder is not there any more: change to another one"
        return reason
    name = os.fsencode(error.filename).decode(errors="replace")
    return reason if name in reason else f"{name[:_SHOWN]}{'...' * (len(name) > _SHOWN)}: {reason}"


def _missing_right(place: Path) -> str:
    try:
        about = f"mode {place.stat().st_mode & 0o7777:04o}, owner {place.owner()}"
    except (OSError, KeyError) as error:  # KeyError: the owner has a number and no name
        about = str(error)
    right = "read" if not os.access(place, os.R_OK, effective_ids=True) else "write in" if place.is_dir() else "write"
    return f"no permission to {right} {place} ({about})"


def is_file(text: str) -> bool:
    """Whether words are the name of a file; they may be longer than names can be. Raises OSError if a folder may not be
    looked into.
    """
    try:
        return Path(text).is_file()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def require_readable(file: Path) -> None:
    """Raises HdovdError for a file that cannot be opened; safetensors calls all such files missing."""
    try:
        file.open("rb").close()
    except OSError as error:
        raise HdovdError(system_line(error)) from error


def require_files(**options: Path | None) -> None:
    """Raises HdovdError for a file that is not there, named by the option that it was given with."""
    for name, file in options.items():
        if file is not None and not file.is_file():
            raise HdovdError(f"--{name.replace('_', '-')}: no file {file}")


def in_a_line(error: Exception) -> str:
    """The kind of an error and what it says, cut."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# --- lines of the logger ---

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
