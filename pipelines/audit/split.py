"""The audit's checks of the split: which annotations, which class lists, which pictures."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.cache.schema import Level
from hdovd.core.errors import shorten
from hdovd.data.protocol import Protocol, load_protocol, shipped_protocols
from hdovd.pipelines.audit.inputs import Audited, CachedBoxes, GroundTruth, rows_of, sha256_of
from hdovd.pipelines.audit.report import Check, Findings
from hdovd.pipelines.common.console import progress

SAME_BOX_PX = 0.05  # between a cached base box and its annotation: float32 and a decimal or two


def check_base_rows(audited: Audited) -> Check:
    """Every base row of the cache is an annotation of a base class, at its place.

    An id alone proves nothing, because files are renumbered: a row is the annotation of its id if image and box are
    that one's too. Any other row is compared with all boxes of its image.
    """
    truth, boxes, protocol, found = audited.truth, audited.boxes, audited.protocol, Findings("base boxes")
    rows = np.flatnonzero(boxes.is_base)
    place, agree = _own_annotations(truth, boxes, rows)
    not_base = ~truth.of_classes(protocol.base)
    wrong = place[agree][not_base[place[agree]]]
    for name, of_class in _by_class(truth, wrong).items():
        where = [f"annotation {truth.id[at]} of image {truth.of_image[at]}" for at in of_class]
        found.leaks.append(
            f"{len(of_class):,d} base rows are annotations of {name!r}, which is {_kind(name, protocol)}: "
            f"{shorten(list(where), 3)}"
        )
    others = rows[~agree]
    copied = _of_others(audited, others, not_base, found)
    known = place[~agree] >= 0
    if len(unknown := others[~known & ~copied]):
        ids = boxes.annotation_id[unknown].tolist()
        found.unknown.append(
            f"{len(ids):,d} base rows are of annotations that {truth.file} does not have (ids {shorten(ids)}): give "
            f"the annotation file that the cache was made from"
        )
    if len(moved := others[known & ~copied]):
        ids = boxes.annotation_id[moved].tolist()
        found.unknown.append(
            f"{len(ids):,d} base rows lie elsewhere than their annotation in {truth.file} (ids {shorten(ids)}): is it "
            f"the file that the cache was made from?"
        )
    return found.check(
        f"all {len(rows):,d} base rows are annotations of base classes",
        {
            "base_rows": len(rows),
            "not_base": len(wrong),
            "copied": int(copied.sum()),
            "unknown_ids": int((~known).sum()),
            "moved": int(known.sum()),
        },
    )


def _own_annotations(truth: GroundTruth, boxes: CachedBoxes, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of rows (R,) of the cache: the place of the annotation of that id in the file, -1 if there is none, (R,) int64;
    and whether it has the row's image and box too, (R,) bool.
    """
    place = rows_of(boxes.annotation_id[rows], truth.id)
    agree = place >= 0
    own, at = rows[agree], place[agree]
    near = (np.abs(truth.box[at] - boxes.box[own]) <= SAME_BOX_PX).all(1)
    agree[agree] = near & (truth.of_image[at] == boxes.of_image[own])
    return place, agree


def _kind(name: str, protocol: Protocol) -> str:
    return "novel" if name in protocol.novel else "not of the protocol"


def _by_class(truth: GroundTruth, places: np.ndarray) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for at in places.tolist():
        found.setdefault(truth.class_name(at), []).append(at)
    return found


def _of_others(audited: Audited, rows: np.ndarray, not_base: np.ndarray, found: Findings) -> np.ndarray:
    """Rows that are not the annotation of their id: on the box of an annotation that is not base they are that, under
    another id.

    Unless a base annotation has the same box, which explains the row. Returns (R,) bool, which rows leak.
    """
    truth, boxes = audited.truth, audited.boxes
    twin = _with_box_of(truth, np.flatnonzero(not_base), boxes, rows)
    hit = np.flatnonzero(twin >= 0)
    twin[hit[_with_box_of(truth, np.flatnonzero(~not_base), boxes, rows[hit]) >= 0]] = -1
    copied = twin >= 0
    where: dict[str, list[object]] = {}
    for row, at in zip(rows[copied].tolist(), twin[copied].tolist(), strict=True):
        where.setdefault(truth.class_name(at), []).append(
            f"that of annotation {boxes.annotation_id[row]}, image {boxes.of_image[row]}, has the box of annotation "
            f"{truth.id[at]}"
        )
    found.leaks += [
        f"{len(lines):,d} base rows have the box of a {name!r}, which is {_kind(name, audited.protocol)}, under "
        f"another id: {shorten(lines, 3)}"
        for name, lines in where.items()
    ]
    return copied


def _with_box_of(truth: GroundTruth, wanted: np.ndarray, boxes: CachedBoxes, rows: np.ndarray) -> np.ndarray:
    """For rows (R,) of the cache the first annotation among `wanted` that has the row's image and box: its place, or
    -1, (R,) int64.

    Rows and annotations are joined by image, all pairs at once: a cache of another file has a million such rows.
    """
    wanted = wanted[np.argsort(truth.of_image[wanted], kind="stable")]
    images = truth.of_image[wanted]
    start, stop = (np.searchsorted(images, boxes.of_image[rows], side) for side in ("left", "right"))
    count, found = stop - start, np.full(len(rows), -1, np.int64)
    of_row = np.repeat(np.arange(len(rows)), count)
    at = wanted[np.arange(len(of_row)) + np.repeat(start - np.cumsum(count) + count, count)]
    same = (np.abs(truth.box[at] - boxes.box[rows[of_row]]) <= SAME_BOX_PX).all(1)
    found[of_row[same][::-1]] = at[same][::-1]
    return found


def check_split_lists(audited: Audited) -> Check:
    """The class lists of the protocol, the cache and the run are those of the shipped protocol of that name, and of
    each other.
    """
    protocol, found = audited.protocol, Findings("class lists")
    compared = ["the cache's class level"]
    found.leaks += _against_shipped(protocol.to_dict(), "the protocol that was given")
    if Level.CLASS in audited.cache.levels():
        names = audited.cache.names(Level.CLASS)
        found.leaks += [
            f"the cache has text embeddings of {lone!r}, which protocol {protocol.name} does not name"
            for lone in names
            if lone not in protocol.names
        ]
        found.leaks += [
            f"protocol {protocol.name} names {lone!r}, which the cache's class level does not have"
            for lone in protocol.names
            if lone not in names
        ]
    else:
        found.unknown.append("the cache has no class level, so which classes it was made for is not known")
    if audited.run is not None:
        compared.append("run.json")
        recorded = audited.run.get("protocol")
        if isinstance(recorded, dict) and all(isinstance(recorded.get(kind), list) for kind in ("base", "novel")):
            found.leaks += _differences(recorded, protocol.to_dict(), "run.json", f"protocol {protocol.name}")
            found.leaks += _against_shipped(recorded, "run.json")
        else:
            found.unknown.append("run.json does not say which protocol the run followed")
    if protocol.name in shipped_protocols():
        compared.append("the protocol that hdovd ships")
    return found.check(
        f"the {len(protocol.base)} base and {len(protocol.novel)} novel classes of protocol {protocol.name} "
        f"are also those of {', '.join(compared)}"
    )


def _against_shipped(tree: dict[str, Any], who: str) -> list[str]:
    name = tree.get("name")
    if name not in shipped_protocols():
        return []
    shipped: Protocol = load_protocol(str(name))
    return _differences(tree, shipped.to_dict(), f"{who}, which calls itself {name},", f"the {name} that hdovd ships")


def _differences(tree: dict[str, Any], other: dict[str, Any], who: str, whose: str) -> list[str]:
    lines = []
    for kind in ("base", "novel"):
        lines += [f"{who} has {name!r} as {kind}, {whose} has not" for name in tree[kind] if name not in other[kind]]
        lines += [f"{whose} has {name!r} as {kind}, {who} has not" for name in other[kind] if name not in tree[kind]]
    return lines


def check_pictures(audited: Audited) -> Check:
    """No training picture is a validation picture, by id and by the bytes of the files."""
    truth, val, found = audited.truth, audited.val, Findings("train and val")
    if val is None or audited.val_folder is None:
        return found.cannot(audited.missing["val"])
    place = rows_of(audited.boxes.image_id, truth.image_id)
    files = {int(truth.image_id[at]): audited.folder / truth.file_name[at] for at in place[place >= 0].tolist()}
    absent_ids = audited.boxes.image_id[place < 0].tolist()
    if absent_ids:
        found.unknown.append(
            f"{len(absent_ids):,d} images of the cache are not in {truth.file} (ids {shorten(absent_ids)})"
        )
    val_files = {
        int(i): audited.val_folder / name for i, name in zip(val.image_id.tolist(), val.file_name, strict=True)
    }
    hashes, absent = _content(files, val_files)
    _of_shared_ids(audited, val, (files, val_files), hashes, found)
    of_val = set(val_files.values())
    by_hash = {digest: file for file, digest in hashes.items() if file in of_val}
    for image_id, file in files.items():
        if file in hashes and hashes[file] in by_hash and image_id not in val_files:
            found.leaks.append(
                f"training image {image_id} ({file}) is byte for byte the validation picture {by_hash[hashes[file]]}"
            )
    if absent:
        found.unknown.append(
            f"{len(absent):,d} pictures are not on this machine, so their content was not compared "
            f"({shorten(list(absent), 2)})"
        )
    return found.check(
        f"none of {len(files):,d} training pictures is one of {len(val_files):,d} validation pictures, by id or bytes",
        {"training": len(files), "validation": len(val_files), "absent": len(absent)},
    )


def _of_shared_ids(
    audited: Audited,
    val: GroundTruth,
    sides: tuple[dict[int, Path], dict[int, Path]],
    hashes: dict[Path, str],
    found: Findings,
) -> None:
    """Ids on both sides: sets that both count from one share them too, so bytes must agree, or without the files name
    and size.

    A picture that the training file does not have is known by its base boxes, if those are annotations of the
    validation file.
    """
    (files, val_files), truth, boxes = sides, audited.truth, audited.boxes
    ours, theirs = (
        {
            i: (name, *size)
            for i, name, size in zip(own.image_id.tolist(), own.file_name, own.size.tolist(), strict=True)
        }
        for own in (truth, val)
    )
    rows = np.flatnonzero(boxes.is_base)
    annotated = set(boxes.of_image[rows[_own_annotations(val, boxes, rows)[1]]].tolist())
    unseen = []
    for image_id in sorted(set(boxes.image_id.tolist()) & val_files.keys()):
        mine, other = files.get(image_id), val_files[image_id]
        if mine is None:
            same = True if image_id in annotated else None
        elif mine.is_file() and other.is_file():
            same = mine in hashes and hashes[mine] == hashes.get(other)
        else:
            same = True if ours[image_id] == theirs[image_id] else None
        if same:
            found.leaks.append(f"image {image_id} is in the training set and in {val.file}")
        elif same is None:
            unseen.append(image_id)
        else:
            found.notes.append(f"image id {image_id} is used for a training and another validation picture")
    if unseen:
        found.unknown.append(
            f"{len(unseen):,d} image ids are on both sides (ids {shorten([*unseen])}) with other file names or sizes, "
            f"or are not in the training file, and the pictures are not here to be compared: are they the same?"
        )


def _content(files: dict[int, Path], val_files: dict[int, Path]) -> tuple[dict[Path, str], list[str]]:
    """sha256 of those files that have the size of a file of the other side, and which files are not there."""
    sides = [_sizes(side.values()) for side in (files, val_files)]
    absent = [str(path) for side in sides for path, size in side.items() if size is None]
    common = (Counter(sides[0].values()) & Counter(sides[1].values())).keys() - {None}
    wanted = [path for side in sides for path, size in side.items() if size in common]
    return {path: sha256_of(path) for path in progress(wanted, "comparing pictures", "picture", len(wanted))}, absent


def _sizes(paths: Iterable[Path]) -> dict[Path, int | None]:
    return {path: path.stat().st_size if path.is_file() else None for path in paths}
