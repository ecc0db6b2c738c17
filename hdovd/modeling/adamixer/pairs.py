"""Which query is which box's, at every stage, and what follows from it: rows for the losses. Called by `model` and `stage_losses`.

Pairs are known on the host and on the device, so that no choice of rows waits for the device.
S stages, N pictures, Q queries, G boxes of the batch, T boxes of a picture, padded (`boxes_of_step`), D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hdovd.modeling.adamixer.boxes_of_step import StepBoxes
from hdovd.modeling.adamixer.matching import NONE, Array

STUDENT_IOU = 0.5  # a query is a student of its box from more IoU than this on


@dataclass(frozen=True, slots=True)
class Pairs:
    """on_host (S, G): the query of each box in 0..N Q - 1, or NONE; iou_on_host (S, G): the IoU of the two, anything without a query.

    query, found (S, G): the same on the device, any query where none is found. iou (S, N, Q, T): of all queries' boxes with all boxes
    of their picture; own_iou (S, G) that of the two.
    """

    on_host: NDArray[np.int64]
    iou_on_host: Array
    query: Tensor
    found: Tensor
    iou: Tensor
    own_iou: Tensor

    @classmethod
    def of(cls, on_host: NDArray[np.int64], query: Tensor, iou_on_host: Array, iou: Tensor, boxes: StepBoxes) -> Pairs:
        """`on_host` and `query`: (S, G), on the host and on the device. `iou_on_host` and `iou`: (S, N, Q, T), likewise."""
        column = np.array([column for _, column in boxes.places], dtype=np.int64)
        stages, width = len(on_host), iou.shape[3]
        own_on_host = np.take_along_axis(iou_on_host.reshape(stages, -1), on_host.clip(min=0) * width + column, axis=1)
        found, query = query != NONE, query.clamp(min=0)
        return cls(on_host, own_on_host, query, found, iou, iou.flatten(1).gather(1, query * width + boxes.column))

    def of_boxes(self, rows: Tensor) -> Tensor:
        """What the query of each box has: (S, N, Q, X) -> (S, G, X)."""
        return rows.flatten(1, 2).gather(1, self.query[..., None].expand(*self.query.shape, rows.shape[-1]))

    def to_queries(self, values: Tensor, nothing: float) -> Tensor:
        """What each query is given by its box: values (G,) or (S, G) -> (S, N, Q), `nothing` to a query without a box."""
        shape = self.iou.shape[:3]
        slots = shape[1] * shape[2]
        given = values.new_full((shape[0], slots + 1), nothing)
        slot = torch.where(self.found, self.query, slots)  # one past the last is nobody's
        return given.scatter(1, slot, values.expand_as(slot))[:, :slots].view(shape)

    def paired_queries(self, stage: int) -> Tensor:
        """The queries of a stage that have a box, in 0..N Q - 1, in order."""
        queries, = self._on_device([np.sort(self.on_host[stage][self.on_host[stage] != NONE])])
        return queries

    def students(self, c: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The students of each stage: q (n, D) normalised and the box (n,) that each is of; in the order of the queries.

        Args:
            c: (S, N, Q, D) class features.
        """
        boxes = []
        for query, iou in zip(self.on_host, self.iou_on_host, strict=True):
            chosen = ((query != NONE) & (iou > STUDENT_IOU)).nonzero()[0]
            boxes.append(chosen[query[chosen].argsort()])
        return [(F.normalize(rows, dim=1), box) for rows, box in zip(*self._rows(c, boxes), strict=True)]

    def in_text_space(self, c: Tensor, distilled: Callable[[Tensor], Tensor],
                      boxes: StepBoxes) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
        """What `TextLevel` is told of each stage: of queries with a base box features, labels and IoUs, with a pseudo box features, texts
        and weights.

        Args:
            c: (S, N, Q, D) class features. distilled: makes of rows (n, D) the features (n, D); only the rows in question go through it.
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
        return ([(rows, boxes.labels[box], self.own_iou[s, box]) for s, (rows, box) in enumerate(zip(base_rows, base, strict=True))],
                [(rows, texts[of_text[box]], boxes.weights[box]) for rows, box in zip(pseudo_rows, pseudo, strict=True)])

    def _rows(self, features: Tensor, boxes: Sequence[NDArray[np.int64]]) -> tuple[list[Tensor], list[Tensor]]:
        """At each stage, the features of the queries of some boxes; and those boxes, on the device."""
        chosen = self._on_device(boxes)
        return [features[s].flatten(0, 1)[self.query[s, box]] for s, box in enumerate(chosen)], chosen

    def _on_device(self, numbers: Sequence[NDArray[np.int64]]) -> list[Tensor]:
        joined = torch.from_numpy(np.concatenate(numbers)).to(self.query.device, non_blocking=True)
        return list(joined.split([len(part) for part in numbers]))
