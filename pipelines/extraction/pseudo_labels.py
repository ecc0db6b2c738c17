"""Pseudo text labels: the nouns that a crop is most like, and the text embedding u that they give (METHOD section 2);
and verdicts, what another model than CLIP calls each proposal, with its scores, mixed with CLIP's own likelihoods.

Works on cached rows, without CLIP. Verdicts are a file of JSON lines, one proposal a line, as a vision-language model
that was shown its crop may have answered:

    {"image_id": 139, "bbox": [236.9, 142.5, 24.7, 69.5], "names": {"vase": 0.7, "bottle": 0.2}}

`bbox` is x, y, width and height in pixels, as in proposal files; `"row": 17`, the proposal's place in the cache, may
stand for image and box. Scores count against each other alone. Names that a proposal's line does not have count as its
`"others"`, the score of each of them, or as `FLOOR` of its best one, and backgrounds among them as `"background"`, or
as its best one; a proposal without a line is named by CLIP alone.
`hdovd relabel` writes such a file too.

n crops, K nouns, k nouns a label, D embedding size; M rows of the box table, V names that proposals have.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hdovd.cache import Source, hash_tables
from hdovd.core import HdovdError, counted, log, shorten
from hdovd.core.text_files import cut, json_lines, shown
from hdovd.data import ImageBoxes
from hdovd.data.coco import whole
from hdovd.pipelines.common.atomic_write import replace_file
from hdovd.pipelines.common.name_list import shipped
from hdovd.pipelines.extraction.config import TEMPERATURE, LabelChoice, LabelRule
from hdovd.pipelines.extraction.identities import BoxTable
from hdovd.pipelines.nouns.allowed import Nouns, meaning

FLOOR = 1e-3
EXPECTED = '{"image_id": 1, "bbox": [x, y, w, h], "names": {"cat": 0.9}}'
OF_THE_REST = ("others", "background")  # keys of a line beside its names
LARGEST = 1e300  # whole numbers in JSON have no end
SAME_BOX_PX = 1.0  # on every side: files round


@dataclass(frozen=True, slots=True, eq=False)
class Verdicts:
    """Of row i of the box table the names offset[i]:offset[i + 1]: `noun` (V,) int32, and `log_score` (V,) float32, the
    logarithm of its share of the row's best score, log(FLOOR) to 0; `log_others` (M,) float32 that of all other names,
    `log_background` (M,) float32 of backgrounds among them.
    """

    offset: np.ndarray
    noun: np.ndarray
    log_score: np.ndarray
    log_others: np.ndarray
    log_background: np.ndarray

    def identity(self) -> str:
        grounds = [self.log_background] if self.log_background.any() else []  # as it was before lines could tell it
        return hash_tables([self.offset, self.noun, self.log_score, self.log_others, *grounds])

    def of_rows(self, rows: np.ndarray, nouns: int, backgrounds: Sequence[int] = ()) -> Tensor:
        """Log scores (n, K) of rows of the box table; 0 in those without a verdict, and of backgrounds where it says
        nothing of them: it says which object it is, and may not have been asked whether it is one.
        """
        found = torch.zeros(len(rows), nouns)
        for log_scores, row in zip(found, rows.tolist(), strict=True):
            first, last = self.offset[row : row + 2].tolist()
            if last > first:
                log_scores.fill_(float(self.log_others[row]))
                log_scores[list(backgrounds)] = float(self.log_background[row])
                log_scores[torch.from_numpy(self.noun[first:last].astype(np.int64))] = torch.from_numpy(
                    self.log_score[first:last]
                )
        return found


def write_verdicts(path: Path, lines: Iterable[tuple[int, list[float], dict[str, float], float, float]]) -> None:
    """lines: image id, box as x, y, width, height, scores by name, the score of all others, and that of backgrounds.
    Whole or absent.
    """
    keys = ("image_id", "bbox", "names", "others", "background")

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(dict(zip(keys, line, strict=True))) + "\n" for line in lines)

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
    of_others, of_grounds = np.zeros(len(table.box)), np.ones(len(table.box))
    seen, row_of, noun_of, score_of = np.zeros(len(table.box), bool), array("q"), array("i"), array("d")
    for where, tree in json_lines(path, EXPECTED):
        row, found = _row(tree, table, place, where), dict[int, float]()
        scores, others, background = _scores(tree, where)
        if seen[row]:
            raise HdovdError(f"{where}: a second verdict on the same proposal: expected one line for each")
        seen[row], best = True, max(scores.values(), default=1.0)
        of_others[row] = others / best
        for name, score in scores.items():
            nouns = called(name)
            unknown[name] += not nouns
            found |= {noun: max(score / best, found.get(noun, 0.0)) for noun in nouns}
        if found and background is not None:  # a line without a name that is known says nothing
            of_grounds[row] = background / best
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
    log(f"verdicts of {path}: on {len(np.unique(rows)):,d} of {(table.source == Source.PROPOSAL).sum():,d} proposals")
    order, counts = np.lexsort((nouns_of_rows, rows)), np.bincount(rows + 1, minlength=len(table.box) + 1)
    logs = (
        np.log(shares.clip(FLOOR, 1)).astype(np.float32) for shares in (scores_of_rows[order], of_others, of_grounds)
    )
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


def _scores(tree: dict[str, Any], where: str) -> tuple[dict[str, float], float, float | None]:
    """Scores by name, {} where nothing was answered, that of all others, and that of backgrounds, if it is told. Raises
    HdovdError if none is above 0, or one is no number of 0 or more.
    """
    names, told = tree.get("names"), {"others": 0.0} | {key: tree[key] for key in OF_THE_REST if key in tree}
    expected = 'expected a score for each name, 0 or more, as {"cat": 0.9}'
    if not isinstance(names, dict):
        raise HdovdError(f"{where}: names is {shown(names)}, {expected}")
    for name, score in (*names.items(), *told.items()):
        if type(score) not in (int, float) or not 0 <= score < LARGEST:
            raise HdovdError(f"{where}: the score of {cut(name)!r} is {shown(score)}, {expected}")
    if names and not any(names.values()):
        raise HdovdError(f"{where}: no name has a score above 0, {expected}")
    return names, told["others"], told.get("background")


def settled(
    rule: LabelRule, nouns: Nouns, images: Sequence[ImageBoxes], base: Sequence[Sequence[str]], temperature: float
) -> LabelRule:
    """The rule with what base boxes say: rows of the base classes' names are barred, and a noun that an image offers
    has `mention` more than others. Nouns of the list `backgrounds` that ships are of no object.

    `mention` is the log of how much likelier a name is to be offered where its object is than where it is not, counted
    over base classes and their boxes, in units of the cosine: times the temperature of CLIP's softmax. It is Bayes's
    rule for a noun, with CLIP's probability of the crop and the captions' of the noun.

    Args:
        base: the names of each base class. temperature: 1 / the teacher's logit scale.
    """
    if rule.choice is LabelChoice.MENTIONED:
        return rule
    of_class = rows_of_classes(nouns.vocabulary, base)
    barred = tuple(sorted(row for rows in of_class for row in rows))
    grounds = {meaning(name) for name in shipped("backgrounds")}
    found = (row for row, noun in enumerate(nouns.vocabulary) if meaning(noun) in grounds and row not in barred)
    rule = replace(rule, barred=barred, backgrounds=tuple(found))
    if (in_images := barred_in(rule, nouns, images, base)) is not None:
        rule = replace(rule, judged=hash_tables(np.array([i, *rows], np.int64) for i, rows in in_images.items()))
    if len(barred) + len(rule.backgrounds) == len(nouns.vocabulary):
        raise HdovdError(
            "the vocabulary holds names of base classes, whose objects are annotated, and of backgrounds alone: "
            "nothing is left to name pseudo boxes by. Give more names, or --label-choice mentioned"
        )
    if nouns.by_image is None or not barred:
        return rule
    counts = np.ones((2, 2))  # of classes in images: is there a box of it, is a name of it offered; one each beforehand
    for image in images:
        offered, there = set(nouns.offered(image.id)), set(image.labels.tolist())
        for label, rows in enumerate(of_class):
            if rows:
                counts[int(label in there), int(not offered.isdisjoint(rows))] += 1
    odds = counts[:, 1] / counts[:, 0]
    return replace(rule, mention=round(max(0.0, temperature * float(np.log(odds[1] / odds[0]))), 4))


def rule_line(rule: LabelRule, nouns: Nouns) -> str:
    """What base boxes and the nouns made of the rule, in words; nothing of one that they do not settle."""
    if rule.choice is LabelChoice.MENTIONED:
        return ""
    parts = [
        f"labels: {len(rule.barred)} of {len(nouns.vocabulary)} nouns name base classes, whose objects are annotated, "
        "and name no pseudo box" + ("" if rule.judged is None else " in an image that is judged by their class")
    ]
    if not rule.barred:
        parts = ["labels: the nouns name no base class: a proposal gets the likeliest of those that its image offers"]
    if rule.mention is not None:
        parts.append(f"a noun that the captions hold counts as {rule.mention:g} more cosine")
    if rule.backgrounds:
        names = shorten([nouns.vocabulary[row] for row in rule.backgrounds])
        parts.append(f"what is most like a background gets no label ({names})")
    return "; ".join(parts)


def rows_of_classes(vocabulary: Sequence[str], classes: Sequence[Sequence[str]]) -> list[set[int]]:
    """The rows of a vocabulary that name each class, in whatever form (`nouns.meaning`)."""
    rows = dict[str, set[int]]()
    for row, noun in enumerate(vocabulary):
        rows.setdefault(meaning(noun), set()).add(row)
    return [set().union(*(rows.get(meaning(name), set()) for name in names)) for names in classes]


def barred_in(
    rule: LabelRule, nouns: Nouns, images: Sequence[ImageBoxes], base: Sequence[Sequence[str]]
) -> dict[int, tuple[int, ...]] | None:
    """The noun rows that name no pseudo box of each image: of the base classes that it is judged by, all of whose
    objects have a box. None where annotations are not federated, and for a rule that bars none.

    base: the names of each base class.
    """
    if rule.choice is LabelChoice.MENTIONED or not images or images[0].judged is None:
        return None
    of_class = rows_of_classes(nouns.vocabulary, base)
    judged = {image.id: [] if image.judged is None else np.flatnonzero(image.judged).tolist() for image in images}
    return {i: tuple(sorted(set().union(*(of_class[label] for label in labels)))) for i, labels in judged.items()}


def prior(offered: Sequence[int] | None, nouns: int, rule: LabelRule, barred: Sequence[int] | None = None) -> Tensor:
    """What is added to the cosines of an image's crops with the K nouns, (K,); -inf for nouns that they cannot have.

    offered: noun rows of the image, None for all of them. barred: those that name nothing in it, None for the rule's.
    """
    added = torch.full((nouns,), -torch.inf if offered is not None and rule.mention is None else 0.0)
    added[list(offered or ())] = rule.mention or 0.0
    added[list(rule.barred if barred is None else barred)] = -torch.inf
    return added


def best_nouns(
    crops: Tensor, nouns: Tensor, rule: LabelRule, added: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The nouns of a label: crops (n, D), nouns (K, D), both L2-normalised, K >= 1; added (K,) or (n, K), see `prior`.

    Returns their rows (n, k) int64, best first, -1 for none, their weights (n, k), 0 for none, and the best one's
    cosine (n,), 0 for none; k is at most K. Cosines and weights are of sums in float64: the last bits of a matrix
    product depend on where its rows lie in memory.
    """
    added = (torch.zeros(len(nouns)) if added is None else added).expand(len(crops), len(nouns))
    likely = crops @ nouns.T + added
    top = likely.topk(min(rule.top, len(nouns)), dim=1) if rule.top > 1 else likely.max(dim=1, keepdim=True)
    rows = top.indices
    cosines = (crops[:, None].double() * nouns[rows].double()).sum(dim=2)
    added, grounds = added.gather(1, rows), torch.isin(rows, torch.tensor(rule.backgrounds, dtype=torch.int64))
    ranks, none = cosines + added, (added == -torch.inf) | grounds | grounds[:, :1]
    ranks = ranks.masked_fill(none, -torch.inf)
    weights = (ranks / rule.temperature).softmax(dim=1) if rule.top > 1 else torch.ones_like(ranks)
    best = cosines[:, 0].masked_fill(none[:, 0], 0.0)
    return rows.masked_fill(none, -1), weights.masked_fill(none, 0.0).float(), best.float()


def label_texts(nouns: Tensor, top_noun: Tensor, top_weight: Tensor) -> Tensor:
    """u (n, D) of labels of several nouns: the L2-normalised weighted mean of their text embeddings.

    nouns (K, D); top_noun (n, k) int64, -1 for none, with weight 0; top_weight (n, k).
    """
    return F.normalize((nouns[top_noun.clamp(min=0)] * top_weight[..., None]).sum(dim=1), dim=1)


def label_rows(
    table: BoxTable,
    start: int,
    stop: int,
    embeddings: np.ndarray,
    nouns: np.ndarray,
    offered: Mapping[int, Sequence[int]] | None,
    rule: LabelRule,
    verdicts: Verdicts | None = None,
    temperature: float = TEMPERATURE,
    barred: Mapping[int, Sequence[int]] | None = None,
) -> dict[str, np.ndarray]:
    """The row arrays of a pseudo_label product, rows `start` to `stop` of the box table: of proposals that have an
    embedding.

    embeddings (stop - start, D) float16; nouns (K, D) float16; offered: noun rows by image id, None for all of them
    everywhere; barred: as of `barred_in`. What a verdict adds to a cosine is the logarithm of its score times the
    temperature of CLIP's softmax: Bayes's rule for two that judge by themselves.
    """
    texts, rows_and_nouns = torch.from_numpy(nouns.astype(np.float32)), (stop - start, rule.top)
    top_noun, top_weight = np.full(rows_and_nouns, -1, np.int32), np.zeros(rows_and_nouns, np.float32)
    cosine = np.zeros(stop - start, np.float32)
    named = (table.source[start:stop] == Source.PROPOSAL) & embeddings.any(axis=1)
    for number in table.images_of(start, stop):  # one at a time: a product's last bits depend on how many rows it has
        first, last = max(int(table.offset[number]), start), min(int(table.offset[number + 1]), stop)
        rows = first - start + np.flatnonzero(named[first - start : last - start])
        if len(rows):
            image_id = int(table.image_id[number])
            own = None if offered is None else offered.get(image_id, ())
            added = prior(own, len(texts), rule, None if barred is None else barred[image_id])
            if verdicts is not None:
                added = added + temperature * verdicts.of_rows(start + rows, len(texts), rule.backgrounds)
            found, weights, best = best_nouns(torch.from_numpy(embeddings[rows].astype(np.float32)), texts, rule, added)
            k = found.shape[1]
            top_noun[rows, :k], top_weight[rows, :k], cosine[rows] = found.numpy(), weights.numpy(), best.numpy()
    arrays = {"noun": top_noun[:, 0], "noun_cosine": cosine}
    return arrays | ({"top_noun": top_noun, "top_weight": top_weight} if rule.top > 1 else {})
