"""Proposal files: read in any form, written as COCO results JSON or .npz, with their identity and what made them;
converted and described.

What made them (`made_by`, JSON values) stands in the .npz, and for JSON in a sidecar,
`FILE.made_by.json`, which names the identity of the proposals that it is of.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.core.errors import HdovdError, shorten
from hdovd.core.log import log
from hdovd.core.text_files import printable, read_json, shown
from hdovd.data.coco import ImageBoxes, Skips
from hdovd.pipelines.common.atomic_write import replace_file, write_text
from hdovd.pipelines.common.options import ListOrder, require_proposal_file
from hdovd.pipelines.common.settings import pair_lines
from hdovd.pipelines.proposal_files.table import (
    NO_PROPOSALS,
    NPZ_FORMAT,
    NPZ_VERSION,
    MadeBy,
    Proposals,
    ProposalTable,
    read_coco_results,
    read_npz,
    read_pickle,
)

__all__ = [
    "NO_PROPOSALS",
    "MadeBy",
    "ProposalTable",
    "Proposals",
    "made_by_file",
    "made_by_line",
    "read_table",
    "usable_proposals",
    "write_proposals",
]
PICKLES = (".pkl", ".pickle")
_UNKNOWN = "what made these proposals counts as unknown"


def read_table(path: Path, annotations: Path | None = None, order: ListOrder = ListOrder.FILE) -> ProposalTable:
    """All of a proposal file, whichever form it has; `annotations` and `order` are for lists without image ids.

    Raises HdovdError if it is of none of the forms, damaged or unsafe, or empty.
    """
    head = b""
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(2)
    if head == b"PK":
        table, about = read_npz(path)
        table = _with_made_by(table, about, f"{path.name} says what made its proposals")
    elif head[:1] == b"\x80" or path.suffix in PICKLES:
        table = read_pickle(path, annotations, order)
    else:
        table = _with_sidecar(read_coco_results(path), path)
    if not len(table.image_id):
        raise HdovdError(
            f"{path} holds no proposals; make them with hdovd propose, or leave --proposals out to cache base boxes "
            f"alone"
        )
    return table


def usable_proposals(table: ProposalTable, path: Path, images: list[ImageBoxes], skips: Skips) -> dict[int, Proposals]:
    """Those of `images`, by image id; what is left out goes to `skips`. Raises HdovdError if none is left."""
    found = table.for_images(images, skips)
    if not found:
        raise HdovdError(
            f"{path} holds no usable proposal for the {len(images)} training images "
            f"(ids {shorten([image.id for image in images], 4)}):\n" + "\n".join(skips.lines())
        )
    return found


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


def _with_sidecar(table: ProposalTable, path: Path) -> ProposalTable:
    sidecar = made_by_file(path)
    if not sidecar.is_file():
        return table
    try:
        tree = read_json(sidecar, "made_by")
        about = {name: tree[name] for name in ("identity", "made_by")}
    except (HdovdError, KeyError, TypeError) as error:
        return replace(table, notes=(*table.notes, f"{sidecar} is damaged ({error}): {_UNKNOWN}"))
    return _with_made_by(table, about, f"{sidecar} was written")


def _with_made_by(table: ProposalTable, about: dict[str, Any], who: str) -> ProposalTable:
    """With what a file says made proposals, if it is of these: its `identity` is theirs."""
    made_by, own = about.get("made_by"), table.identity()
    if made_by is None:
        return table
    if not printable(made_by):
        why = "with characters that cannot be printed"
    elif not isinstance(made_by, dict):
        why = "and is no table"
    elif about.get("identity") != own:
        why = f"of the proposals {shown(about.get('identity'))}, these are {own}"
    else:
        return replace(table, made_by=made_by)
    return replace(table, notes=(*table.notes, f"{who} {why}: {_UNKNOWN}"))


def _write_npz(partial: Path, proposals: dict[int, Proposals], table: ProposalTable, about: dict[str, Any]) -> None:
    offset = np.cumsum([0, *(len(found.boxes) for found in proposals.values())], dtype=np.int64)
    metadata = json.dumps({"format": NPZ_FORMAT, "version": NPZ_VERSION, **about})
    with partial.open("wb") as file:
        np.savez(
            file,
            image_id=np.array(list(proposals), np.int64),
            offset=offset,
            box=table.box.astype(np.float32),
            score=table.score.astype(np.float32),
            metadata=np.array(metadata),
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
    short = _decimals(boxes)
    side = (short[:, 2:] - short[:, :2]).round(9)
    with np.errstate(invalid="ignore"):
        unlike = (short[:, :2] + side).astype(np.float32) != boxes[:, 2:]
    long = boxes.astype(np.float64)
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
    if bad := int((~np.isfinite(table.box).all(1) | ~np.isfinite(table.score)).sum()):
        log(f"{bad:,d} entries hold what is no finite number; they are kept, and extract-clip will skip them")
    count = write_proposals(out, table.by_image(), table.made_by)
    identity = table.identity()
    log(f"wrote {out}: {count:,d} proposals, identity {identity}; {made_by_line(table.made_by)}")
    return identity


def info_lines(source: Path, annotations: Path | None = None, order: ListOrder = ListOrder.FILE) -> list[str]:
    """What a proposal file holds. Raises HdovdError if it cannot be read."""
    table = read_table(source, annotations, order)
    values = {"form": table.form, "identity": table.identity(), **_numbers(table)}
    lines = [str(source), *(f"  {name:10s}{value}" for name, value in values.items())]
    if table.made_by is None:
        lines.append(f"  {made_by_line(None)}")
    else:
        lines += ["  made by", *(f"  {line}" for line in pair_lines(table.made_by))]
    return lines + [f"  note: {note}" for note in table.notes]


def _numbers(table: ProposalTable) -> dict[str, str]:
    counts = np.unique(table.image_id, return_counts=True)[1]
    sides, score = table.box[:, 2:] - table.box[:, :2], table.score
    size = np.sqrt(np.maximum(sides, 0).prod(axis=1))
    bad = int((~np.isfinite(table.box).all(1) | ~np.isfinite(score) | ~(sides > 0).all(1)).sum())
    return {
        "proposals": f"{len(score):,d}" + (f", {bad:,d} of them without area or not finite: not usable" if bad else ""),
        "images": f"{len(counts):,d} with {counts.min()} to {counts.max()} (median {np.median(counts):g}) proposals "
        f"each",
        "scores": "none" if np.isnan(score).all() else f"{np.nanmin(score):.4g} to {np.nanmax(score):.4g}",
        "size": "none" if np.isnan(size).all() else f"median {np.nanmedian(size):.0f} px (the square root of the area)",
    }
