"""Proposal files: read in any form into columns with an identity, written as COCO results JSON or .npz with what made
them; converted and described. M rows, one a proposal, in the file's order.

- COCO results JSON: `[{"image_id": 1, "bbox": [x, y, w, h], "score": 0.9}, ...]`.
- .npz, hdovd's own: image_id (N,) int64, offset (N+1,) int64, box (M, 4) float32 xyxy, score (M,) float32, metadata:
  JSON text; the rows of image i are offset[i]:offset[i+1]. Readable by numpy alone.
- .pkl, of mmdetection and Detectron2: `pickles`.

What made them (`made_by`, JSON values) stands in the .npz, and for JSON in a sidecar,
`FILE.made_by.json`, which names the identity of the proposals that it is of.
"""

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.cache import hash_tables
from hdovd.core import HdovdError, log, shorten
from hdovd.core.text_files import JsonStream, cut, printable, read_json, shown
from hdovd.data import ImageBoxes, Skips
from hdovd.data.coco import number, whole
from hdovd.pipelines.common.atomic_write import replace_file, write_text
from hdovd.pipelines.common.options import ListOrder, require_proposal_file
from hdovd.pipelines.common.settings import pair_lines
from hdovd.pipelines.proposal_files.pickles import read_pickle

MadeBy = dict[str, Any]  # JSON values: what made proposals
PICKLES = (".pkl", ".pickle")
_REASONS = (
    "box is not four numbers",
    "box is not finite",
    "box is inverted (negative width or height)",
    "box has no area",
    "box lies outside the image",
    "score is not a finite number",
)


@dataclass(frozen=True, slots=True)
class Proposals:
    """The proposals of one image, best first: boxes (n, 4) float32 xyxy pixels, scores (n,) float32."""

    boxes: np.ndarray
    scores: np.ndarray


NO_PROPOSALS = Proposals(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))


@dataclass(frozen=True, slots=True, eq=False)
class ProposalTable:
    """image_id (M,) int64, box (M, 4) float32 xyxy pixels as the file has them, score (M,) float32, or float64 where
    the file's decimals order what float32 makes equal; NaN where there is no number.

    `form`: the file's, in words. `notes`: what a reader of it should be told. `made_by`: what made them, None if that
    is not known.
    """

    image_id: np.ndarray
    box: np.ndarray
    score: np.ndarray
    form: str = ""
    notes: tuple[str, ...] = ()
    made_by: MadeBy | None = None

    @classmethod
    def of(cls, proposals: dict[int, Proposals]) -> "ProposalTable":
        """All of `proposals`, image by image."""
        found = [NO_PROPOSALS, *proposals.values()]
        return cls(
            np.repeat(np.array(list(proposals), np.int64), [len(p.boxes) for p in found[1:]]),
            np.concatenate([p.boxes for p in found]),
            np.concatenate([p.scores for p in found]),
        )

    def identity(self) -> str:
        """A hash of boxes and scores (float32) by image id: the same for every form of file and every order of its
        entries.
        """
        box, score = self.box + np.float32(0), self.score.astype(np.float32) + np.float32(0)  # no -0
        box[np.isnan(box)], score[np.isnan(score)] = np.nan, np.nan  # one kind of NaN
        order = np.lexsort((*box.T, -score, self.image_id))
        return hash_tables([self.image_id[order], box[order], score[order]])

    def by_image(self, keep: np.ndarray | None = None) -> dict[int, Proposals]:
        """Copies of all rows, or of those that `keep` (M,) bool names, by image in the order in which the file has
        these; best first, equal scores in the file's order.
        """
        order = np.lexsort((-self.score, self.image_id))
        order = order if keep is None else order[keep[order]]
        starts = np.unique(self.image_id[order], return_index=True)[1]
        of_images = filter(len, np.split(order, starts[1:]))
        return {
            self.image_id.item(rows[0]): Proposals(self.box[rows], self.score[rows].astype(np.float32))
            for rows in sorted(of_images, key=np.min)
        }

    def for_images(self, images: Sequence[ImageBoxes], skips: Skips) -> dict[int, Proposals]:
        """The usable ones of `images` by image id, cut to their image; what is left out goes to `skips`."""
        if not images:
            return {}
        ids = np.array([image.id for image in images], np.int64)
        sizes = np.array([(image.width, image.height) for image in images], np.float32)
        by_id = np.argsort(ids)
        place = by_id[np.searchsorted(ids, self.image_id, sorter=by_id).clip(max=len(ids) - 1)]
        known, reason = ids[place] == self.image_id, _reason(self.box, sizes[place], self.score)
        for row in np.flatnonzero(known & (reason >= 0)).tolist():
            skips.add(f"proposal, {_REASONS[reason[row]]}, entry", row)
        others = self.image_id[~known]
        for image_id in np.unique(others).tolist():  # an image once: a set's record is read by every run
            skips.add(f"image with proposals that is not in the training set ({len(others):,d} proposals)", image_id)
        found = self.by_image(known & (reason < 0))
        for image, size in zip(images, sizes, strict=True):
            own = found.get(image.id, NO_PROPOSALS)
            own.boxes.clip(0, np.tile(size, 2), out=own.boxes)
        return found


def _reason(box: np.ndarray, edge: np.ndarray, score: np.ndarray) -> np.ndarray:
    """For each row the number of the reason why it cannot be used in an image of size `edge` (n, 2), or -1.

    The rules of `coco.clip_box`, on columns.
    """
    low, high = box[:, :2], box[:, 2:]
    tests = [
        np.isnan(box).all(1),
        ~np.isfinite(box).all(1),
        (high < low).any(1),
        (high == low).any(1),
        (low >= edge).any(1) | (high <= 0).any(1),
        ~np.isfinite(score),
    ]
    return np.select(tests, range(len(_REASONS)), -1)


def read_table(path: Path, annotations: Path | None = None, order: ListOrder = ListOrder.FILE) -> ProposalTable:
    """All of a proposal file, whichever form it has; `annotations` and `order` are for lists without image ids.

    Raises HdovdError if it is of none of the forms, damaged or unsafe, or empty.
    """
    head, sidecar = b"", made_by_file(path)
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(2)
    if head == b"PK":
        table, about = read_npz(path)
        table = _with_made_by(table, about, path)
    elif head[:1] == b"\x80" or path.suffix in PICKLES:
        table = ProposalTable(*read_pickle(path, annotations, order))
    else:
        table = read_coco_results(path)
        if sidecar.is_file():
            try:
                table = _with_made_by(table, read_json(sidecar, "made_by"), sidecar)
            except HdovdError as error:
                note = f"{error}: what made these proposals counts as unknown"
                table = replace(table, notes=(*table.notes, note))
    if not len(table.image_id):
        raise HdovdError(
            f"{path} holds no proposals; make them with hdovd propose, or leave --proposals out to cache base boxes "
            f"alone"
        )
    return table


def _with_made_by(table: ProposalTable, about: Any, file: Path) -> ProposalTable:
    """With what a file says made proposals, if it is of these: its `identity` is theirs."""
    own = table.identity()
    match about:
        case {"made_by": None}:
            return table
        case {"made_by": dict() as made_by, "identity": identity} if identity == own and printable(made_by):
            return replace(table, made_by=made_by)
    named = about.get("identity") if isinstance(about, dict) else about
    note = f"{file} says what made the proposals {shown(named)}, these are {own}: what made them counts as unknown"
    return replace(table, notes=(*table.notes, note))


def usable_proposals(table: ProposalTable, path: Path, images: list[ImageBoxes], skips: Skips) -> dict[int, Proposals]:
    """Those of `images`, by image id; what is left out goes to `skips`. Raises HdovdError if none is left."""
    found = table.for_images(images, skips)
    if not found:
        raise HdovdError(
            f"{path} holds no usable proposal for the {len(images)} training images "
            f"(ids {shorten([image.id for image in images], 4)}):\n" + "\n".join(skips.lines())
        )
    return found


def read_coco_results(path: Path) -> ProposalTable:
    """COCO results JSON, entry by entry. Raises HdovdError if it is not of that form."""
    form = "proposal file: expected COCO results JSON, a list of {image_id, bbox: [x, y, w, h], score}"
    # Flat arrays: 4 million proposals take gigabytes as lists. Scores in double precision, as they sort.
    ids, boxes, scores = array("q"), array("f"), array("d")
    for entry in JsonStream(path, "proposals").items(form):
        if not isinstance(entry, dict) or not {"image_id", "bbox", "score"} <= entry.keys():
            raise HdovdError(f"{path} is no {form}")
        ids.append(whole(entry["image_id"], f"{path}: entry {len(ids)}: image_id"))
        boxes.extend(_xyxy(entry["bbox"]))
        scores.append(number(entry["score"]))
    return ProposalTable(
        np.frombuffer(ids, np.int64),
        np.frombuffer(boxes, np.float32).reshape(-1, 4),
        np.frombuffer(scores, np.float64),
        "COCO results JSON",
    )


def _xyxy(xywh: Any) -> tuple[float, float, float, float]:
    if not isinstance(xywh, list) or len(xywh) != 4:
        return (float("nan"),) * 4
    x, y, w, h = map(number, xywh)
    return x, y, x + w, y + h


NPZ_FORMAT, NPZ_VERSION = "hdovd proposals", 1
_NPZ = {"image_id": np.int64, "offset": np.int64, "box": np.float32, "score": np.float32}


def read_npz(path: Path) -> tuple[ProposalTable, dict[str, Any]]:
    """The columns and the metadata of hdovd's own form. Raises HdovdError if it is damaged, or another .npz."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if absent := sorted({*_NPZ, "metadata"} - set(file.files)):
                raise HdovdError(
                    f"{path} is no proposal file of hdovd's: it lacks {', '.join(absent)}; it holds "
                    + cut(", ".join(file.files))
                )
            metadata = json.loads(str(file["metadata"]))
            columns = {name: file[name] for name in _NPZ}
        if metadata["format"] != NPZ_FORMAT or metadata["version"] != NPZ_VERSION:
            raise HdovdError(
                f"{path} is of {shown(metadata['format'])}, version {shown(metadata['version'])}; this hdovd reads "
                f"{NPZ_FORMAT}, version {NPZ_VERSION}: is it of a newer hdovd?"
            )
    except HdovdError:
        raise
    except Exception as error:  # a damaged archive fails in every way that zipfile, its decompressors and numpy have
        raise HdovdError(
            f"{path} is damaged ({type(error).__name__}: {cut(str(error))}); expected the .npz of hdovd propose or "
            f"hdovd proposals convert: is the download complete?"
        ) from error
    image_id, offset, box, score = columns.values()
    if (
        any(columns[name].dtype != kind for name, kind in _NPZ.items())
        or image_id.ndim != 1
        or offset.shape != (len(image_id) + 1,)
        or score.ndim != 1
        or box.shape != (len(score), 4)
        or offset[0] != 0
        or offset[-1] != len(score)
        or (np.diff(offset) < 0).any()
        or len(np.unique(image_id)) < len(image_id)
    ):
        raise HdovdError(
            f"{path}: image_id, offset, box and score do not fit together (shapes "
            f"{image_id.shape}, {offset.shape}, {box.shape}, {score.shape}): make the file anew"
        )
    return ProposalTable(np.repeat(image_id, np.diff(offset)), box, score, "hdovd's .npz"), metadata


def write_proposals(path: Path, proposals: dict[int, Proposals], made_by: MadeBy | None = None) -> int:
    """Write all proposals, image by image, and return how many; the file appears whole or not at all.

    A name that ends in .npz says the form; any other is COCO results JSON. Either holds the same float32 numbers.
    """
    table = ProposalTable.of(proposals)
    about = {"identity": table.identity(), "made_by": made_by}
    if path.suffix == ".npz":
        replace_file(path, lambda partial: _write_npz(partial, proposals, table, about))
    else:
        replace_file(path, lambda partial: _write_json(partial, proposals))
        sidecar = made_by_file(path)
        if made_by is None:
            sidecar.unlink(missing_ok=True)  # of the proposals that were here before
        else:
            write_text(sidecar, json.dumps(about, indent=1))
    return len(table.image_id)


def made_by_file(path: Path) -> Path:
    """The sidecar of a JSON file."""
    return path.with_name(f"{path.name}.made_by.json")


def made_by_line(made_by: MadeBy | None) -> str:
    """What made proposals, in a line."""
    if not made_by:
        return "made by: unknown (the file does not say)"
    named = [
        f"{name} {value}"
        for name, value in made_by.items()
        if isinstance(value, str | int | float) and not isinstance(value, bool)
    ]
    return "made by: " + (shorten(list(named), 6) or ", ".join(made_by))


def _write_npz(partial: Path, proposals: dict[int, Proposals], table: ProposalTable, about: dict[str, Any]) -> None:
    with partial.open("wb") as file:
        np.savez(
            file,
            image_id=np.array(list(proposals), np.int64),
            offset=np.cumsum([0, *(len(found.boxes) for found in proposals.values())], dtype=np.int64),
            box=table.box.astype(np.float32),
            score=table.score.astype(np.float32),
            metadata=np.array(json.dumps({"format": NPZ_FORMAT, "version": NPZ_VERSION, **about})),
        )


def _write_json(partial: Path, proposals: dict[int, Proposals]) -> None:
    texts = (  # one at a time: millions of entries as objects would take gigabytes
        json.dumps({"image_id": image_id, "bbox": box, "score": score})
        for image_id, found in proposals.items()
        for box, score in zip(_xywh(found.boxes), _decimals(found.scores).tolist(), strict=True)
    )
    with partial.open("w") as file:
        file.write("[" + next(texts, ""))
        file.writelines(f", {text}" for text in texts)
        file.write("]")


def _decimals(values: np.ndarray) -> np.ndarray:
    """float32 numbers as the doubles with the fewest digits that are the same in float32."""
    return np.asarray(values, np.float32).astype("U32").astype(np.float64)


def _xywh(boxes: np.ndarray) -> list[list[float]]:
    """x, y, w, h of (n, 4) xyxy, such that x + w and y + h are the same float32 numbers again."""
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    short, long = _decimals(boxes), boxes.astype(np.float64)
    side = (short[:, 2:] - short[:, :2]).round(9)
    with np.errstate(invalid="ignore"):
        unlike = (short[:, :2] + side).astype(np.float32) != boxes[:, 2:]
    corner = np.where(unlike, long[:, :2], short[:, :2])
    side = np.where(unlike, long[:, 2:] - long[:, :2], side)
    rows: list[list[float]] = np.concatenate([corner, side], 1).tolist()
    return rows


def convert_proposals(
    source: Path, out: Path, annotations: Path | None = None, order: ListOrder = ListOrder.FILE
) -> str:
    """Write all proposals of `source` to `out` as its suffix says, best first; returns their identity. Raises
    HdovdError for bad input.
    """
    require_proposal_file(out)
    if out.resolve() == source.resolve():
        raise HdovdError(f"--out {out} is the file to read: give another name")
    table = read_table(source, annotations, order)
    log(*table.notes)
    count, identity = write_proposals(out, table.by_image(), table.made_by), table.identity()
    log(f"wrote {out}: {count:,d} proposals, identity {identity}; {made_by_line(table.made_by)}")
    return identity


def info_lines(source: Path, annotations: Path | None = None, order: ListOrder = ListOrder.FILE) -> list[str]:
    """What a proposal file holds. Raises HdovdError if it cannot be read."""
    table = read_table(source, annotations, order)
    counts, score = np.unique(table.image_id, return_counts=True)[1], table.score
    sides = table.box[:, 2:] - table.box[:, :2]
    size = np.sqrt(np.maximum(sides, 0).prod(axis=1))
    bad = int((~np.isfinite(table.box).all(1) | ~np.isfinite(score) | ~(sides > 0).all(1)).sum())
    values = {
        "form": table.form,
        "identity": table.identity(),
        "proposals": f"{len(score):,d}" + (f", {bad:,d} of them without area or not finite: not usable" if bad else ""),
        "images": f"{len(counts):,d} with {counts.min()} to {counts.max()} (median {np.median(counts):g}) proposals "
        f"each",
        "scores": "none" if np.isnan(score).all() else f"{np.nanmin(score):.4g} to {np.nanmax(score):.4g}",
        "size": "none" if np.isnan(size).all() else f"median {np.nanmedian(size):.0f} px (the square root of the area)",
    }
    made_by = [made_by_line(None)] if table.made_by is None else ["made by", *pair_lines(table.made_by)]
    return [
        str(source),
        *(f"  {name:10s}{value}" for name, value in values.items()),
        *(f"  {line}" for line in made_by),
        *(f"  note: {note}" for note in table.notes),
    ]
