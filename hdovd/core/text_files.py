"""Text files that people bring: read whole, in UTF-8 with or without a byte-order mark, unpacked where they are gzip's;
and large JSON files, one list item at a time.

Every reader of such a file comes here, and every check of a value in one ends in a message of `shown`, which fits into
a line whatever the value is.
"""

import codecs
import difflib
import gzip
import json
import re
import tomllib
import zlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import IO, Any, cast

from hdovd.core import HdovdError, is_file, system_reason

DAMAGED = (OSError, EOFError, zlib.error)  # what reading a file raises, a packed one too
LONGEST_NAME = 200
LONGEST_PATH = 4096
_CUT = 80
# Control characters, line separators, marks that turn the direction of what follows, byte-order marks, halves of
# surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def open_bytes(path: Path) -> IO[bytes]:
    """A file for reading, unpacked if it is gzip's, whatever its name. Raises HdovdError if it cannot be opened."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        return cast(IO[bytes], gzip.open(path)) if packed else path.open("rb")
    except OSError as error:
        raise HdovdError(f"cannot read {path}: {system_reason(error)}") from error


def read_text(path: Path, what: str, expected: str = "") -> str:
    """The text of a file, without a byte-order mark. `what`: the file in messages, such as an option; `expected`: what
    it should hold.

    Raises HdovdError if there is no such file, or it is no text in UTF-8.
    """
    if not path.is_file():
        raise HdovdError(f"{what} {path}: no such file{expected and f'; expected {expected}'}")
    try:
        with open_bytes(path) as file:
            return file.read().decode("utf-8-sig")
    except (*DAMAGED, UnicodeDecodeError) as error:
        raise HdovdError(
            f"{what} {path} is no text file in UTF-8 ({error}){expected and f'; expected {expected}'}"
        ) from error


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file whole (`JsonStream` is for the large ones). Raises HdovdError naming it."""
    try:
        return json.loads(read_text(path, what, "JSON"))
    except (ValueError, RecursionError) as error:
        raise HdovdError(f"{what} {path} is not valid JSON ({json_fault(error)}); is the download complete?") from error


def json_lines(path: Path, expected: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and the object of each line of a file that is not empty; packed by gzip or not. Raises HdovdError
    naming the line that holds none, and what was `expected`.
    """
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}: line {number}"
                if not line.strip():
                    continue
                try:
                    tree = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    raise HdovdError(f"{where} is no JSON ({json_fault(error)}): expected {expected}") from error
                if not isinstance(tree, dict):
                    raise HdovdError(f"{where} is {shown(tree)}: expected {expected}")
                yield where, tree
    except DAMAGED as error:
        raise HdovdError(f"{path} is damaged ({error}): expected lines such as {expected}") from error


def json_fault(error: ValueError | RecursionError) -> str:
    """Why a text is no JSON that can be read."""
    if isinstance(error, json.JSONDecodeError):
        return cut(str(error))
    return (
        "it is nested too deeply"
        if isinstance(error, RecursionError)
        else "it holds a whole number of thousands of digits"
    )


def read_toml(path: Path, what: str, expected: str = "TOML") -> dict[str, Any]:
    """Parse a TOML file; arguments as of `read_text`. Raises HdovdError naming it."""
    text = read_text(path, what, expected)
    try:
        return parse_toml(text)
    except HdovdError as error:
        raise HdovdError(f"{what} {path} is {error}; expected {expected}") from error


def shipped(folder: str) -> list[str]:
    """The names of the TOML files that the package brings in "recipes" or "protocols"."""
    return sorted(
        Path(file.name).stem
        for file in resources.files("hdovd").joinpath(folder).iterdir()
        if file.name.endswith(".toml")
    )


def read_shipped(name_or_file: str, what: str, content: str = "") -> dict[str, Any]:
    """The values of a TOML file that the package brings, by name, or of one of the user's. `what`: "recipe" or
    "protocol"; `content`: of such a file, for the message. Raises HdovdError if there is no such file, or it is no
    TOML.
    """
    known = shipped(f"{what}s")
    if name_or_file in known:
        return parse_toml(resources.files("hdovd").joinpath(f"{what}s", f"{name_or_file}.toml").read_text("utf-8"))
    if is_file(name_or_file):
        return read_toml(Path(name_or_file), what)
    near = difflib.get_close_matches(name_or_file, known, 1)
    raise HdovdError(
        f"no {what} {cut(name_or_file)!r}{f', did you mean {near[0]!r}' if near else ''}: "
        f"give one of {', '.join(known)}, or a TOML file{content}"
    )


def parse_toml(text: str) -> dict[str, Any]:
    """A TOML document. Raises HdovdError that begins with "not valid TOML"."""
    try:
        return tomllib.loads(text)
    except (
        ValueError,
        RecursionError,
    ) as error:  # numbers of thousands of digits are a ValueError, as TOMLDecodeError is
        why = "it is nested too deeply" if isinstance(error, RecursionError) else cut(str(error))
        raise HdovdError(f"not valid TOML ({why})") from error


def cut(text: str, most: int = 300) -> str:
    """A text that fits into a message: what cannot be printed is escaped, and what is too much is left out."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text[:most]) + ("..." if len(text) > most else "")


def shown(value: object) -> str:
    """A value of a file, for a message that wants another one there: texts and numbers, cut; of all else the kind."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return f"the text {value[:_CUT]!r}" + ("..." if len(value) > _CUT else "")
        case int() if abs(value) >> 64:
            return "a number of more than 64 bits"
        case int() | float():
            return str(value)
        case list() | tuple():
            return "a list"
        case dict():
            return "an object"
    return f"of type {type(value).__name__}"


def checked_name(value: Any, where: str, most: int = LONGEST_NAME) -> str:
    """`value` if it is a name: text that is not blank, that a terminal can print, of at most `most` characters.

    `where`: what it is the name of, for the message. Raises HdovdError.
    """
    if isinstance(value, str) and value.strip() and len(value) <= most and not _UNPRINTABLE.search(value):
        return value
    length = f" of {len(value):,d} characters" if isinstance(value, str) and len(value) > most else ""
    raise HdovdError(
        f"{where} is {shown(value)}{length}, expected a name: {most} characters at most, and none that "
        "cannot be printed"
    )


def printable(tree: Any) -> bool:
    """Whether all texts and keys of JSON values can be printed."""
    if isinstance(tree, dict):
        return all(map(printable, tree)) and all(map(printable, tree.values()))
    if isinstance(tree, list):
        return all(map(printable, tree))
    return not (isinstance(tree, str) and _UNPRINTABLE.search(tree))


# --- large JSON files: `json.loads` of COCO's 450 MB of annotations takes several gigabytes ---

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_MARGIN = 16  # what ends, or fails, this near the end of the text may be cut: 12|34, 1e+|5, -Infinit|y, \ud83|d


class JsonStream:
    """Iterates over `(key, item)` of every list in a top-level object; its other values come whole, as `(key, value)`.

    The items of a top-level list, or another top-level value whole, have the key None. `lists` holds the keys of
    the lists met so far, empty ones too. `block`: bytes read at a time; the text held is that, or twice the longest
    item.

    A file of gzip's is unpacked on the way, and a byte-order mark passed over.

    Iterating raises HdovdError if there is no such file, it is not JSON in UTF-8, or two lists have one key.
    """

    def __init__(self, path: Path, what: str, block: int = 1 << 20) -> None:
        self.path, self.what, self.block, self.lists = path, what, block, set[str | None]()

    def __iter__(self) -> Iterator[tuple[str | None, Any]]:
        self.lists.clear()
        self._text, self._at, self._dropped, self._utf8 = "", 0, 0, codecs.getincrementaldecoder("utf-8-sig")()
        with open_bytes(self.path) as self._file:
            try:
                yield from self._document()
            except (*DAMAGED, ValueError, RecursionError) as error:
                if isinstance(error, json.JSONDecodeError):
                    why = f"{error.msg}: char {self._dropped + error.pos}"
                elif isinstance(error, UnicodeDecodeError):  # its object ends where the file was read to
                    why = f"{error.reason}: byte {self._file.tell() - len(error.object) + error.start}"
                else:
                    why = str(error) if isinstance(error, DAMAGED) else json_fault(error)
                raise HdovdError(
                    f"{self.what} {self.path} is not valid JSON ({why}); is the download complete?"
                ) from error

    def items(self, expected: str) -> Iterator[Any]:
        """The items of a top-level list, of which the file is `expected` to be. Raises HdovdError for another thing."""
        for _, item in self:
            if None not in self.lists:
                break
            yield item
        if None not in self.lists:
            raise HdovdError(f"{self.path} is no {expected}")

    def _document(self) -> Iterator[tuple[str | None, Any]]:
        if self._peek() == "{":
            for _ in self._parts("}"):
                self._expect('"', "Expecting property name enclosed in double quotes")
                key = self._value()
                self._expect(":", "Expecting ':' delimiter")
                self._at += 1
                yield from self._member(key)
        else:
            yield from self._member(None)
        self._expect("", "Extra data")

    def _member(self, key: str | None) -> Iterator[tuple[str | None, Any]]:
        if key in self.lists and self._peek() == "[":
            raise HdovdError(f"{self.what} {self.path}: the list {cut(str(key))!r} stands twice")
        if self._peek() == "[":
            self.lists.add(key)
            for _ in self._parts("]"):
                yield key, self._value()
        else:
            yield key, self._value()

    def _parts(self, closing: str) -> Iterator[None]:
        """Step from the opening bracket to each part, which the caller reads, and past the closing bracket."""
        self._at += 1
        more = self._peek() != closing
        while more:
            yield
            more = self._peek() == ","
            self._at += more
        self._expect(closing, "Expecting ',' delimiter")
        self._at += 1

    def _value(self) -> Any:
        while True:
            self._peek()
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:  # of a string, it names the start
                cut = error.pos + _MARGIN > len(self._text) or error.msg.startswith("Unterminated string")
                if not (cut and self._fill()):
                    raise
            else:
                if end + _MARGIN <= len(self._text) or not self._fill():
                    self._at = end
                    return value

    def _peek(self) -> str:
        """The next character that is no white space, at `_at`; empty at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it always matches
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                return ""

    def _expect(self, character: str, complaint: str) -> None:
        if self._peek() != character:
            raise json.JSONDecodeError(complaint, self._text, self._at)

    def _fill(self) -> bool:
        """Drop what was read, and at least double the rest; False, and nothing dropped, at the end of the file."""
        data = self._file.read(max(self.block, len(self._text) - self._at))
        more = self._utf8.decode(data, final=not data)
        if data:
            self._text, self._at, self._dropped = self._text[self._at :] + more, 0, self._dropped + self._at
        return bool(data)
