"""Pickled proposals, read without running what a pickle asks for, into the columns of `file.ProposalTable`.

- mmdetection's: a list of (n, 4 or 5) arrays xyxy (and score), one an image, in the order of the annotation file's
  `images` (mmdetection 2 and HD-OVD's loader read it so), or by ascending image id (OADP's `proposal_sorted`).
- Detectron2's: a dict with `ids`, `boxes`, `objectness_logits` (older: `indexes`, `scores`), and `bbox_mode` 0 (xyxy,
  the default) or 1 (xywh); also that of LVIS and the Detectron2-based projects.

Unpickling calls whatever the file names. Here a file can name nothing but the functions below, which check what they
are given before numpy sees it, and nothing but arrays and number types takes a state. mmdetection 3 pickles objects of
its own classes by file name, which is refused.
"""

import io
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hdovd.core import HdovdError, Unfit, system_reason
from hdovd.core.text_files import JsonStream, shown
from hdovd.data.coco import whole
from hdovd.pipelines.common.options import ListOrder

Columns = tuple[np.ndarray, np.ndarray, np.ndarray, str, tuple[str, ...]]  # as `ProposalTable` begins
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
_RENAMED = {"indexes": "ids", "scores": "objectness_logits"}
_MOST_OUTSIDE = 0.01  # of the boxes: mmdetection cuts proposals to the image, so in the right order none reach out


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
        if not data.endswith(pickle.STOP):  # cut, perhaps in a name that would be refused
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


def boxes_of(value: Any, what: str, columns: tuple[int, ...] = (4, 5)) -> tuple[np.ndarray, np.ndarray]:
    """An array (n, 4 or 5) that a stranger's file holds as boxes (n, 4) and scores (n,), 1 without any; float32.

    Raises Unfit, naming it as `what`, for anything else.
    """
    if isinstance(value, np.ndarray) and value.size == 0:
        return np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    if (
        not isinstance(value, np.ndarray)
        or value.dtype.kind not in "iuf"
        or value.ndim != 2
        or value.shape[1] not in columns
    ):
        found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        expected = " or ".join(f"(n, {count})" for count in columns)
        raise Unfit(f"{what} is no array of boxes: expected {expected} numbers, found {found}")
    with np.errstate(over="ignore"):
        rows = value.astype(np.float32)
    return rows[:, :4], rows[:, 4] if rows.shape[1] == 5 else np.ones(len(rows), np.float32)


def read_pickle(path: Path, annotations: Path | None, order: ListOrder) -> Columns:
    """The pickles of mmdetection and Detectron2. `annotations` and `order`: what tells the images of a list.

    Raises HdovdError if it is unsafe, damaged or of another form, or for a list that does not fit the annotation file.
    """
    content = load_arrays(path)
    if isinstance(content, dict):
        return _of_dict({_RENAMED.get(name, name): value for name, value in content.items()}, path)
    if not isinstance(content, list):
        raise HdovdError(
            f"{path} is no proposal file: expected a list of arrays or a dict with ids and boxes, found a "
            + type(content).__name__
        )
    if annotations is None:
        raise HdovdError(
            f"{path} is a list of {len(content)} arrays that go with images by their place alone: give the annotation "
            f"file that they were made for with --annotations"
        )
    return _of_list(content, path, annotations, order)


def _of_list(content: list[Any], path: Path, annotations: Path, order: ListOrder) -> Columns:
    images = _images(annotations)
    if len(content) != len(images):
        raise HdovdError(
            f"{path} holds proposals for {len(content)} images, {annotations} lists {len(images)}, and they go "
            f"together by place in the list: give the annotation file that the proposals were made for"
        )
    parts = [_boxes(entry, f"{path}: entry {place}") for place, entry in enumerate(content)]
    counts = [len(boxes) for boxes, _ in parts]
    box = np.concatenate([np.zeros((0, 4), np.float32), *(boxes for boxes, _ in parts)])
    ids = {each: list(images) if each is ListOrder.FILE else sorted(images) for each in ListOrder}
    outside = {}
    for each in ListOrder:
        size = np.array([images[number] for number in ids[each]], np.float32).repeat(counts, axis=0)
        outside[each] = int(((box[:, 2:] > size + 1).any(axis=1) | (box[:, :2] < -1).any(axis=1)).sum())
    notes: tuple[str, ...] = (
        f"{path.name} is a list without image ids: it was taken to go with the images of {annotations} "
        f"{order.words} (--order {order})",
    )
    if outside[order] > _MOST_OUTSIDE * len(box):
        other = next(each for each in ListOrder if each is not order)
        found = f"{outside[order]:,d} of {len(box):,d} boxes reach out of their image"
        if outside[other] * 10 < outside[order]:
            raise HdovdError(
                f"{path} does not fit {annotations} {order.words}: {found}, {other.words} {outside[other]:,d} do. "
                f"Convert it: hdovd proposals convert {path} --annotations {annotations} --order {other} --out NEW.npz"
            )
        notes += (f"{found}: is that the annotation file that they were made for?",)
    score = np.concatenate([np.zeros(0, np.float32), *(scores for _, scores in parts)])
    return np.array(ids[order], np.int64).repeat(counts), box, score, f"a pickled list, {order.words}", notes


def _images(annotations: Path) -> dict[int, list[int]]:
    """Width and height of an annotation file's images by id, in its order; reads no further than it must."""
    sizes: dict[int, list[int]] = {}
    for key, item in JsonStream(annotations, "annotations"):
        if key == "images":
            where = f"{annotations}: image number {len(sizes)}"
            if not isinstance(item, dict):
                raise HdovdError(f"{where} is {shown(item)}, expected an image")
            number, *size = (whole(item.get(name), f"{where}: {name}") for name in ("id", "width", "height"))
            sizes[number] = size
        elif sizes:
            break
    return sizes


def _of_dict(content: dict[Any, Any], path: Path) -> Columns:
    """Detectron2's: every value but `bbox_mode` has an entry an image."""
    needed = ("ids", "boxes", "objectness_logits")
    if not set(needed) <= content.keys():
        raise HdovdError(
            f"{path} is no proposal file: expected a dict with {', '.join(needed)}, found one with "
            + ", ".join(map(shown, list(content)[:6]))
        )
    ids, boxes, scores = (content[name] for name in needed)
    mode = _plain(content.get("bbox_mode", 0))
    if type(mode) is not int or mode not in (0, 1):
        raise HdovdError(f"{path}: bbox_mode is {shown(mode)}: expected 0 (xyxy) or 1 (xywh), in pixels")
    try:
        numbers = [
            whole(int(i) if isinstance(i, str) and i.isdecimal() else _plain(i), f"{path}: one of ids") for i in ids
        ]
        if not len(numbers) == len(boxes) == len(scores) or len(set(numbers)) < len(numbers):
            raise ValueError(
                f"{len(numbers)} ids ({len(set(numbers))} different), {len(boxes)} boxes, {len(scores)} scores"
            )
    except (ValueError, TypeError) as error:
        raise HdovdError(
            f"{path}: ids, boxes and objectness_logits need one entry an image, and whole numbers as ids: {error}"
        ) from error
    parts = [_boxes(own, f"{path}: image {i}")[0] for i, own in zip(numbers, boxes, strict=True)]
    logits = [
        _scores(own, f"{path}: image {i}", len(part)) for i, own, part in zip(numbers, scores, parts, strict=True)
    ]
    box = np.concatenate([np.zeros((0, 4), np.float32), *parts])
    if mode == 1:
        box[:, 2:] += box[:, :2]
    image_id = np.array(numbers, np.int64).repeat([len(own) for own in parts])
    score = np.concatenate([np.zeros(0, np.float32), *logits])
    return image_id, box, score, "a pickled dict of Detectron2's form", ()


def _plain(value: Any) -> Any:
    """The Python number of numpy's."""
    return value.item() if isinstance(value, np.generic) else value


def _scores(value: Any, what: str, count: int) -> np.ndarray:
    """(count,) float32 of an array or a list of numbers."""
    try:
        values = np.asarray(value).reshape(-1)
    except ValueError:  # lists of different lengths
        values = np.array(None)
    if values.dtype.kind not in "iuf":
        raise HdovdError(f"{what}: objectness_logits are {shown(value)} of something else than numbers")
    if len(values) != count:
        raise HdovdError(f"{what} has {count} boxes and {len(values)} objectness_logits")
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _boxes(value: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and scores as `boxes_of`; a detector of one class has a list of one array."""
    return boxes_of(value[0] if isinstance(value, list | tuple) and len(value) == 1 else value, what)
