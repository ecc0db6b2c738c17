"""All numbers about what a run detects and what it gets wrong, from its folder and the validation annotations; no model is run.

Called by `hdovd report`, and from Python: `analyse(Path("run"), DataPaths(Path("COCO")))`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdovd.coco import DataPaths, Split
from hdovd.confusion import Confusion
from hdovd.curves import Curves
from hdovd.detection_matching import Found, Matching, Objects
from hdovd.error_breakdown import ErrorBreakdown, Errors
from hdovd.pipelines.image_verdicts import ImageVerdicts
from hdovd.pipelines.weights import Weights
from hdovd.protocol import Protocol
from hdovd.score_reliability import Reliability

CONFUSION_SCORE = 0.3  # detections that people would be shown; the same as in `pictures`


@dataclass(frozen=True, slots=True)
class RunAnalysis:
    """What `hdovd eval` found with one run's weights, taken apart.

    `metrics`: metrics.json, as it stands. `weights`: which of the run's. `split`: the validation images with their boxes; `split.path(image)`
    is a picture. `reliability`: by "novel", "base" and "all". `found`, `objects`, `matching`, `detection_errors`: the flat arrays
    that the rest was counted from; `objects` image by image in the split's order.
    """

    run: Path
    protocol: Protocol
    weights: Weights
    metrics: dict[str, Any]
    split: Split
    curves: Curves
    errors: ErrorBreakdown
    confusion: Confusion
    reliability: dict[str, Reliability]
    found: Found
    objects: Objects
    matching: Matching
    detection_errors: Errors

    def image(self, place: int) -> ImageVerdicts:
        """What became of the detections and objects of `split.images[place]`."""
        raise NotImplementedError

    def to_tree(self, images: Iterable[int] = ()) -> dict[str, Any]:
        """JSON values: "run", "protocol", "weights", "metrics", "curves", "errors", "confusion", "reliability", and "images", the verdicts on
        the images at these places of the split: all of them are hundreds of megabytes for COCO."""
        raise NotImplementedError


def analyse(run: Path, data: DataPaths, *, protocol: str | None = None, confusion_score: float = CONFUSION_SCORE, bins: int = 10,
            log: Callable[[str], None] = print) -> RunAnalysis:
    """Read a run's detections and take them apart. What is skipped in the annotations goes to `log`.

    Args:
        protocol: that the run was evaluated with, if it is not the run's own. confusion_score: detections below it are in no confusion.

    Raises HdovdError if the run was not evaluated, its detections are of other weights or other images, or they do not give the AP50 that
    metrics.json states.
    """
    raise NotImplementedError
