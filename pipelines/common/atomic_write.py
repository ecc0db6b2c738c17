"""Files that appear whole or not at all: whatever a command writes goes through here, but logs that grow and the
cache's own store.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdovd.core import NO_ROOM, HdovdError, system_reason

if TYPE_CHECKING:
    from PIL import Image


def replace_file(file: Path, write: Callable[[Path], object], *, writer: str = "", durable: bool = True) -> None:
    """Replace a file whole or not at all, and make the folders above it. Raises HdovdError, and leaves what is there,
    if it cannot be.

    What is no file, such as /dev/stdout, is written to. A link stays one: what it points to is replaced.

    Args:
        write: writes to the path given, a file beside `file`.
        writer: who this is, where several processes may write the same file at once.
        durable: on the disk when this returns; not needed of pictures, which are many.
    """
    try:
        mode = os.stat(file).st_mode  # asked once: another process may delete it at any time
    except OSError:
        mode = stat.S_IFREG
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        write(file)
        return
    with writing(file):
        target = Path(os.path.realpath(file))
        partial = target.with_name(f".{target.name[-60:]}{writer and '.'}{writer}.partial")  # 255 bytes at most
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.unlink(missing_ok=True)
            partial.touch()
            mode = partial.stat().st_mode  # as the umask and the folder have it: safetensors has its own
            write(partial)
            if partial.stat().st_mode != mode:
                partial.chmod(mode)
            if durable:
                with partial.open("rb+") as written:
                    os.fsync(written.fileno())
            os.replace(partial, target)
        finally:
            with suppress(OSError):  # the folder may be read-only, as the error says then
                partial.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """`replace_file` with UTF-8 text."""
    replace_file(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_picture(file: Path, picture: Image.Image, form: str, **options: Any) -> None:
    """`replace_file` with a picture, in Pillow's name for a form and with its options."""
    replace_file(file, lambda partial: picture.save(partial, form, **options), durable=False)


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Raises HdovdError, naming the file, the reason and what to do, for whatever goes wrong within."""
    try:
        yield
    except HdovdError:
        raise
    except Exception as error:
        cause = _of_system(error, file)
        again = (
            "; then give the command again (train: with --resume)"
            if cause is not None and cause.errno in NO_ROOM
            else ""
        )
        raise HdovdError(
            f"{file} cannot be written: {system_reason(cause) if cause else error}; what was there is whole{again}"
        ) from error


def _of_system(error: Exception, file: Path) -> OSError | None:
    """What the system said: safetensors has errors of its own for it, and torch says nothing of a full disk."""
    if isinstance(error, OSError):
        return error
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(found[1]), os.strerror(int(found[1])), str(file))
    with suppress(OSError):  # a folder that is gone is not full
        if shutil.disk_usage(file.parent).free < 1 << 20:
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    return None
