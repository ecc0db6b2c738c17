"""Pickles of numbers, read without running what they ask for.

Unpickling calls whatever the file names. Here a file can name nothing but the functions of `_ArrayUnpickler`, which
check what they are given before numpy sees it, and nothing but arrays and number types takes a state. It is Python's
own unpickler in Python, since a file of ten bytes can make the one in C fill memory (its memo is an array as long as
the highest number in it).
"""

import io
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hdovd.core.errors import HdovdError, system_reason

_NUMBER = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16)")
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_MODULES = {
    "_reconstruct": _MULTIARRAY,
    "scalar": _MULTIARRAY,
    "_frombuffer": ("numpy.core.numeric", "numpy._core.numeric"),
    "ndarray": ("numpy",),
    "dtype": ("numpy",),
    "encode": ("_codecs",),
    "bytes": ("builtins", "__builtin__"),
}


class _Refused(Exception):
    """What the pickle asks for and does not get."""


class _ArrayUnpickler(pickle._Unpickler):
    stack: list[Any]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")  # Python 2 has no bytes type: its arrays hold such text
        self._bytes_left = 2 * len(data)  # text becomes bytes, and these an array
        self._known = {
            "_reconstruct": self._reconstruct,
            "scalar": self._scalar,
            "_frombuffer": self._from_buffer,
            "ndarray": "numpy.ndarray",  # named in every array and never called: no class may be within reach
            "dtype": self._dtype,
            "encode": self._encode,
            "bytes": self._no_bytes,
        }

    def find_class(self, module: str, name: str, /) -> Any:
        """Names are looked up whole: a dotted name walks from no object to the next."""
        if module not in _MODULES.get(name, ()):
            raise _Refused(_shown(f"{module}.{name}"))
        return self._known[name]

    def load_build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        match built, state:
            case np.ndarray(), (
                _,
                tuple() as shape,
                np.dtype() as dtype,
                bool() | int() as fortran,
                bytes() | str() as raw,
            ):
                self.stack[-1].__setstate__((1, shape, dtype, bool(fortran), self._raw(raw, dtype, shape)))
            # Subarray, names, fields, size, alignment, flags: numpy believes these, so they must say "a plain number".
            case np.dtype(), (3 | 4, "<" | ">" | "=" | "|" as order, None, None, None, -1, -1, 0, *_):
                self.stack[-1].__setstate__((3, order, None, None, None, -1, -1, 0))
            case np.dtype(), _:
                raise _Refused(f"a numpy.dtype that is more than {built}")
            case _:
                raise _Refused(
                    f"attributes of {type(built).__name__} that are not shape, number type and bytes of an array"
                )

    def load_setitem(self) -> None:
        self._fill([self.stack.pop(-2), self.stack.pop()])

    def load_setitems(self) -> None:
        self._fill(self.pop_mark())

    def _fill(self, items: list[Any]) -> None:
        """Keys and values in turn, of a dict: an array would take lists of lists for a key, and make as much of them as
        they say.
        """
        if type(self.stack[-1]) is not dict:
            raise _Refused(f"items of {type(self.stack[-1]).__name__}")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def load_bytearray8(self) -> None:
        self.stack.append(
            bytearray(self.read(int.from_bytes(self.read(8), "little")))
        )  # Python's reserves the memory first

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }

    def _raw(
        self, raw: bytes | bytearray | str, dtype: Any = None, shape: tuple[Any, ...] | None = None
    ) -> bytes | bytearray:
        """Bytes, which Python 2 and protocol 2 pickle as text; all of them together may not be more than such a file
        holds.

        With a shape: bytes that fill an array.
        """
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        self._bytes_left -= len(raw)
        if self._bytes_left < 0:
            raise _Refused("more bytes than the file holds")
        if shape is not None and (
            type(raw) not in (bytes, bytearray)
            or not isinstance(dtype, np.dtype)
            or not all(type(side) is int and side >= 0 for side in shape)
            or math.prod(shape) * dtype.itemsize != len(raw)
        ):
            raise _Refused("a numpy array whose shape, number type and bytes do not fit together")
        return raw

    def _dtype(self, code: Any, *_: Any) -> np.dtype[Any]:
        if not isinstance(code, str) or not _NUMBER.fullmatch(code):
            raise _Refused(f"numpy.dtype {_shown(code)}, which is no number type")
        return np.dtype(code, False, True)  # a copy, which takes a state

    def _reconstruct(self, *_: Any) -> np.ndarray:
        return np.zeros(0)  # its state follows

    def _from_buffer(self, raw: bytes, dtype: np.dtype[Any], shape: Any, order: Any, axes: Any = None) -> np.ndarray:
        shape = shape if isinstance(shape, tuple) else (shape,)
        values: np.ndarray = np.frombuffer(self._raw(raw, dtype, shape), dtype)
        if order == "K" and axes is not None:
            return values.reshape(shape).transpose(axes)
        return values.reshape(shape, order="F" if order == "F" else "C")

    def _scalar(self, dtype: np.dtype[Any], raw: bytes | str) -> Any:
        return np.frombuffer(self._raw(raw, dtype, ()), dtype)[0]

    def _encode(self, text: Any, encoding: Any = None) -> bytes | bytearray:
        if type(text) is not str or encoding != "latin1":  # other codecs import modules and expand what they are given
            raise _Refused(f"_codecs.encode with the codec {_shown(encoding)}")
        return self._raw(text)

    def _no_bytes(self) -> bytes:
        return b""  # how protocol 2 says it; bytes of a number would be that many zeros


def _shown(text: Any) -> str:
    """What the file wrote, fit for a terminal; only text is shown: a list that holds itself has no end."""
    return ascii(text[:100])[1:-1] if isinstance(text, str) else f"of type {type(text).__name__}"


def load_arrays(path: Path) -> Any:
    """The content of a pickle file: numeric and boolean numpy arrays, numpy scalars, and containers of them, text and
    numbers.

    Raises HdovdError if there is no such file, if it names or calls anything else, or is no whole pickle.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise HdovdError(f"cannot read {path}: {system_reason(error)}") from error
    try:
        if not data.endswith(pickle.STOP):
            raise EOFError("it does not end as pickles do")
        unpickler = _ArrayUnpickler(data)
        loaded = unpickler.load()
        if unpickler.read(1):
            raise ValueError("it goes on after its end")
        return loaded
    except _Refused as refused:
        raise HdovdError(
            f"{path} was not loaded: its pickle asks for {refused}, and a pickle can run any program that way. "
            "Expected plain numeric numpy arrays in lists, tuples or dicts; if you trust its source, save it anew as "
            "those"
        ) from None
    except Exception as error:  # a damaged pickle fails in every way that Python has
        raise HdovdError(
            f"{path} is no pickle, or a damaged one ({_shown(f'{type(error).__name__}: {error}')}); expected a pickle "
            f"of numpy arrays: is the download complete?"
        ) from error
