"""The boxes of a training step, and which query is which box's: one to one, at the least total cost (DETR, arXiv
2005.12872, section 3.1).

The Hungarian algorithm runs on the host. All that it needs of a step, of all pictures and stages, comes over in one
transfer (`to_host`); pairs are then known on the host and on the device, so that no choice of rows waits for the
device. S stages, N pictures, Q queries, G boxes of the batch, picture by picture, base before pseudo; T columns: base
boxes of a picture from 0 on, padded to the most of any picture, then pseudo boxes likewise; M candidates and H objects
of a picture, padded; D embedding size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hdovd.config.detector import MatchCosts
from hdovd.config.recipe import ClassLossConfig, PseudoBoxConfig
from hdovd.data.targets import Targets, with_large_pseudo_boxes
from hdovd.modeling.boxes import overlap
from hdovd.modeling.levels.classwise import box_weights


@dataclass(frozen=True, slots=True)
class StepBoxes:
    """targets: an image each, with the pseudo boxes that are used. base, pseudo: how many boxes each picture has.

    boxes (G, 4), is_base (G,) bool; picture (G,) and column (G,) int64, its place among the padded (N, T); padded (N,
    T, 4). labels (G,) int64: the class, or -1 for a pseudo box. weights (G,): 1, or w_j for a pseudo box (0 without the
    class level). embeddings (G, D). objects (N, H, 4), is_object (N, H) bool, object_counts of each picture: what the
    proposals are trained on, base boxes and all pseudo boxes that are large enough. sizes (N, 2) height, width of each
    picture, pixels.
    """

    targets: list[Targets]
    base: list[int]
    pseudo: list[int]
    boxes: Tensor
    is_base: Tensor
    picture: Tensor
    column: Tensor
    padded: Tensor
    labels: Tensor
    weights: Tensor
    embeddings: Tensor
    objects: Tensor
    is_object: Tensor
    object_counts: list[int]
    sizes: Tensor

    @property
    def places(self) -> list[tuple[int, int]]:
        """The picture and the column of each of the G boxes."""
        return _places(self.base, self.pseudo)

    @property
    def base_on_host(self) -> NDArray[np.bool_]:
        """`is_base`, without waiting for the device."""
        return np.array([column < max(self.base) for _, column in self.places], dtype=bool)


def boxes_of_step(
    targets: Sequence[Targets],
    sizes: Sequence[tuple[int, int]],
    config: PseudoBoxConfig,
    of_class: ClassLossConfig,
    *,
    with_pseudo: bool,
) -> StepBoxes:
    """Sort the boxes of a batch.

    Args:
        targets: at the detector's scale. sizes: (height, width) of each picture.
        with_pseudo: whether the stages see pseudo boxes; the proposals always do (released code: in every epoch, and
        all of them).
    """
    device = targets[0].boxes.device
    large = with_large_pseudo_boxes(targets, config.min_side)
    used = [t.with_first_pseudo_boxes(config.max_per_image if with_pseudo else 0) for t in large]
    base, pseudo = [len(t.boxes) for t in used], [len(t.pseudo_boxes) for t in used]
    picture, column = (
        torch.tensor(_places(base, pseudo), dtype=torch.int64).reshape(-1, 2).to(device, non_blocking=True).unbind(1)
    )
    padded = torch.cat(
        [
            pad_sequence([t.boxes for t in used], batch_first=True),
            pad_sequence([t.pseudo_boxes for t in used], batch_first=True),
        ],
        dim=1,
    )
    objects = pad_sequence(
        [torch.cat([t.all_boxes, t.boxes.new_zeros(1, 4)]) for t in large], batch_first=True
    )  # never without a column
    counts = [len(t.all_boxes) for t in large]
    return StepBoxes(
        used,
        base,
        pseudo,
        torch.cat([t.all_boxes for t in used]),
        column < max(base),
        picture,
        column,
        padded,
        torch.cat([rows for t in used for rows in (t.labels, t.labels.new_full((len(t.pseudo_boxes),), -1))]),
        box_weights(used, of_class, config),
        torch.cat([rows for t in used for rows in (t.embeddings, t.pseudo_embeddings)]),
        objects,
        torch.arange(objects.shape[1], device=device) < torch.tensor(counts).to(device, non_blocking=True)[:, None],
        counts,
        torch.tensor(sizes, dtype=padded.dtype).to(device, non_blocking=True),
    )


def _places(base: list[int], pseudo: list[int]) -> list[tuple[int, int]]:
    start = max(base)
    return [(n, column) for n in range(len(base)) for column in (*range(base[n]), *range(start, start + pseudo[n]))]


NONE = -1  # and so the place of what is appended to rows that pairs are looked up in
NOT_FINITE = (
    1e6  # the cost in place of one that is not a number: the loss is then not finite either, and training says so
)
Array = NDArray[np.float32]


@torch.no_grad()
def pairing_costs(
    probability: Tensor, predicted: Tensor, boxes: Tensor, sizes: Tensor, weights: MatchCosts
) -> tuple[Tensor, Tensor]:
    """The cost of pairing each query with each box, and their IoU.

    Args:
        probability: (..., N, Q). predicted: (..., N, Q, 4) xyxy. boxes: (N, T, 4) xyxy. sizes: (N, 2) height, width of
        each picture.

    Returns:
        Two times (..., N, Q, T).
    """
    iou, giou = overlap(predicted[..., :, None, :], boxes[:, None])
    scale = sizes.flip(-1).repeat(1, 2)[:, None]
    far = torch.cdist(predicted / scale, boxes / scale, p=1)
    p = probability[
        ..., None
    ]  # focal: what it costs to be taken for an object, less what it would cost to be taken for none
    focal = 0.75 * p**2 * (1 - p + 1e-12).log() - 0.25 * (1 - p) ** 2 * (p + 1e-12).log()
    return weights.objectness * focal + weights.l1 * far - weights.giou * giou, iou


def to_host(tensors: Sequence[Tensor]) -> list[Array]:
    """The tensors as arrays of float32, in one transfer."""
    flat = torch.cat([t.detach().float().flatten() for t in tensors]).cpu().numpy()
    ends = np.cumsum([t.numel() for t in tensors])[:-1]
    return [part.reshape(t.shape) for part, t in zip(np.split(flat, ends), tensors, strict=True)]


def to_device(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """The arrays as tensors, in one transfer."""
    joined = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(device, non_blocking=True)
    parts = joined.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def pair(cost: Array) -> NDArray[np.int64]:
    """The row that each column of a cost matrix (Q, T) is paired with, or NONE: (T,); all are if there are rows
    enough."""
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
        found[s, n, of_pseudo] = np.append(free, NONE)[pair(cost[s, n, free, of_pseudo])]
    picture, column = np.array(boxes.places, dtype=np.int64).reshape(-1, 2).T
    flat = found[:, picture, column]
    return np.where(flat == NONE, NONE, flat + picture * queries)


@dataclass(frozen=True, slots=True)
class Candidates:
    """What queries are chosen from: probability (N, M) of there being an object, boxes (N, M, 4) xyxy pixels; distinct
    (N, M) bool, those that take part in pairs.
    """

    probability: Tensor
    boxes: Tensor
    distinct: Tensor


def pair_candidates(cost: Array, distinct: Array, counts: Sequence[int]) -> NDArray[np.int64]:
    """The candidate of each object of a picture, or NONE: (N, H).

    Args:
        cost: (N, M, H). distinct: (N, M), zero for a candidate that takes no part. counts: objects of each picture.
    """
    found = np.full((cost.shape[0], cost.shape[2]), NONE, dtype=np.int64)
    for n, count in enumerate(counts):
        rows = distinct[n].nonzero()[0]
        found[n, :count] = np.append(rows, NONE)[pair(cost[n, rows, :count])]
    return found


STUDENT_IOU = 0.5  # a query is a student of its box from more IoU than this on


@dataclass(frozen=True, slots=True)
class Pairs:
    """on_host (S, G): the query of each box in 0..N Q - 1, or NONE; iou_on_host (S, G): the IoU of the two, anything
    without a query.

    query, found (S, G): the same on the device, any query where none is found. iou (S, N, Q, T): of all queries' boxes
    with all boxes of their picture; own_iou (S, G) that of the two.
    """

    on_host: NDArray[np.int64]
    iou_on_host: Array
    query: Tensor
    found: Tensor
    iou: Tensor
    own_iou: Tensor

    @classmethod
    def of(
        cls, on_host: NDArray[np.int64], query: Tensor, iou_on_host: Array, iou: Tensor, boxes: StepBoxes
    ) -> "Pairs":
        """`on_host` and `query`: (S, G), on the host and on the device. `iou_on_host` and `iou`: (S, N, Q, T),
        likewise.
        """
        column = np.array([column for _, column in boxes.places], dtype=np.int64)
        stages, width = len(on_host), iou.shape[3]
        own_on_host = np.take_along_axis(iou_on_host.reshape(stages, -1), on_host.clip(min=0) * width + column, axis=1)
        found, query = query != NONE, query.clamp(min=0)
        return cls(on_host, own_on_host, query, found, iou, iou.flatten(1).gather(1, query * width + boxes.column))

    def of_boxes(self, rows: Tensor) -> Tensor:
        """What the query of each box has: (S, N, Q, X) -> (S, G, X)."""
        return rows.flatten(1, 2).gather(1, self.query[..., None].expand(*self.query.shape, rows.shape[-1]))

    def to_queries(self, values: Tensor, nothing: float) -> Tensor:
        """What each query is given by its box: values (G,) or (S, G) -> (S, N, Q), `nothing` to a query without a
        box."""
        shape = self.iou.shape[:3]
        slots = shape[1] * shape[2]
        given = values.new_full((shape[0], slots + 1), nothing)
        slot = torch.where(self.found, self.query, slots)  # one past the last is nobody's
        return given.scatter(1, slot, values.expand_as(slot))[:, :slots].view(shape)

    def paired_queries(self, stage: int) -> Tensor:
        """The queries of a stage that have a box, in 0..N Q - 1, in order."""
        return to_device([np.sort(self.on_host[stage][self.on_host[stage] != NONE])], self.query.device)[0]

    def students(self, c: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The students of each stage: q (n, D) normalised and the box (n,) that each is of; in the order of the
        queries.

        Args:
            c: (S, N, Q, D) class features.
        """
        boxes = []
        for query, iou in zip(self.on_host, self.iou_on_host, strict=True):
            chosen = ((query != NONE) & (iou > STUDENT_IOU)).nonzero()[0]
            boxes.append(chosen[query[chosen].argsort()])
        return [(F.normalize(rows, dim=1), box) for rows, box in zip(*self._rows(c, boxes), strict=True)]

    def in_text_space(
        self, c: Tensor, distilled: Callable[[Tensor], Tensor], boxes: StepBoxes
    ) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
        """What `TextLevel` is told of each stage: of queries with a base box features, labels and IoUs, with a pseudo
        box features, texts and weights.

        Args:
            c: (S, N, Q, D) class features. distilled: makes of rows (n, D) the features (n, D); only the rows in
            question go through it.
        """
        texts = torch.cat([t.pseudo_texts for t in boxes.targets])
        of_text = (~boxes.is_base).cumsum(0) - 1  # the row of a pseudo box among the texts
        base_on_host = boxes.base_on_host
        found = [query != NONE for query in self.on_host]
        base_rows, base = self._rows(c, [(f & base_on_host).nonzero()[0] for f in found])
        pseudo_rows, pseudo = self._rows(c, [(f & ~base_on_host).nonzero()[0] for f in found])
        rows = [*base_rows, *pseudo_rows]
        moved = distilled(torch.cat(rows)).split([len(r) for r in rows])
        base_rows, pseudo_rows = list(moved[: len(found)]), list(moved[len(found) :])
        return (
            [
                (rows, boxes.labels[box], self.own_iou[s, box])
                for s, (rows, box) in enumerate(zip(base_rows, base, strict=True))
            ],
            [(rows, texts[of_text[box]], boxes.weights[box]) for rows, box in zip(pseudo_rows, pseudo, strict=True)],
        )

    def _rows(self, features: Tensor, boxes: Sequence[NDArray[np.int64]]) -> tuple[list[Tensor], list[Tensor]]:
        """At each stage, the features of the queries of some boxes; and those boxes, on the device."""
        chosen = to_device(boxes, self.query.device)
        return [features[s].flatten(0, 1)[self.query[s, box]] for s, box in enumerate(chosen)], chosen
