"""What an audit looks at: annotation files as they are, all classes of them, and a cache's boxes. Read for `audit`
alone.

Training never sees these: `coco.load_split` leaves novel boxes out. N images, A annotations, M rows of boxes.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.cache.catalog import Catalog
from hdovd.cache.product import Product
from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Level, Source
from hdovd.core.errors import HdovdError
from hdovd.data.coco import read_instances
from hdovd.data.protocol import Protocol


@dataclass(frozen=True, slots=True, eq=False)
class GroundTruth:
    """image_id (N,) i64, file_name [N], size (N, 2) f32 width and height; id, of_image, category (A,) i64, crowd (A,)
    bool, box (A, 4) f32 xyxy, cut to the image. of_image is an image id. `names`: category id -> name.
    """

    file: Path
    image_id: np.ndarray
    file_name: list[str]
    size: np.ndarray
    id: np.ndarray
    of_image: np.ndarray
    category: np.ndarray
    crowd: np.ndarray
    box: np.ndarray
    names: dict[int, str]

    def of_classes(self, names: tuple[str, ...]) -> np.ndarray:
        """(A,) bool: the annotations of these classes."""
        return np.isin(self.category, [i for i, name in self.names.items() if name in names])

    def class_name(self, row: int) -> str:
        return self.names.get(int(self.category[row]), f"category {self.category[row]}")

    def sha256(self) -> str:
        return sha256_of(self.file)


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_truth(file: Path, folder: Path | None = None) -> GroundTruth:
    """All of an instances file, whatever the protocol; boxes that are none have no area. `folder`: of its pictures.

    Raises HdovdError if it is no such file."""
    found = read_instances(file, folder)
    image_id, of_image = np.array(list(found.images), np.int64), np.array(found.image_ids, np.int64)
    size = np.array([entry[1:] for entry in found.images.values()], np.float32).reshape(-1, 2)
    box = np.array(found.boxes).reshape(-1, 4)
    box[:, 2:] += box[:, :2]
    edge = np.tile(size, 2)[rows_of(of_image, image_id)] if len(size) else np.zeros_like(box)
    return GroundTruth(
        file,
        image_id,
        [entry[0] for entry in found.images.values()],
        size,
        np.array(found.ids, np.int64),
        of_image,
        np.array(found.categories, np.int64),
        np.array(found.crowd, bool),
        np.clip(box.astype(np.float32), 0, edge),
        found.names,
    )


def rows_of(wanted: np.ndarray, among: np.ndarray) -> np.ndarray:
    """For each of `wanted` its place in `among`, -1 if it is not there: int64."""
    if not len(among):
        return np.full(len(wanted), -1, np.int64)
    order = np.argsort(among, kind="stable")
    at = order[np.searchsorted(among[order], wanted).clip(max=len(among) - 1)]
    return np.where(among[at] == wanted, at, -1)


@dataclass(frozen=True, slots=True, eq=False)
class CachedBoxes:
    """The box table of a cache: image_id (N,); of_image (M,), the image id of each row, box (M, 4) f32 xyxy, source
    (M,), annotation_id (M,); noun (M,) int32, rows of `nouns` or -1, or None where nothing was named. `nouns`: empty if
    they are not known.
    """

    image_id: np.ndarray
    of_image: np.ndarray
    box: np.ndarray
    source: np.ndarray
    annotation_id: np.ndarray
    noun: np.ndarray | None
    nouns: tuple[str, ...]

    @property
    def is_base(self) -> np.ndarray:
        return np.asarray(self.source == Source.BASE_BOX)


@dataclass(frozen=True, slots=True, eq=False)
class Audited:
    """All that the checks look at. `val`, `run`: None if they were not given or are not there, and `missing` says of
    each why.
    """

    protocol: Protocol
    truth: GroundTruth
    folder: Path
    val: GroundTruth | None
    val_folder: Path | None
    cache: FeatureCache
    boxes: CachedBoxes
    run: dict[str, Any] | None
    run_path: Path | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def synonyms(self) -> dict[str, list[str]]:
        """Other names of classes that the cache was made with."""
        inputs = self.cache.key_inputs(Level.CLASS) if Level.CLASS in self.cache.levels() else {}
        return dict(inputs.get("synonyms", {}))


def read_boxes(cache: FeatureCache) -> CachedBoxes:
    """Raises HdovdError if the cache has no boxes."""
    if Level.BOXES not in cache.levels():
        raise HdovdError(
            f"{cache.url}: the set has no boxes, so there is nothing to audit: extract it with hdovd extract-clip"
        )
    folder = Catalog(cache.url).folder
    boxes = Product(folder, Level.BOXES, cache.key(Level.BOXES))
    image_id, offset = boxes.table("image_id"), boxes.table("offset")
    named = {Level.PSEUDO_LABEL, Level.NOUN} <= set(cache.levels())
    has_names = named and not isinstance(cache.key_inputs(Level.NOUN).get("names"), dict)  # an import's texts have none
    noun = Product(folder, Level.PSEUDO_LABEL, cache.key(Level.PSEUDO_LABEL)).table("noun") if named else None
    return CachedBoxes(
        image_id,
        np.repeat(image_id, np.diff(offset)),
        boxes.table("box"),
        boxes.table("source"),
        boxes.table("annotation_id"),
        noun,
        tuple(cache.names(Level.NOUN)) if has_names else (),
    )
