"""The audit's checks of the split: which annotations, which class lists, which pictures. Called by `audit`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.cache.schema import Level
from hdovd.errors import shorten
from hdovd.pipelines.audit_inputs import Audited, GroundTruth, rows_of
from hdovd.pipelines.audit_report import Check, Findings
from hdovd.pipelines.progress import progress
from hdovd.protocol import Protocol, load_protocol, shipped_protocols

SAME_BOX_PX = 0.05  # between a cached base box and its annotation: float32 and a decimal or two


def check_base_rows(audited: Audited) -> Check:
    """Every base row of the cache is an annotation of a base class, at its place."""
    truth, boxes, protocol, found = audited.truth, audited.boxes, audited.protocol, Findings()
    rows = np.flatnonzero(boxes.is_base)
    place = rows_of(boxes.annotation_id[rows], truth.id)
    known = place >= 0
    if not known.all():
        ids = boxes.annotation_id[rows][~known].tolist()
        found.unknown.append(f"{len(ids):,d} base rows are of annotations that {truth.file} does not have (ids {shorten(ids)}): give the "
                             "annotation file that the cache was made from")
    rows, place = rows[known], place[known]
    base = truth.of_classes(protocol.base)[place]
    for name, of_class in _by_class(truth, place[~base]).items():
        kind = "novel" if name in protocol.novel else "not of the protocol"
        where = [f"annotation {truth.id[at]} of image {truth.of_image[at]}" for at in of_class]
        found.leaks.append(f"{len(of_class):,d} base rows are annotations of {name!r}, which is {kind}: {shorten(list(where), 3)}")
    rows, place = rows[base], place[base]
    moved = (truth.of_image[place] != boxes.of_image[rows]) | (np.abs(truth.box[place] - boxes.box[rows]) > SAME_BOX_PX).any(1)
    _of_moved(audited, rows[moved], found)
    return found.check("base boxes", f"all {int(boxes.is_base.sum()):,d} base rows are annotations of base classes",
                       {"base_rows": int(boxes.is_base.sum()), "not_base": int((~base).sum()), "unknown_ids": int((~known).sum()),
                        "moved": int(moved.sum())})


def _by_class(truth: GroundTruth, places: np.ndarray) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for at in places.tolist():
        found.setdefault(truth.class_name(at), []).append(at)
    return found


def _of_moved(audited: Audited, rows: np.ndarray, found: Findings) -> None:
    """Base rows that are not where their annotation is: on a novel object they are its annotation under another id."""
    truth, boxes = audited.truth, audited.boxes
    novel, strangers = np.flatnonzero(truth.of_classes(audited.protocol.novel)), []
    for row in rows.tolist():
        here = novel[truth.of_image[novel] == boxes.of_image[row]]
        same = here[(np.abs(truth.box[here] - boxes.box[row]) <= SAME_BOX_PX).all(1)]
        if len(same):
            found.leaks.append(f"the base row of annotation {boxes.annotation_id[row]}, image {boxes.of_image[row]}, has the box of "
                               f"annotation {truth.id[same[0]]}, a {truth.class_name(same[0])!r}, which is novel")
        else:
            strangers.append(int(boxes.annotation_id[row]))
    if strangers:
        found.unknown.append(f"{len(strangers):,d} base rows lie elsewhere than their annotation in {truth.file} "
                             f"(ids {shorten([*strangers])}): is it the file that the cache was made from?")


def check_split_lists(audited: Audited) -> Check:
    """The class lists of the protocol, the cache and the run are those of the shipped protocol of that name, and of each other."""
    protocol, found = audited.protocol, Findings()
    compared = ["the cache's class level"]
    found.leaks += _against_shipped(protocol.to_dict(), "the protocol that was given")
    if Level.CLASS in audited.cache.levels():
        names = audited.cache.names(Level.CLASS)
        found.leaks += [f"the cache has text embeddings of {lone!r}, which protocol {protocol.name} does not name"
                        for lone in names if lone not in protocol.names]
        found.leaks += [f"protocol {protocol.name} names {lone!r}, which the cache's class level does not have"
                        for lone in protocol.names if lone not in names]
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
    return found.check("class lists", f"the {len(protocol.base)} base and {len(protocol.novel)} novel classes of protocol {protocol.name} "
                       f"are also those of {', '.join(compared)}")


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
    truth, val, found = audited.truth, audited.val, Findings()
    name = "train and val"
    if val is None or audited.val_folder is None:
        found.unknown.append(audited.missing["val"])
        return found.check(name, "")
    place = rows_of(audited.boxes.image_id, truth.image_id)
    files = {int(truth.image_id[at]): audited.folder / truth.file_name[at] for at in place[place >= 0].tolist()}
    absent_ids = audited.boxes.image_id[place < 0].tolist()
    if absent_ids:
        found.unknown.append(f"{len(absent_ids):,d} images of the cache are not in {truth.file} (ids {shorten(absent_ids)})")
    val_files = {int(i): audited.val_folder / name for i, name in zip(val.image_id.tolist(), val.file_name, strict=True)}
    hashes, absent = _content(files, val_files)
    for image_id in sorted(set(audited.boxes.image_id.tolist()) & val_files.keys()):
        ours, theirs = files.get(image_id), val_files[image_id]
        both = ours is not None and ours.is_file() and theirs.is_file()
        if both and (ours not in hashes or hashes[ours] != hashes.get(theirs)):
            found.notes.append(f"image id {image_id} is used for a training and another validation picture")
            continue
        found.leaks.append(f"image {image_id} is in the training set and in {val.file}")
    by_hash = {digest: file for file, digest in hashes.items() if file in set(val_files.values())}
    for image_id, file in files.items():
        if file in hashes and hashes[file] in by_hash and image_id not in val_files:
            found.leaks.append(f"training image {image_id} ({file}) is byte for byte the validation picture {by_hash[hashes[file]]}")
    if absent:
        found.unknown.append(f"{len(absent):,d} pictures are not on this machine, so their content was not compared "
                             f"({shorten(list(absent), 2)})")
    return found.check(name, f"none of {len(files):,d} training pictures is one of {len(val_files):,d} validation pictures, by id or bytes",
                       {"training": len(files), "validation": len(val_files), "absent": len(absent)})


def _content(files: dict[int, Path], val_files: dict[int, Path]) -> tuple[dict[Path, str], list[str]]:
    """sha256 of those files that have the size of a file of the other side, and which files are not there."""
    sides = [_sizes(side.values()) for side in (files, val_files)]
    absent = [str(path) for side in sides for path, size in side.items() if size is None]
    common = (Counter(sides[0].values()) & Counter(sides[1].values())).keys() - {None}
    wanted = [path for side in sides for path, size in side.items() if size in common]
    hashes = {}
    for path in progress(wanted, "comparing pictures", "picture", len(wanted)):
        with path.open("rb") as file:
            hashes[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes, absent


def _sizes(paths: Iterable[Path]) -> dict[Path, int | None]:
    return {path: path.stat().st_size if path.is_file() else None for path in paths}
