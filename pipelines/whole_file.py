"""Files that appear whole or not at all. Called by whatever writes one: checkpoints, weights, proposals, nouns, calibrations."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hdovd.errors import HdovdError


def _umask() -> int:
    """The process's own; it can only be read by being set."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def replace_file(file: Path, write: Callable[[Path], object], *, writer: str = "") -> None:
    """Replace a file whole or not at all. Raises HdovdError, and leaves what is there, if it cannot be written: no room, no right.

    writer: who this is, where several processes may write the same file at once.
    """
    partial = file.with_name(f".{file.name}{writer and '.'}{writer}.partial")
    try:
        write(partial)
        partial.chmod(0o666 & ~_umask())  # safetensors makes files that nobody else may read
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(partial, file)
    except Exception as error:  # safetensors and torch have errors of their own for a full disk
        partial.unlink(missing_ok=True)
        raise HdovdError(f"{file} cannot be written ({error}); what was there is whole. Make room, then give the command again (train: "
                         "with --resume)") from error
