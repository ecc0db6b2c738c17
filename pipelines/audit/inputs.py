"""What an audit looks at: annotation files as they are, all classes of them, a cache's boxes, a run's record. Read for
`audit` alone.

Training never sees these: `coco.load_split` leaves novel boxes out. N images, A annotations, M rows of boxes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.cache.hub import local_run
from hdovd.cache.identity import require_seal
from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Level, Source
from hdovd.core.errors import HdovdError
from hdovd.core.text_files import read_json
from hdovd.data.coco import DataPaths, read_instances
from hdovd.data.protocol import Protocol, load_protocol
from hdovd.pipelines.audit.config import AuditConfig


@dataclass(frozen=True, slots=True, eq=False)
class GroundTruth:
    """`images`: id -> (file name, width, height); id, of_image, category (A,) i64, crowd (A,) bool, box (A, 4) f32
    xyxy, cut to the image. of_image is an image id. `names`: category id -> name.
    """

    file: Path
    folder: Path
    images: dict[int, tuple[str, int, int]]
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


def read_truth(file: Path, folder: Path | None = None) -> GroundTruth:
    """All of an instances file, whatever the protocol; boxes that are none have no area. `folder`: of its pictures.

    Raises HdovdError if it is no such file."""
    found = read_instances(file, folder)
    of_image, box = np.array(found.image_ids, np.int64), np.array(found.boxes).reshape(-1, 4)
    box[:, 2:] += box[:, :2]
    edge = np.array([found.images[image_id][1:] * 2 for image_id in found.image_ids], np.float32).reshape(-1, 4)
    return GroundTruth(
        file,
        folder or Path(),
        found.images,
        np.array(found.ids, np.int64),
        of_image,
        np.array(found.categories, np.int64),
        np.array(found.crowd, bool),
        np.clip(box.astype(np.float32), 0, edge),
        found.names,
    )


@dataclass(frozen=True, slots=True, eq=False)
class CachedBoxes:
    """The box table of a cache: image_id (N,); of_image (M,), the image id of each row, box (M, 4) f32 xyxy, is_base
    (M,) bool, annotation_id (M,); noun (M,) int32, rows of `nouns` or -1, or None where nothing was named. `nouns`:
    empty if they are not known.
    """

    image_id: np.ndarray
    of_image: np.ndarray
    box: np.ndarray
    is_base: np.ndarray
    annotation_id: np.ndarray
    noun: np.ndarray | None
    nouns: tuple[str, ...]


def read_boxes(cache: FeatureCache) -> CachedBoxes:
    """Raises HdovdError if the cache has no boxes."""
    if Level.BOXES not in cache.levels():
        raise HdovdError(
            f"{cache.url}: the set has no boxes, so there is nothing to audit: extract it with hdovd extract-clip"
        )
    boxes = cache.product(Level.BOXES)
    image_id = boxes.table("image_id")
    named = {Level.PSEUDO_LABEL, Level.NOUN} <= set(cache.levels())
    return CachedBoxes(
        image_id,
        np.repeat(image_id, np.diff(boxes.table("offset"))),
        boxes.table("box"),
        np.asarray(boxes.table("source") == Source.BASE_BOX),
        boxes.table("annotation_id"),
        cache.product(Level.PSEUDO_LABEL).table("noun") if named else None,
        tuple(cache.known_nouns()) if named else (),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Audited:
    """All that the checks look at. `missing`: of `val` and of `run`, which is empty then, why they are not there."""

    protocol: Protocol
    truth: GroundTruth
    val: GroundTruth | None
    cache: FeatureCache
    boxes: CachedBoxes
    run: dict[str, Any]
    run_path: Path
    missing: dict[str, str]

    def called(self, name: str) -> str:
        """A class that is not base, in words."""
        return f"{name!r}, which is {'novel' if name in self.protocol.novel else 'no base class'}"


def read_audited(config: AuditConfig) -> Audited:
    """Raises HdovdError for what cannot be read, and for data that do not know the protocol's classes."""
    protocol, root = load_protocol(config.protocol), config.data.root
    truth = read_truth(config.data.annotation_file("train2017"), config.data.image_folder("train2017"))
    if absent := [name for name in protocol.names if name not in truth.names.values()]:
        raise HdovdError(
            f"protocol {protocol.name} names classes that {truth.file} does not know: {', '.join(absent[:8])}. Give "
            f"the split that fits this data with --protocol"
        )
    missing = {} if config.run is not None else {"run": "no --run was given: not checked"}
    val = None
    if root is None:
        missing["val"] = "no --data was given: where the validation pictures are is not known"
    else:
        data = DataPaths(root, form=config.data.form)
        try:
            val_file = data.annotation_file("val2017")
        except HdovdError as error:
            missing["val"] = f"{error}: whether training and validation share pictures is not known"
        else:
            val = read_truth(val_file, data.image_folder("val2017"))
    cache = FeatureCache(config.cache, config.features)
    return Audited(
        protocol,
        truth,
        val,
        cache,
        read_boxes(cache),
        {} if config.run is None else read_run(local_run(config.run) / "run.json"),
        Path() if config.run is None else local_run(config.run),
        missing,
    )


def read_run(file: Path) -> dict[str, Any]:
    """The record of a run. Raises HdovdError if it cannot be read or was changed by others."""
    tree = read_json(file, "--run")
    if not isinstance(tree, dict):
        raise HdovdError(f"{file} is damaged: expected the record that hdovd train writes")
    try:
        require_seal(tree)
    except ValueError as error:
        raise HdovdError(f"{file}: {error}; what it says cannot be audited") from error
    return tree
