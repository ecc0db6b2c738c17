"""Pseudo text labels: the nouns that a crop is most like, and the text embedding u that they give (METHOD section 2).

Works on cached rows, without CLIP. n crops, K nouns, k nouns a label, D embedding size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hdovd.cache.schema import Source
from hdovd.pipelines.extraction.boxes import BoxTable
from hdovd.pipelines.extraction.config import LabelRule

SIMILARITY_ROWS = 4_096  # crops compared with nouns at a time


@dataclass(frozen=True, slots=True)
class Labels:
    """top_noun (n, k) int32, best first, -1 where an image offers fewer than k; top_weight (n, k) float32; cosine (n,)
    of the best.
    """

    top_noun: np.ndarray
    top_weight: np.ndarray
    cosine: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """The row arrays of a pseudo_label product."""
        arrays = {"noun": self.top_noun[:, 0], "noun_cosine": self.cosine}
        return arrays | (
            {"top_noun": self.top_noun, "top_weight": self.top_weight} if self.top_noun.shape[1] > 1 else {}
        )


def no_labels(count: int, rule: LabelRule) -> Labels:
    """Labels of rows that have none."""
    return Labels(
        np.full((count, rule.top), -1, np.int32), np.zeros((count, rule.top), np.float32), np.zeros(count, np.float32)
    )


def best_nouns(crops: Tensor, nouns: Tensor, rule: LabelRule) -> tuple[Tensor, Tensor, Tensor]:
    """The nouns of a label: crops (n, D), nouns (K, D), both L2-normalised, K >= 1.

    Returns their rows (n, k) int64, best first, their weights (n, k), and the best one's cosine (n,); k is at most K.
    """
    cosines = crops @ nouns.T
    if rule.top == 1:
        best = cosines.max(dim=1)
        return best.indices[:, None], torch.ones(len(crops), 1), best.values
    top = cosines.topk(min(rule.top, len(nouns)), dim=1)
    return top.indices, (top.values / rule.temperature).softmax(dim=1), top.values[:, 0]


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
    offered: Mapping[int, np.ndarray] | None,
    rule: LabelRule,
) -> Labels:
    """Labels of rows `start` to `stop` of the box table: of proposals that have an embedding.

    embeddings (stop - start, D) float16; nouns (K, D) float16; offered: noun rows by image id, None for all of them
    everywhere.
    """
    texts, labels = torch.from_numpy(nouns.astype(np.float32)), no_labels(stop - start, rule)
    named = (table.source[start:stop] == Source.PROPOSAL) & embeddings.any(axis=1)

    def label(rows: np.ndarray, choice: np.ndarray | None) -> None:
        crops = torch.from_numpy(embeddings[rows].astype(np.float32))
        found, weights, cosine = best_nouns(crops, texts if choice is None else texts[choice], rule)
        k = found.shape[1]
        labels.top_noun[rows, :k] = found.numpy() if choice is None else choice[found.numpy()]
        labels.top_weight[rows, :k], labels.cosine[rows] = weights.numpy(), cosine.numpy()

    if offered is None:
        for rows in np.array_split(np.flatnonzero(named), max(1, -(-int(named.sum()) // SIMILARITY_ROWS))):
            label(rows, None)
        return labels
    for number in table.images_of(start, stop):
        first, last = max(int(table.offset[number]), start) - start, min(int(table.offset[number + 1]), stop) - start
        rows, choice = first + np.flatnonzero(named[first:last]), offered.get(int(table.image_id[number]))
        if choice is not None and len(choice) and len(rows):
            label(rows, choice)
    return labels
