"""Lists of names, one a line: files of a user's, and those that ship (`names/*.txt`)."""

from pathlib import Path

from hdovd.core import HdovdError, is_file, log, shorten
from hdovd.core.text_files import LONGEST_NAME, checked_name, read_text

GENERAL = "general"  # the vocabulary that ships; it stands beside file paths
_SHIPPED = Path(__file__).parent / "names"


def is_shipped(vocabulary: Path) -> bool:
    """Whether this is the name of the list that ships, and no path."""
    return str(vocabulary) == GENERAL


def read_vocabulary(path: Path, option: str = "--vocabulary", most: int = LONGEST_NAME) -> tuple[str, ...]:
    """The names of a file, one a line, or of the list that ships; blank lines and lines that begin with # do not count.

    `most`: characters of a name. Raises HdovdError if there is no such file, no name in it, or one that cannot be
    printed.
    """
    path = _SHIPPED / f"{GENERAL}.txt" if is_shipped(path) else path
    lines = [line.strip() for line in read_text(path, option, "one a line").splitlines()]
    names = tuple(
        dict.fromkeys(
            checked_name(line, f"{option} {path}: line {number}", most)
            for number, line in enumerate(lines, start=1)
            if line and not line.startswith("#")
        )
    )
    if not names:
        raise HdovdError(f"{option} {path} holds nothing; expected one a line")
    return names


def shipped(name: str) -> tuple[str, ...]:
    """The lines of a list that ships: general, stop, common, singular."""
    return read_vocabulary(_SHIPPED / f"{name}.txt")


def names_asked(text: str) -> tuple[str, ...]:
    """The names of `--classes`: with commas between them, or @FILE, one a line (@general: the list that ships).

    A name that comes twice, in capitals or not, is taken once, and told. Raises HdovdError if there is none.
    """
    if text.startswith("@"):
        names = list(read_vocabulary(Path(text[1:]), "--classes"))
    elif is_file(text):
        raise HdovdError(f"--classes {text} is a file: give @{text} for the names in it, one a line")
    else:
        names = [checked_name(" ".join(name.split()), "--classes: a name") for name in text.split(",") if name.strip()]
        if not names:
            raise HdovdError(f"--classes {text!r} names nothing: expected names with commas between them, or @FILE")
    first: dict[str, str] = {}
    if twice := [name for name in names if first.setdefault(name.casefold(), name) is not name]:
        log(f"note: --classes: named twice, taken once: {shorten(list(twice))}")
    return tuple(first.values())
