"""What a product knows of the picture files that its rows were made from: contents, places, sizes and times.

A file a part, `pictures/NUMBER.npz` below the product, written before the part's record; `pictures/later.npz` holds
what was found again later, in another place or of another time. Products that are older have none. No key depends on
them: two folders of the same pictures give one product.
"""

import hashlib
import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hdovd.cache.product import Product
from hdovd.cache.store import naming_damage

LATER = "later"
# `label` and `annotated`: `image_hash` and size (width, height) of the image in the product's tables. `content`: sha256
# of the file, 32 hex digits of it. `place`: of its path. `modified`: nanoseconds. `either`: its annotated size fits it
# turned, as EXIF says, and as stored.
FILE = np.dtype(
    [
        ("image_id", "<i8"),
        ("annotated", "<i4", 2),
        ("label", "<u8"),
        ("content", "S32"),
        ("place", "S16"),
        ("size", "<i8"),
        ("modified", "<i8"),
        ("either", "?"),
    ]
)


class PictureFile(NamedTuple):
    """A file as it was read: `FILE` from "content" on."""

    content: bytes
    place: bytes
    size: int
    modified: int
    either: bool = False

    @classmethod
    def of(cls, path: Path, stat: os.stat_result, data: bytes, *, either: bool = False) -> "PictureFile":
        return cls(_digest(data, 32), place_of(path), stat.st_size, stat.st_mtime_ns, either)


def place_of(path: Path) -> bytes:
    """What stands for a path."""
    return _digest(os.fsencode(os.path.abspath(path)), 16)


def write_files(product: Product, part: int | str, files: np.ndarray) -> None:
    """files (n,) of `FILE`."""
    data = io.BytesIO()
    np.savez_compressed(data, files=files)
    name = part if isinstance(part, str) else f"{part:06d}"
    product.folder.write(f"{product.prefix}/pictures/{name}.npz", data.getvalue())


def known_files(product: Product) -> np.ndarray:
    """(n,) of `FILE`, those of later first; an image has several if it has rows in several parts. Raises HdovdError if
    they are damaged.
    """
    names = sorted(product.folder.sizes(f"{product.prefix}/pictures"), reverse=True)
    found = [np.zeros(0, FILE)]
    for name, data in zip(names, product.folder.read_many(names), strict=True):
        with (
            naming_damage(
                f"{product.folder.url}/{name}", "delete it; whether pictures of that part changed is not known then"
            ),
            np.load(io.BytesIO(data), allow_pickle=False) as file,
        ):
            found.append(file["files"].astype(FILE))
    return np.concatenate(found)


def _digest(data: bytes, digits: int) -> bytes:
    return hashlib.sha256(data).hexdigest()[:digits].encode()
