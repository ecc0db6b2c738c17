"""Pickles of numbers, read without running what they ask for.

Unpickling calls whatever the file names. `load_arrays` names nothing but stand-ins of its own: no numpy function sees
an argument that the file chose unless it was checked here first, and every pickle instruction that arrays do not need is
refused. It is Python's own unpickler in Python, since the one in C can be made to fill memory by a file of ten bytes
(it keeps its memo in an array as long as the highest number in it).
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from hdovd.core.errors import HdovdError, system_reason

_NUMBER = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16)")
_PLAIN = (NoneType, bool, int, float, str, bytes)
_NDARRAY = object()  # what "numpy.ndarray" is here: a mark that cannot be called
_OPCODES = (
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE", "INT", "LONG", "BININT", "BININT1",
    "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "LIST", "EMPTY_LIST", "APPEND", "APPENDS", "DICT", "EMPTY_DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "GET",
    "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE",
)


class _Refused(Exception):
    """What the pickle asks for and does not get."""


@dataclass(slots=True)
class _Dtype:
    """Stands for `numpy.dtype`: a number type, whose byte order may be set afterwards."""

    value: np.dtype[Any]

    def build(self, state: Any) -> None:
        # Subarray, names, fields, size, alignment, flags: numpy believes these, so they must say "a plain number".
        match state:
            case (3 | 4, "<" | ">" | "=" | "|" as order, None, None, None, -1, -1, 0, *_):
                self.value = self.value.newbyteorder(order)
            case _:
                raise _Refused(f"a numpy.dtype that is more than {self.value}")


@dataclass(slots=True)
class _Array:
    """Stands for an array or a numpy scalar."""

    unpickler: _ArrayUnpickler
    value: Any = None

    def build(self, state: Any) -> None:
        match state:
            case (_, tuple() as shape, _Dtype() as dtype, bool() | int() as fortran, bytes() | str() as raw):
                self.value = _view(self.unpickler.encoded(raw), dtype, shape, "F" if fortran else "C")
            case _:
                raise _Refused("a numpy array whose state is not shape, number type and bytes")


@dataclass(frozen=True, slots=True)
class _Call:
    """Stands for a function that the pickle may call."""

    function: Callable[..., Any]


class _Opcodes(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        for known in pickletools.opcodes:
            if ord(known.code) == code:
                raise _Refused(f"the pickle instruction {known.name}")
        raise ValueError(f"no pickle instruction {code}")


def _view(raw: bytes | bytearray, dtype: _Dtype, shape: tuple[Any, ...], order: str, axes: Any = None) -> np.ndarray:
    """The array over `raw`, not a copy: a pickle that uses the same bytes a million times gains no memory by it."""
    if not all(type(side) is int and side >= 0 for side in shape):
        raise _Refused("a numpy array whose shape is not whole numbers")
    values: np.ndarray = np.frombuffer(raw, dtype.value)
    if values.dtype == bool and len(raw) and max(raw) > 1:
        raise _Refused("a boolean array with other values than 0 and 1")  # numpy counts and indexes wrongly with them
    if order == "K" and axes is not None:
        return values.reshape(shape).transpose(axes)
    return values.reshape(shape, order="F" if order == "F" else "C")


class _ArrayUnpickler(pickle._Unpickler):
    stack: list[Any]
    read: Callable[[int], bytes]

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")  # Python 2 has no bytes type: its arrays hold such text
        self.text_left = len(data)
        multiarray = {"_reconstruct": _Call(self._reconstruct), "scalar": _Call(self._scalar)}
        numeric = {"_frombuffer": _Call(self._from_buffer)}
        self.known: dict[tuple[str, str], object] = {
            ("numpy", "ndarray"): _NDARRAY, ("numpy", "dtype"): _Call(self._dtype), ("_codecs", "encode"): _Call(self._encode),
            **{(f"numpy.{core}.{module}", name): call for core in ("core", "_core")
               for module, calls in (("multiarray", multiarray), ("numeric", numeric)) for name, call in calls.items()},
            **{(builtins, "bytes"): _Call(self._no_bytes) for builtins in ("builtins", "__builtin__")},
        }

    def find_class(self, module: str, name: str, /) -> Any:
        """Names are looked up whole: a dotted name walks from no object to the next."""
        if (module, name) not in self.known:
            raise _Refused(_shown(f"{module}.{name}"))
        return self.known[module, name]

    def encoded(self, raw: bytes | str) -> bytes:
        """Bytes that were pickled as text. A text that is used again and again may not grow past the file's own size."""
        if isinstance(raw, bytes):
            return raw
        self.text_left -= len(raw)
        if self.text_left < 0:
            raise _Refused("more bytes than the file holds")
        return raw.encode("latin1")

    def _dtype(self, code: Any, *_: Any) -> _Dtype:
        if not isinstance(code, str) or not _NUMBER.fullmatch(code):
            raise _Refused(f"numpy.dtype {_shown(code)}, which is no number type")
        return _Dtype(np.dtype(code))

    def _reconstruct(self, kind: Any, *_: Any) -> _Array:
        if kind is not _NDARRAY:
            raise _Refused("a numpy array of another class than numpy.ndarray")
        return _Array(self)

    def _from_buffer(self, raw: bytes | bytearray, dtype: _Dtype, shape: tuple[Any, ...] | int, order: str, axes: Any = None) -> _Array:
        if type(raw) not in (bytes, bytearray) or type(dtype) is not _Dtype:
            raise _Refused("numpy._frombuffer of something else than bytes and a number type")
        return _Array(self, _view(raw, dtype, shape if isinstance(shape, tuple) else (shape,), order, axes))

    def _scalar(self, dtype: _Dtype, raw: bytes | str) -> _Array:
        if type(dtype) is not _Dtype or not isinstance(raw, bytes | str):
            raise _Refused("a numpy scalar that is not bytes and a number type")
        return _Array(self, _view(self.encoded(raw), dtype, (), "C")[()])

    def _encode(self, text: Any, encoding: Any = None) -> bytes:
        if type(text) is not str or encoding != "latin1":  # other codecs import modules and expand what they are given
            raise _Refused(f"_codecs.encode with the codec {_shown(encoding)}")
        return self.encoded(text)

    def _no_bytes(self) -> bytes:
        return b""  # how protocol 2 says it; bytes of a number would be that many zeros

    def load_reduce(self) -> None:
        arguments, call = self.stack.pop(), self.stack[-1]
        if type(call) is not _Call or type(arguments) is not tuple:
            raise _Refused(f"a call of {type(call).__name__}")
        self.stack[-1] = call.function(*arguments)

    def load_build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if not isinstance(built, _Array | _Dtype):  # Python would set attributes of it
            raise _Refused(f"attributes of {type(built).__name__}")
        built.build(state)

    def load_bytearray8(self) -> None:
        self.stack.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))  # Python's reserves the memory first

    dispatch = _Opcodes({getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES}
                        | {pickle.REDUCE[0]: load_reduce, pickle.BUILD[0]: load_build, pickle.BYTEARRAY8[0]: load_bytearray8})


def _shown(text: Any) -> str:
    """What the file wrote, fit for a terminal; only text is shown: to print a list that holds itself twice, again and again, has no end."""
    return ascii(text[:100])[1:-1] if isinstance(text, str) else f"of type {type(text).__name__}"


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """`value` with arrays for their stand-ins. `done`, by id: what stands in many places is converted once."""
    if type(value) in _PLAIN:
        return value
    if id(value) not in done:
        if isinstance(value, _Array) and value.value is not None:
            done[id(value)] = value.value
        elif type(value) in (list, tuple):
            done[id(value)] = type(value)(_plain(item, done) for item in value)
        elif type(value) is dict:
            done[id(value)] = {_plain(key, done): _plain(item, done) for key, item in value.items()}
        else:
            raise _Refused(f"a value of type {type(value).__name__.strip('_').lower()}")
    return done[id(value)]


def load_arrays(path: Path) -> Any:
    """The content of a pickle file: numeric and boolean numpy arrays (some not writable), numpy scalars, and lists,
    tuples, dicts, text, bytes, numbers and None.

    Raises HdovdError if there is no such file, if it holds or calls anything else, or is no whole pickle.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise HdovdError(f"cannot read {path}: {system_reason(error)}") from error
    try:
        if not data.endswith(pickle.STOP):
            raise EOFError("it does not end as pickles do")
        unpickler = _ArrayUnpickler(data)
        loaded = _plain(unpickler.load(), {})
        if unpickler.read(1):
            raise ValueError("it goes on after its end")
        return loaded
    except _Refused as refused:
        raise HdovdError(f"{path} was not loaded: its pickle asks for {refused}, and a pickle can run any program that way. Expected "
                         "plain numeric numpy arrays in lists, tuples or dicts; if you trust its source, save it anew as those") from None
    except Exception as error:  # a damaged pickle fails in every way that Python has
        reason = "nested too deeply" if isinstance(error, RecursionError) else _shown(f"{type(error).__name__}: {error}")
        raise HdovdError(f"{path} is no pickle, or a damaged one ({reason}); expected a pickle of numpy arrays: is the download "
                         "complete?") from error
