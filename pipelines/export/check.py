"""Whether an exported file finds what the model finds. Called by `export_model`, before the file gets its name.

A picture is as good as its detections, and a trained model may find none in made-up ones. So it is also asked for made-up classes,
which are the model's own features of some of its regions: what they name is there.

Boxes are compared at the scale that the network sees, in percent of the long side of its input: what float32 leaves open grows with
that. A ResNet-50 at 1,333 pixels is up to 0.006 pixels from itself where torch takes other kernels, 5e-4 percent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from hdovd.config.recipe import InferenceConfig, InputConfig
from hdovd.modeling.base import Detector
from hdovd.modeling.batching import input_size
from hdovd.modeling.export.base import ExportableDetector
from hdovd.modeling.postprocess import Detections, detect
from hdovd.pipelines.common.images import pixels_of
from hdovd.pipelines.export.forms import Run, traceable

_SIZES = ((150, 110), (96, 170))  # width, height: neither has the shape of what is traced
_LARGER = (1.75, 1.25)  # width and height of another one in short sides of the input: it is made smaller, as photos are
_MADE_UP_CLASSES = 7


@dataclass(frozen=True, slots=True)
class Checked:
    """`difference`: the largest of `detections` in `pictures`, of boxes in percent of the input's long side and of scores; inf if one is
    not finite."""

    pictures: int
    detections: int
    difference: float


def check(run: Run, model: Detector, texts: Tensor, is_novel: Tensor, pictures: Sequence[Tensor]) -> Checked:
    """Set a file's detections against those of `Detector.predict` and `detect`.

    Args:
        run: the file. model: that it was made of. pictures: (3, h, w) uint8 each.
        texts: (C, D) the run's classes. is_novel: (C,) bool.
    """
    config, detector, worst, count = model.recipe.inference, traceable(model), 0.0, 0
    with torch.inference_mode():
        for number, picture in enumerate(pictures):
            classes = _made_up_classes(detector, picture, texts)
            novel = torch.arange(len(classes)) % 2 == 1
            if number % 2 == 0:  # with the run's own, and without: the number of classes is the user's choice
                classes, novel = torch.cat([texts, classes]), torch.cat([is_novel, novel])
            expected = detect(model.predict([picture], classes)[0], novel, config)
            found = Detections(*run(picture, classes, novel))
            one, other = (in_percent(d, picture, model.recipe.input) for d in (expected, found))
            worst, count = max(worst, largest_difference(one, other, config)), count + len(expected.scores)
    return Checked(len(pictures), count, worst)


def in_percent(found: Detections, picture: Tensor, config: InputConfig) -> Detections:
    """Detections with boxes in percent of the long side of the detector's input in place of pixels of the picture (3, h, w)."""
    height, width = picture.shape[1:]
    high, wide = input_size(height, width, config.short_side, config.long_side)
    return replace(found, boxes=found.boxes * torch.tensor([wide / width, high / height] * 2) * 100 / config.long_side)


def _made_up_classes(detector: nn.Module, picture: Tensor, texts: Tensor) -> Tensor:
    """(n, D): features of some regions, where the detector tells them; else its classes in mixtures."""
    if isinstance(detector, ExportableDetector):
        features = detector.rois(picture)[1]
        return features[:: -(-max(len(features), 1) // _MADE_UP_CLASSES)]
    return texts + texts.roll(1, 0)


def largest_difference(one: Detections, other: Detections, config: InferenceConfig) -> float:
    """The largest difference of a coordinate or a score between detections and their nearest of the same class on the other side.

    One without such a partner counts by how far its score is above what the other side cut off: the threshold, or its last
    detection if it has as many as are allowed.
    """
    if not (one.boxes.isfinite().all() and other.boxes.isfinite().all() and other.scores.isfinite().all()):
        return math.inf
    return max(_from(one, other, config), _from(other, one, config))


def _from(one: Detections, other: Detections, config: InferenceConfig) -> float:
    if not len(one.scores):
        return 0.0
    full = len(other.scores) >= config.detections_per_image
    cut = other.scores.min().item() if full else config.score_threshold
    nearest = (one.scores - cut).clamp(min=0)
    if len(other.scores):
        rows, others = (torch.cat([d.boxes, d.scores[:, None]], dim=1) for d in (one, other))
        apart = (rows[:, None] - others).abs().amax(dim=2)
        nearest = torch.minimum(nearest, apart.where(one.labels[:, None] == other.labels, math.inf).amin(dim=1))
    return float(nearest.max())


def made_up_pictures(config: InputConfig) -> list[Tensor]:
    """(3, h, w) uint8: coloured shapes on noise, the same every time; small ones, and one that is larger than the input."""
    drawn, larger = [], tuple(round(part * config.short_side) for part in _LARGER)
    for seed, (width, height) in enumerate((*_SIZES, larger)):
        rng = np.random.default_rng(seed)
        picture = Image.fromarray(rng.integers(60, 196, (height // 6, width // 6, 3), np.uint8)).resize((width, height))
        draw = ImageDraw.Draw(picture)
        for number in range(9):
            x, y, side = rng.integers(0, width - 20), rng.integers(0, height - 20), rng.integers(15, min(width, height) // 2)
            box = [(int(x), int(y)), (int(x + side), int(y + side * rng.uniform(0.6, 1.4)))]
            (draw.ellipse if number % 2 else draw.rectangle)(box, fill=tuple(int(v) for v in rng.integers(0, 256, 3)), outline="black")
        drawn.append(pixels_of(picture))
    return drawn
