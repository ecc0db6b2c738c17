"""Which pictures a command is to look at: files, folders, patterns, and what comes by standard input."""

import glob
import io
import os
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from hdovd.core.errors import HdovdError, shorten
from hdovd.core.log import log
from hdovd.core.picture_header import ENDINGS

STANDARD_INPUT = "-"


@dataclass(frozen=True, slots=True)
class PictureFile:
    """`name`: what it is called to the user. `data`: the picture itself, where it came by standard input."""

    path: Path
    data: bytes | None = None

    @property
    def name(self) -> str:
        return "standard input" if self.data is not None else str(self.path)


def find_pictures(words: Sequence[str], stdin: BinaryIO | None, leave_out: Path) -> list[PictureFile]:
    """The pictures that `words` name, in that order, each once. What is in the folder `leave_out` is not among them.

    A word is a file, whatever it is called; a folder, of which all picture files are taken, those of its folders too,
    sorted, but hidden ones; a pattern with `*`, `?`, `[...]` or `**`, of which all files are taken; or `-` for `stdin`:
    paths, one a line or with NUL between them, or the bytes of one picture.

    Raises HdovdError for a word that gives nothing.
    """
    found: dict[str, PictureFile] = {}
    twice, own, inside = 0, 0, leave_out.resolve()
    for word in words:
        named = list(_of_stdin(stdin) if word == STANDARD_INPUT else map(PictureFile, _of_word(word)))
        if not named:
            raise HdovdError(f"{'standard input' if word == STANDARD_INPUT else printable(word)}: no pictures there")
        for picture in named:
            key = STANDARD_INPUT if picture.data is not None else os.path.abspath(picture.path)
            ours = picture.data is None and picture.path.resolve().is_relative_to(inside)
            own += ours
            twice += not ours and key in found
            if not ours:
                found.setdefault(key, picture)
    if twice:
        log(f"note: pictures that are named more than once, and taken once: {twice}")
    if own:
        log(f"note: pictures left out, since they are in {leave_out}, where the results go: {own}")
    if not found:
        raise HdovdError(
            "no pictures: name files, folders, patterns such as 'photos/**/*.jpg', or - for standard input"
        )
    return list(found.values())


def printable(name: str) -> str:
    """A path as it can be printed: names of files need not be text."""
    return os.fsencode(name).decode(errors="replace")


def _of_word(word: str) -> Iterator[Path]:
    path = Path(word)
    if path.is_dir():
        yield from _of_folder(path)
    elif path.exists():
        yield path
    elif glob.has_magic(word):
        yield from map(Path, sorted(name for name in glob.iglob(word, recursive=True) if os.path.isfile(name)))
    else:
        raise HdovdError(f"{printable(word)}: no such file or folder")


def _of_folder(folder: Path) -> Iterator[Path]:
    others: set[object] = set()
    for place, folders, files in os.walk(folder, onerror=lambda error: log(f"note: {error}: that folder is left out")):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            ending = os.path.splitext(name)[1].lower()
            if ending in ENDINGS:
                yield Path(place, name)
            else:
                others.add(ending or "(none)")
    if others:
        log(
            f"note: files in {printable(str(folder))} with these endings are no pictures, and left out: "
            f"{shorten(sorted(others, key=str))}"
        )


def _of_stdin(stdin: BinaryIO | None) -> Iterator[PictureFile]:
    data = b"" if stdin is None else stdin.read()
    if _is_picture(data):
        yield PictureFile(Path("stdin"), data)
        return
    data = data.removeprefix(BOM_UTF8)
    for line in data.split(b"\0" if b"\0" in data else b"\n"):
        if name := line.strip(b"\r\n"):
            yield PictureFile(Path(os.fsdecode(name)))


def _is_picture(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # a list of paths, or nothing
        return False
