"""Which query is which box's: one to one, at the least total cost (DETR, arXiv 2005.12872, section 3.1).

The Hungarian algorithm runs on the host. All that it needs of a step, of all pictures and stages, comes over in one transfer
(`to_host`); nothing else of a step's losses waits for the device. Called by `model` and `proposal_loss`.
S stages, N pictures, Q queries, T boxes of a picture, padded, G boxes of the batch, M candidates and H objects of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hdovd.config.adamixer import MatchCosts
from hdovd.modeling.adamixer.boxes import overlap
from hdovd.modeling.adamixer.boxes_of_step import StepBoxes

NONE = -1
NOT_FINITE = 1e6  # the cost in place of one that is not a number: the loss is then not finite either, and training says so
Array = NDArray[np.float32]


@torch.no_grad()
def pairing_costs(probability: Tensor, predicted: Tensor, boxes: Tensor, sizes: Tensor, weights: MatchCosts) -> tuple[Tensor, Tensor]:
    """The cost of pairing each query with each box, and their IoU.

    Args:
        probability: (..., N, Q). predicted: (..., N, Q, 4) xyxy. boxes: (N, T, 4) xyxy. sizes: (N, 2) height, width of each picture.

    Returns:
        Two times (..., N, Q, T).
    """
    iou, giou = overlap(predicted[..., :, None, :], boxes[:, None])
    scale = sizes.flip(-1).repeat(1, 2)[:, None]
    far = torch.cdist(predicted / scale, boxes / scale, p=1)
    p = probability[..., None]  # focal: what it costs to be taken for an object, less what it would cost to be taken for none
    focal = 0.75 * p**2 * (1 - p + 1e-12).log() - 0.25 * (1 - p) ** 2 * (p + 1e-12).log()
    return weights.objectness * focal + weights.l1 * far - weights.giou * giou, iou


def to_host(tensors: Sequence[Tensor]) -> list[Array]:
    """The tensors as arrays of float32, in one transfer."""
    flat = torch.cat([t.detach().float().flatten() for t in tensors]).cpu().numpy()
    ends = np.cumsum([t.numel() for t in tensors])[:-1]
    return [part.reshape(t.shape) for part, t in zip(np.split(flat, ends), tensors, strict=True)]


def pair(cost: Array) -> NDArray[np.int64]:
    """The row that each column of a cost matrix (Q, T) is paired with, or NONE: (T,); all are if there are rows enough."""
    found = np.full(cost.shape[1], NONE, dtype=np.int64)
    rows, columns = linear_sum_assignment(np.nan_to_num(cost, nan=NOT_FINITE, posinf=NOT_FINITE, neginf=-NOT_FINITE))
    found[columns] = rows
    return found


def pair_stages(cost: Array, boxes: StepBoxes) -> NDArray[np.int64]:
    """Base boxes first, then pseudo boxes with the queries that are left (HD-OVD, released code).

    Args:
        cost: (S, N, Q, T), columns as in `StepBoxes.padded`.

    Returns:
        (S, G) the query of each box of the batch, in 0..N Q - 1, or NONE.
    """
    stages, pictures, queries, columns = cost.shape
    found = np.full((stages, pictures, columns), NONE, dtype=np.int64)
    start = max(boxes.base)
    for s, n in np.ndindex(stages, pictures):
        of_base = slice(boxes.base[n])
        of_pseudo = slice(start, start + boxes.pseudo[n])
        found[s, n, of_base] = pair(cost[s, n, :, of_base])
        free = np.setdiff1d(np.arange(queries), found[s, n, of_base])
        rows = pair(cost[s, n, free, of_pseudo])
        found[s, n, of_pseudo] = np.where(rows == NONE, NONE, np.append(free, NONE)[rows])
    picture, column = np.array(boxes.places, dtype=np.int64).reshape(-1, 2).T
    flat = found[:, picture, column]
    return np.where(flat == NONE, NONE, flat + picture * queries)


def pair_candidates(cost: Array, distinct: Array, counts: Sequence[int]) -> NDArray[np.int64]:
    """The candidate of each object of a picture, or NONE: (N, H).

    Args:
        cost: (N, M, H). distinct: (N, M), zero for a candidate that takes no part. counts: objects of each picture.
    """
    found = np.full((cost.shape[0], cost.shape[2]), NONE, dtype=np.int64)
    for n, count in enumerate(counts):
        rows = distinct[n].nonzero()[0]
        chosen = pair(cost[n, rows, :count])
        found[n, :count] = np.where(chosen == NONE, NONE, np.append(rows, NONE)[chosen])
    return found
