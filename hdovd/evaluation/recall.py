"""Average recall of class-agnostic boxes, as COCOeval counts it with useCats = 0.

D boxes of an image, best first; G objects in it; T IoU thresholds.
"""

from collections.abc import Sequence

import numpy as np

THRESHOLDS = tuple(float(t) for t in np.linspace(0.5, 0.95, 10))
NEVER = np.iinfo(np.int64).max


def found_at(boxes: np.ndarray, objects: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> np.ndarray:
    """Which box found each object: every box in turn takes the object, of those still free, that it overlaps most.

    Because a box does not depend on those after it, what the first k boxes find is what is found at a place below k.

    Args:
        boxes: (D, 4) xyxy, best first. objects: (G, 4) xyxy.

    Returns:
        (T, G) int64 places of boxes from 0, NEVER for an object that was not found.
    """
    overlaps = box_ious(boxes, objects)
    found = np.full((len(thresholds), len(objects)), NEVER)
    for row, threshold in enumerate(thresholds):
        for place in np.flatnonzero((overlaps >= threshold).any(axis=1)).tolist():
            free = np.where(found[row] == NEVER, overlaps[place], -1.0)
            best = len(free) - 1 - int(free[::-1].argmax())  # of equals the last, as COCOeval
            if free[best] >= min(threshold, 1 - 1e-10):
                found[row, best] = place
    return found


def recall(found: Sequence[np.ndarray], most: int) -> np.ndarray:
    """The share of objects that the `most` best boxes of their image find, at each threshold: (T,), NaN without
    objects.

    Args:
        found: (T, G) an image, of `found_at`.
    """
    places = np.concatenate(list(found), axis=1)
    return (places < most).mean(axis=1) if places.shape[1] else np.full(len(places), np.nan)


def box_ious(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """(D, 4), (G, 4) xyxy -> (D, G) float64."""
    a, b = one.astype(np.float64)[:, None], two.astype(np.float64)[None]
    overlap = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(axis=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(axis=-1) for boxes in (a, b)]
    return np.asarray(overlap / np.maximum(areas[0] + areas[1] - overlap, 1e-12))
