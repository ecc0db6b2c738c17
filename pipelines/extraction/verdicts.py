"""Verdicts: what another model than CLIP calls each proposal, with its scores, mixed with CLIP's own likelihoods
(`pseudo_labels.label_rows`).

A file of JSON lines, one proposal a line, as a vision-language model that was shown its crop may have answered:

    {"image_id": 139, "bbox": [236.9, 142.5, 24.7, 69.5], "names": {"vase": 0.7, "bottle": 0.2}}

`bbox` is x, y, width and height in pixels, as in proposal files; `"row": 17`, the proposal's place in the cache, may
stand for image and box. Scores count against each other alone. Names that a proposal's line does not have count as its
`"others"`, the score of each of them, or as `FLOOR` of its best one; a proposal without a line is named by CLIP alone.
`hdovd relabel` writes such a file too.

M rows of the box table, V names that proposals have, K nouns.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hdovd.cache.identity import hash_tables
from hdovd.cache.schema import Source
from hdovd.core.errors import HdovdError, counted, shorten
from hdovd.core.log import log
from hdovd.core.text_files import cut, json_lines, shown
from hdovd.data.coco import whole
from hdovd.pipelines.common.atomic_write import replace_file
from hdovd.pipelines.extraction.identities import BoxTable
from hdovd.pipelines.nouns.allowed import meaning

FLOOR = 1e-3
EXPECTED = '{"image_id": 1, "bbox": [x, y, w, h], "names": {"cat": 0.9}}'
LARGEST = 1e300  # whole numbers in JSON have no end
SAME_BOX_PX = 1.0  # on every side: files round


@dataclass(frozen=True, slots=True, eq=False)
class Verdicts:
    """Of row i of the box table the names offset[i]:offset[i + 1]: `noun` (V,) int32, and `log_score` (V,) float32, the
    logarithm of its share of the row's best score, log(FLOOR) to 0; `log_others` (M,) float32 that of all other names.
    """

    offset: np.ndarray
    noun: np.ndarray
    log_score: np.ndarray
    log_others: np.ndarray

    def identity(self) -> str:
        return hash_tables([self.offset, self.noun, self.log_score, self.log_others])

    def of_rows(self, rows: np.ndarray, nouns: int, backgrounds: Sequence[int] = ()) -> Tensor:
        """Log scores (n, K) of rows of the box table; 0 in those without a verdict, and of backgrounds that a verdict
        does not name: it says which object it is, and may not have been asked whether it is one.
        """
        found = torch.zeros(len(rows), nouns)
        for log_scores, row in zip(found, rows.tolist(), strict=True):
            first, last = self.offset[row : row + 2].tolist()
            if last > first:
                log_scores.fill_(float(self.log_others[row]))
                log_scores[list(backgrounds)] = 0.0
                log_scores[torch.from_numpy(self.noun[first:last].astype(np.int64))] = torch.from_numpy(
                    self.log_score[first:last]
                )
        return found


def write_verdicts(path: Path, lines: Iterable[tuple[int, list[float], dict[str, float], float]]) -> None:
    """lines: image id, box as x, y, width, height, scores by name, the score of all others. Whole or absent."""
    keys = ("image_id", "bbox", "names", "others")
    texts = (json.dumps(dict(zip(keys, line, strict=True))) for line in lines)

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(f"{text}\n" for text in texts)

    replace_file(path, write)


def read_verdicts(path: Path, table: BoxTable, vocabulary: Sequence[str]) -> Verdicts:
    """The verdicts of a file on the proposals of a table. Names that the vocabulary lacks are counted and told.

    Raises HdovdError for a line that is no verdict, or on no proposal of the table, and if no name is known.
    """
    place = {image_id: number for number, image_id in enumerate(table.image_id.tolist())}
    rows_of, unknown = dict[str, list[int]](), Counter[str]()
    for noun, name in enumerate(vocabulary):
        rows_of.setdefault(meaning(name), []).append(noun)
    called = cache(lambda name: rows_of.get(meaning(name), ()))  # names come again and again
    of_others = np.zeros(len(table.box))
    seen, row_of, noun_of, score_of = np.zeros(len(table.box), bool), array("q"), array("i"), array("d")
    for where, tree in json_lines(path, EXPECTED):
        row, found = _row(tree, table, place, where), dict[int, float]()
        scores, others = _scores(tree, where)
        if seen[row]:
            raise HdovdError(f"{where}: a second verdict on the same proposal: expected one line for each")
        seen[row], best = True, max(scores.values(), default=1.0)
        of_others[row] = others / best
        for name, score in scores.items():
            nouns = called(name)
            unknown[name] += not nouns
            found |= {noun: max(score / best, found.get(noun, 0.0)) for noun in nouns}
        row_of.extend([row] * len(found))
        noun_of.extend(found)
        score_of.extend(found.values())
    if unknown := +unknown:
        told = [f"{name} ({count:,d})" for name, count in unknown.most_common()]
        log(f"{path}: left out {counted(len(unknown), 'name')} that the vocabulary lacks: {shorten([*told])}")
    rows, nouns_of_rows, scores_of_rows = np.array(row_of, np.int64), np.array(noun_of, np.int32), np.array(score_of)
    if not len(rows):
        raise HdovdError(
            f"{path} names no proposal by a noun of the vocabulary ({len(vocabulary)} nouns, such as "
            f"{shorten([*vocabulary], 4)}): give --nouns or --vocabulary with the names that it uses"
        )
    proposals = int((table.source == Source.PROPOSAL).sum())
    log(f"verdicts of {path}: on {len(np.unique(rows)):,d} of {proposals:,d} proposals")
    order, counts = np.lexsort((nouns_of_rows, rows)), np.bincount(rows + 1, minlength=len(table.box) + 1)
    logs = (np.log(shares.clip(FLOOR, 1)).astype(np.float32) for shares in (scores_of_rows[order], of_others))
    return Verdicts(counts.cumsum(), nouns_of_rows[order], *logs)


def _row(tree: dict[str, Any], table: BoxTable, place: Mapping[int, int], where: str) -> int:
    """The row of the table that a verdict is on. Raises HdovdError if it is on none, or on a base box."""
    if "row" in tree:
        row = whole(tree["row"], f"{where}: row")
        if not (0 <= row < len(table.box) and table.source[row] == Source.PROPOSAL):
            raise HdovdError(f"{where}: row {row} is no proposal of the {len(table.box):,d} boxes of this extraction")
        if "bbox" in tree and row != _row({key: tree[key] for key in tree if key != "row"}, table, place, where):
            raise HdovdError(
                f"{where}: row {row} is another proposal than its bbox: were they asked about another set?"
            )
        return row
    image_id = whole(tree.get("image_id"), f"{where}: image_id")
    if image_id not in place:
        raise HdovdError(f"{where}: image {image_id} is not in the training set: are these verdicts of other images?")
    try:
        x, y, w, h = map(float, tree["bbox"])
        box = np.array([x, y, x + w, y + h])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise HdovdError(f"{where}: bbox is {shown(tree.get('bbox'))}, expected [x, y, width, height]") from error
    first, last = table.offset[place[image_id] : place[image_id] + 2].tolist()
    own = first + np.flatnonzero(table.source[first:last] == Source.PROPOSAL)
    away = np.abs(table.box[own] - box.clip(0, np.tile(table.image_size[place[image_id]], 2))).max(axis=1)
    if not len(own) or not away.min() <= SAME_BOX_PX:
        raise HdovdError(
            f"{where}: image {image_id} has no proposal at {cut(str(tree['bbox']))}, it has {len(own)} elsewhere: "
            f"verdicts have to be on the boxes of --proposals"
        )
    return int(own[away.argmin()])


def _scores(tree: dict[str, Any], where: str) -> tuple[dict[str, float], float]:
    """Scores by name, {} where nothing was answered, and that of all others. Raises HdovdError if none is above 0, or
    one is no number of 0 or more.
    """
    names, others = tree.get("names"), tree.get("others", 0.0)
    expected = 'expected a score for each name, 0 or more, as {"cat": 0.9}'
    if not isinstance(names, dict):
        raise HdovdError(f"{where}: names is {shown(names)}, {expected}")
    for name, score in (*names.items(), ("others", others)):
        if type(score) not in (int, float) or not 0 <= score < LARGEST:
            raise HdovdError(f"{where}: the score of {cut(name)!r} is {shown(score)}, {expected}")
    if names and not any(names.values()):
        raise HdovdError(f"{where}: no name has a score above 0, {expected}")
    return names, others
