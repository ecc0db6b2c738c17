"""Proposal files from one form to another, and what one holds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from hdovd.core.errors import HdovdError
from hdovd.pipelines.common.settings import pair_lines
from hdovd.pipelines.proposal_files.file import made_by_line, read_table, write_proposals
from hdovd.pipelines.proposal_files.options import ListOrder, require_form
from hdovd.pipelines.proposal_files.table import ProposalTable


def convert_proposals(
    source: Path,
    out: Path,
    annotations: Path | None = None,
    order: ListOrder = ListOrder.FILE,
    log: Callable[[str], None] = print,
) -> str:
    """Write all proposals of `source` to `out` as its suffix says, best first; returns their identity. Raises
    HdovdError for bad input.
    """
    require_form(out)
    if out.resolve() == source.resolve():
        raise HdovdError(f"--out {out} is the file to read: give another name")
    table = read_table(source, annotations, order)
    for note in table.notes:
        log(note)
    bad = int((~np.isfinite(table.box).all(1) | ~np.isfinite(table.score)).sum())
    if bad:
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
    side = np.sqrt(np.maximum(table.box[:, 2:] - table.box[:, :2], 0).prod(axis=1))
    with np.errstate(invalid="ignore"):
        bad = int(
            (
                ~np.isfinite(table.box).all(1)
                | ~np.isfinite(table.score)
                | ~(table.box[:, 2:] > table.box[:, :2]).all(1)
            ).sum()
        )
    return {
        "proposals": f"{len(table.image_id):,d}"
        + (f", {bad:,d} of them without area or not finite: not usable" if bad else ""),
        "images": f"{len(counts):,d} with {counts.min()} to {counts.max()} (median {np.median(counts):g}) proposals "
        f"each",
        "scores": f"{np.nanmin(table.score):.4g} to {np.nanmax(table.score):.4g}"
        if not np.isnan(table.score).all()
        else "none",
        "size": f"median {np.nanmedian(side):.0f} px (the square root of the area)"
        if not np.isnan(side).all()
        else "none",
    }
