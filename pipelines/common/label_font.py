"""A font for a label. Pillow's own has the letters of English and its neighbours; for others the system is asked."""

import shutil
import subprocess
from functools import lru_cache

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_NO_CHARACTER = "\U0010ffff"  # which no font has: it is drawn as what stands for a missing one
_COMMON = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "Arial.ttf")


def label_font(text: str, size: int) -> Font:
    """Pillow's own font, or where it lacks a character of `text` the first found that has them all; its own again if
    none has.
    """
    own = _own(size)
    unknown = frozenset(character for character in text if not character.isspace() and not _has(own, character))
    return own if not unknown else _system_font(unknown, size) or own


def cut_label(text: str, width: float, size: int) -> str:
    """The text, with dots at its end if it is wider than `width` pixels."""
    font = label_font(text, size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


@lru_cache(maxsize=32)
def _own(size: int) -> Font:
    return ImageFont.load_default(size)


@lru_cache(maxsize=4096)
def _has(font: Font, character: str) -> bool:
    if ord(character) < 128 or not isinstance(
        font, ImageFont.FreeTypeFont
    ):  # without FreeType there is one font, and no choice
        return True
    mask, missing = font.getmask(character), font.getmask(_NO_CHARACTER)
    return mask.size != missing.size or bytes(mask) != bytes(missing)


@lru_cache(maxsize=256)
def _system_font(characters: frozenset[str], size: int) -> Font | None:
    for name, face in (*_by_fontconfig(characters), *((name, 0) for name in _COMMON)):
        try:
            font = ImageFont.truetype(name, size, face)
        except OSError:  # not here, or a kind that FreeType does not draw
            continue
        if all(_has(font, character) for character in characters):
            return font
    return None


@lru_cache(maxsize=256)
def _by_fontconfig(characters: frozenset[str]) -> tuple[tuple[str, int], ...]:
    """What fontconfig, where there is one, names for these characters: file and face."""
    if shutil.which("fc-match") is None:
        return ()
    wanted = ":charset=" + " ".join(f"{ord(character):x}" for character in sorted(characters))
    try:
        found = subprocess.run(
            ["fc-match", "-f", "%{file}\t%{index}", wanted], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    file, _, face = found.stdout.partition("\t")
    return ((file, int(face) & 0xFFFF),) if face.isdigit() else ()  # the upper half numbers variations
