"""Large JSON files, one list item at a time: `json.loads` of COCO's 450 MB of annotations takes several gigabytes."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hdovd.core.errors import HdovdError
from hdovd.core.text_files import DAMAGED, cut, json_fault, open_bytes

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
        if not self.path.is_file():
            raise HdovdError(f"{self.what}: no file {self.path}")
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
        if self._peek() != "[":
            yield key, self._value()
            return
        if key in self.lists:
            raise HdovdError(f"{self.what} {self.path}: the list {cut(str(key))!r} stands twice")
        self.lists.add(key)
        for _ in self._parts("]"):
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
