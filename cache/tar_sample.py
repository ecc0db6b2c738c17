"""One image in the tar form: what is in its sample, and the bytes of its files. See `tar_shards` for the names of the
files.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.cache.schema import ROW_ARRAYS, TABLE_ARRAYS, TOP_ARRAYS, Level

MEMBERS = {
    "boxes": (Level.BOXES, "box"),
    "source": (Level.BOXES, "source"),
    "score": (Level.BOXES, "score"),
    "annotation_id": (Level.BOXES, "annotation_id"),
    "instance": (Level.INSTANCE, "embedding"),
    "image": (Level.IMAGE, "embedding"),
    "noun": (Level.PSEUDO_LABEL, "noun"),
    "noun_cosine": (Level.PSEUDO_LABEL, "noun_cosine"),
    "top_noun": (Level.PSEUDO_LABEL, "top_noun"),
    "top_weight": (Level.PSEUDO_LABEL, "top_weight"),
}
DTYPES = {
    name: np.dtype(
        (TABLE_ARRAYS[level] | {a: dtype for a, (dtype, _) in (ROW_ARRAYS[level] | TOP_ARRAYS).items()})[array]
    )
    for name, (level, array) in MEMBERS.items()
}
RawSample = dict[str, Any]  # a sample as webdataset groups it: bytes by extension, and "__key__"


@dataclass(frozen=True, slots=True)
class TarSample:
    """`about`: its .json. `picture`: its file as it was, or None. `arrays`: by name in MEMBERS, of the levels that
    there are.
    """

    image_id: int
    about: dict[str, Any]
    picture: bytes | None
    arrays: dict[str, np.ndarray]

    def files(self) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
        """Its files: of no time and no owner, so that they are the same bytes whenever they are made."""
        extension = None if self.picture is None else _extension(self.about["file_name"])
        if extension is not None and self.picture is not None:
            yield self._file(extension, self.picture)
        yield self._file("json", json.dumps({**self.about, "picture": extension}).encode())
        for name in MEMBERS:
            if name in self.arrays:
                file = io.BytesIO()
                np.lib.format.write_array(
                    file, np.ascontiguousarray(self.arrays[name], DTYPES[name]), (1, 0), allow_pickle=False
                )
                yield self._file(f"{name}.npy", file.getvalue())

    def _file(self, extension: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        member = tarfile.TarInfo(f"{key_of_image(self.image_id)}.{extension}")
        member.size = len(data)
        return member, data

    @classmethod
    def from_raw(cls, image_id: int, raw: RawSample, names: list[str], rows: int, dim: int, top: int) -> "TarSample":
        """The sample with the arrays `names`; `top`: how many nouns a label is made of, 0 for one.

        Raises KeyError for what is missing, ValueError for what does not fit.
        """
        about = json.loads(raw["json"])
        arrays = {name: _array(raw[f"{name}.npy"], name, rows, dim, top) for name in names}
        return cls(image_id, about, None if about["picture"] is None else raw[about["picture"]], arrays)


def key_of_image(image_id: int) -> str:
    return f"{image_id:012d}"


def _extension(file_name: str) -> str:
    """In lower case, as webdataset would have it."""
    extension = Path(file_name).suffix[1:].lower()
    return "picture" if not extension or extension in ("json", "npy") else extension


def _array(data: bytes, name: str, rows: int, dim: int, top: int) -> np.ndarray:
    array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    wide = {
        "boxes": (rows, 4),
        "instance": (rows, dim),
        "image": (dim,),
        "top_noun": (rows, top),
        "top_weight": (rows, top),
    }
    expected = wide.get(name, (rows,))
    if array.shape != expected or array.dtype != DTYPES[name]:
        raise ValueError(f"{name}.npy is {array.dtype} {array.shape}, expected {DTYPES[name]} {expected}")
    return array
