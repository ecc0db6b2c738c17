"""What stands for each picture in a product's tables (`image_hash`), so that two pictures of one name are told apart.

It is a hash of file name and size, and of the content where the cache has another picture of that name. Files of the
place, size and time that the cache knows are not read; others are hashed.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hdovd.cache.picture_files import FILE, PictureFile, known_files, place_of
from hdovd.cache.product import Product
from hdovd.cache.schema import Level
from hdovd.core.errors import HdovdError, counted, shorten
from hdovd.data.coco import ImageBoxes, Split

READERS = 8  # threads that hash


@dataclass(frozen=True, slots=True)
class PictureHashes:
    """Of the N images of a split: `values` (N,) uint64; `files` (N,) of `FILE`, as the cache knows them (`size` -1
    where it does not).

    `changed`: ids of images whose file is not the one that the cache saw. `later`: whether files were found again in
    another place, or of another time.
    """

    values: np.ndarray
    files: np.ndarray
    changed: list[int]
    later: bool

    def require_unchanged(self, where: str) -> None:
        """Raises HdovdError if a picture has changed since it was embedded."""
        if self.changed:
            raise HdovdError(
                f"{counted(len(self.changed), 'picture is', 'pictures are')} not what {where} was made from (images "
                f"{shorten([*self.changed])}): another content has the same id and size. The same hdovd extract-clip "
                f"command embeds what changed, and keeps the rest"
            )


def image_hash(image: ImageBoxes, content: bytes = b"") -> int:
    """Of name and size, and `content` if that is given: 64 bits."""
    text = f"{image.file_name}\0{image.width}x{image.height}".encode()
    return int.from_bytes(hashlib.sha256(text + (b"\0" + content if content else b"")).digest()[:8], "little")


def picture_hashes(split: Split, products: Iterable[Product]) -> PictureHashes:
    """What stands for the pictures of a split, by what `products` know of them."""
    with_pictures = [product for product in products if product.level in (Level.IMAGE, Level.INSTANCE)]
    known = np.concatenate([np.zeros(0, FILE), *map(known_files, with_pictures)])
    known = known[np.argsort(known["image_id"], kind="stable")]
    ids = np.array([image.id for image in split.images], np.int64)
    first, last = (np.searchsorted(known["image_id"], ids, side) for side in ("left", "right"))
    values = np.array([image_hash(image) for image in split.images], np.uint64)
    files, changed, unsure, later = np.zeros(len(ids), FILE), list[int](), list[int](), False
    files["image_id"], files["label"], files["size"] = ids, values, -1
    files["annotated"] = np.array([(image.width, image.height) for image in split.images], np.int32).reshape(-1, 2)
    candidates = dict[int, np.ndarray]()
    for n in np.flatnonzero(first < last).tolist():
        candidates[n] = known[first[n] : last[n]]
        candidates[n] = candidates[n][(candidates[n]["annotated"] == files[n]["annotated"]).all(axis=1)]
        same = _same_file(split.path(split.images[n]), candidates[n])
        if same is not None:
            files[n] = same
        elif len(candidates[n]):
            unsure.append(n)
    with ThreadPoolExecutor(READERS) as pool:
        paths = [split.path(split.images[n]) for n in unsure]
        for n, file in zip(unsure, pool.map(_read, paths), strict=True):
            if file is not None and not _settle(files, n, split.images[n], file, candidates[n]):
                changed.append(split.images[n].id)
            later = later or files[n]["size"] >= 0
    return PictureHashes(files["label"].copy(), files, changed, bool(later))


def files_of(read: dict[int, PictureFile], known: np.ndarray, numbers: Iterable[int]) -> np.ndarray:
    """(n,) of `FILE`: of some images of a split what was read now, else what is known; those of which nothing is are
    left out.
    """
    files = known[[*numbers]]
    for n, row in enumerate(files):
        if (file := read.get(int(row["image_id"]))) is not None:
            files[n] = (row["image_id"], row["annotated"], row["label"], *file)
    return files[files["size"] >= 0]


def _same_file(path: Path, known: np.ndarray) -> np.void | None:
    """What is known of a file of this place, size and time."""
    try:
        stat = path.stat()
    except OSError:
        return None
    same = known[
        (known["size"] == stat.st_size) & (known["modified"] == stat.st_mtime_ns) & (known["place"] == place_of(path))
    ]
    return same[0] if len(same) else None


def _read(path: Path) -> PictureFile | None:
    """None for what is no file, or cannot be read: who needs its pixels says so."""
    try:
        return PictureFile.of(path, path.stat(), path.read_bytes()) if path.is_file() else None
    except OSError:
        return None


def _settle(files: np.ndarray, n: int, image: ImageBoxes, file: PictureFile, known: np.ndarray) -> bool:
    """Enter a file that was hashed; False if the cache has other pictures of that id and size (`known`, one at least)
    and not this one.
    """
    label = int(files[n]["label"])
    same = known[known["content"] == file.content]
    if len(same):
        best = same[int(np.argmax(same["label"] == label))]
        files[n] = (image.id, best["annotated"], best["label"], *file[:-1], best["either"])
    elif (known["label"] == label).any():
        files[n]["label"] = image_hash(image, file.content)
    return bool(len(same))
