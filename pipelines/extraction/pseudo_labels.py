"""Pseudo text labels: the nouns that a crop is most like, and the text embedding u that they give (METHOD section 2).

Works on cached rows, without CLIP. n crops, K nouns, k nouns a label, D embedding size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hdovd.cache.identity import hash_tables
from hdovd.cache.schema import Source
from hdovd.core.errors import HdovdError, shorten
from hdovd.data.coco import ImageBoxes
from hdovd.pipelines.common.name_list import shipped
from hdovd.pipelines.extraction.config import TEMPERATURE, LabelChoice, LabelRule
from hdovd.pipelines.extraction.identities import BoxTable
from hdovd.pipelines.extraction.verdicts import Verdicts
from hdovd.pipelines.nouns.allowed import Nouns, meaning


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
            crops = torch.from_numpy(embeddings[rows].astype(np.float32))
            added = prior(own, len(texts), rule, None if barred is None else barred[image_id])
            if verdicts is not None:
                added = added + temperature * verdicts.of_rows(start + rows, len(texts), rule.backgrounds)
            found, weights, best = best_nouns(crops, texts, rule, added)
            k = found.shape[1]
            top_noun[rows, :k], top_weight[rows, :k], cosine[rows] = found.numpy(), weights.numpy(), best.numpy()
    arrays = {"noun": top_noun[:, 0], "noun_cosine": cosine}
    return arrays | ({"top_noun": top_noun, "top_weight": top_weight} if rule.top > 1 else {})
