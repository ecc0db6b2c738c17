"""Which pictures and videos a command is to look at: files, folders, patterns, standard input, streams."""

import glob
import io
import os
import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from PIL import Image

from hdovd.core.errors import HdovdError, shorten
from hdovd.core.log import log
from hdovd.core.picture_header import ENDINGS

STANDARD_INPUT = "-"
VIDEO_ENDINGS = frozenset(
    (
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".mpg",
        ".mpeg",
        ".ts",
        ".mts",
        ".m2ts",
        ".wmv",
        ".flv",
        ".ogv",
        ".3gp",
    )
)
_MPEG_TS = re.compile(rb"(?s)(?:\x47.{187}){4}\x47|(?:\x47.{191}){4}\x47")  # packets; of camcorders with a time each
_CAMERA = re.compile(r"(?:camera:|/dev/video)(\d+)")


@dataclass(frozen=True, slots=True)
class PictureFile:
    """`name`: what it is called to the user. `data`: the picture itself, where it came by standard input. `url`: of a
    stream, with user, password and query, which the name leaves out; or `camera:0`.
    """

    path: Path
    data: bytes | None = None
    url: str | None = None

    @property
    def name(self) -> str:
        if self.url is not None:
            url = urlsplit(self.url)
            return url._replace(netloc=url.netloc.rpartition("@")[2], query="", fragment="").geturl()
        return "standard input" if self.data is not None else str(self.path)

    @property
    def is_video(self) -> bool:
        """By the ending; a file whose ending TypeScript has too by what is in it."""
        ending = self.path.suffix.lower()
        if self.url is None and ending in (".ts", ".mts") and self.path.is_file():
            with suppress(OSError), self.path.open("rb") as file:  # who reads it says why it cannot be
                return _MPEG_TS.search(file.read(1 << 16)) is not None
        return self.url is not None or ending in VIDEO_ENDINGS


def find_pictures(
    words: Sequence[str], stdin: BinaryIO | None, leave_out: Path, *, videos: bool = False
) -> list[PictureFile]:
    """The pictures that `words` name, in that order, each once. What is in the folder `leave_out` is not among them.

    A word is a file, whatever it is called; a folder, of which all picture files are taken, those of its folders too,
    sorted, but hidden ones; a pattern with `*`, `?`, `[...]` or `**`, of which all files are taken; or `-` for `stdin`:
    paths, one a line or with NUL between them, or the bytes of one picture; or a stream, `rtsp://...`, or a camera,
    `camera:0`. `videos`: those of folders too.

    Raises HdovdError for a word that gives nothing.
    """
    found: dict[str, PictureFile] = {}
    what = "pictures or videos" if videos else "pictures"
    twice, own, inside = 0, 0, leave_out.resolve()
    for word in words:
        named = list(_of_stdin(stdin) if word == STANDARD_INPUT else _of_word(word, videos))
        if not named:
            raise HdovdError(f"{'standard input' if word == STANDARD_INPUT else printable(word)}: no {what} there")
        for picture in named:
            key = picture.url or (STANDARD_INPUT if picture.data is not None else os.path.abspath(picture.path))
            ours = key == os.path.abspath(picture.path) and picture.path.resolve().is_relative_to(inside)
            own += ours
            twice += not ours and key in found
            if not ours:
                found.setdefault(key, picture)
    if twice:
        log(f"note: {what} that are named more than once, and taken once: {twice}")
    if own:
        log(f"note: {what} left out, since they are in {leave_out}, where the results go: {own}")
    if not found:
        raise HdovdError(f"no {what}: name files, folders, patterns such as 'photos/**/*.jpg', or - for standard input")
    return list(found.values())


def printable(name: str) -> str:
    """A path as it can be printed: names of files need not be text."""
    return os.fsencode(name).decode(errors="replace")


def _of_word(word: str, videos: bool) -> Iterator[PictureFile]:
    path = Path(word)
    if camera := _CAMERA.fullmatch(word):
        yield PictureFile(Path(f"camera{camera[1]}"), url=f"camera:{camera[1]}")
    elif re.match(r"\w+://", word):
        try:
            address = urlsplit(word)
        except ValueError as error:
            raise HdovdError(f"{printable(word)}: no address ({error})") from error
        yield PictureFile(Path(address.path.strip("/") or f"{address.hostname or 'stream'}.live"), url=word)
    elif path.is_dir():
        yield from _of_folder(path, videos)
    elif path.exists():
        yield PictureFile(path)
    elif glob.has_magic(word):
        yield from (
            PictureFile(Path(name)) for name in sorted(glob.iglob(word, recursive=True)) if os.path.isfile(name)
        )
    else:
        raise HdovdError(f"{printable(word)}: no such file or folder")


def _of_folder(folder: Path, videos: bool) -> Iterator[PictureFile]:
    others = Counter[str]()  # videos among them
    for place, folders, files in os.walk(folder, onerror=lambda error: log(f"note: {error}: that folder is left out")):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            ending, found = os.path.splitext(name)[1].lower(), PictureFile(Path(place, name))
            if ending in ENDINGS or (videos and found.is_video):
                yield found
            else:
                others[ending or "(none)"] += found.is_video
    if others:
        log(
            f"note: files in {printable(str(folder))} with these endings are no pictures{' or videos' * videos}, and "
            f"left out: {shorten(sorted(others))}"
            + ("; hdovd detect reads videos with pip install 'hdovd[video]'" if others.total() else "")
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
