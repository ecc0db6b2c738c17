"""Pseudo text labels: the nouns that a crop is most like, and the text embedding u that they give (METHOD section 2).

Works on cached rows, without CLIP. n crops, K nouns, k nouns a label, D embedding size.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hdovd.cache.schema import Source
from hdovd.pipelines.extraction.config import LabelRule
from hdovd.pipelines.extraction.identities import BoxTable

SIMILARITY_ROWS = 4_096  # crops compared with nouns at a time


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
    offered: Mapping[int, Sequence[int]] | None,
    rule: LabelRule,
) -> dict[str, np.ndarray]:
    """The row arrays of a pseudo_label product, rows `start` to `stop` of the box table: of proposals that have an
    embedding.

    embeddings (stop - start, D) float16; nouns (K, D) float16; offered: noun rows by image id, None for all of them
    everywhere.
    """
    texts, rows_and_nouns = torch.from_numpy(nouns.astype(np.float32)), (stop - start, rule.top)
    top_noun, top_weight = np.full(rows_and_nouns, -1, np.int32), np.zeros(rows_and_nouns, np.float32)
    cosine = np.zeros(stop - start, np.float32)
    named = (table.source[start:stop] == Source.PROPOSAL) & embeddings.any(axis=1)

    def label(rows: np.ndarray, choice: np.ndarray | None) -> None:
        crops = torch.from_numpy(embeddings[rows].astype(np.float32))
        found, weights, best = best_nouns(crops, texts if choice is None else texts[choice], rule)
        k = found.shape[1]
        top_noun[rows, :k] = found.numpy() if choice is None else choice[found.numpy()]
        top_weight[rows, :k], cosine[rows] = weights.numpy(), best.numpy()

    if offered is None:
        for rows in np.array_split(np.flatnonzero(named), max(1, -(-int(named.sum()) // SIMILARITY_ROWS))):
            label(rows, None)
    else:
        for number in table.images_of(start, stop):
            first, last = max(int(table.offset[number]), start), min(int(table.offset[number + 1]), stop)
            rows = first - start + np.flatnonzero(named[first - start : last - start])
            choice = np.array(offered.get(int(table.image_id[number]), ()), np.int64)
            if len(choice) and len(rows):
                label(rows, choice)
    arrays = {"noun": top_noun[:, 0], "noun_cosine": cosine}
    return arrays | ({"top_noun": top_noun, "top_weight": top_weight} if rule.top > 1 else {})
