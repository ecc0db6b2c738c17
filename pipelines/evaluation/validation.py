"""Detections of a model on the validation images and their AP: built once, run as often as wanted, also between epochs
of training.

It talks to no other process: of several ranks, one runs it alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hdovd.core.errors import HdovdError, shorten
from hdovd.data.coco import DataPaths, Exif, Split
from hdovd.data.protocol import Protocol
from hdovd.evaluation.coco import AveragePrecision, GroundTruth
from hdovd.evaluation.engines import Engine, require
from hdovd.modeling.base import Detector
from hdovd.modeling.boxes import Detections, detect_batch
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.common.device import workers_for
from hdovd.pipelines.common.images import read_pixels
from hdovd.pipelines.common.precision import inference_autocast
from hdovd.pipelines.dataloading.loader import Batches


@dataclass(frozen=True, slots=True)
class Validated:
    """`combined` uses the base/novel split at test time (METHOD section 7), `split_blind` does not; the same object
    where there is one score alone. `detections`: of `combined`, one entry an image of the split, in its order, on the
    CPU.
    """

    detections: list[Detections]
    combined: AveragePrecision
    split_blind: AveragePrecision


class _Pictures(Dataset[Tensor]):
    """The pictures of a split, in an order of our own."""

    def __init__(self, split: Split, order: list[int]) -> None:
        self.split, self.order = split, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Tensor:
        return read_pixels(self.split, self.split.images[self.order[index]])


class Validation:
    """Holds the validation split and its ground truth, read once."""

    def __init__(
        self,
        data: DataPaths,
        protocol: Protocol,
        device: torch.device,
        *,
        exif: str = Exif.APPLY,
        batch_size: int = 16,
        workers: int | None = None,
        engine: Engine = Engine.PYCOCOTOOLS,
    ) -> None:
        """`workers` None: what suits the device. Raises HdovdError for bad data, pictures that are not there, and
        without the engine's package.
        """
        require(engine)  # before the files are read
        self.protocol, self.device, self.batch_size, self.workers = (
            protocol,
            device,
            batch_size,
            workers_for(device, workers),
        )
        self.split = data.load("val2017", protocol, base_only=False, exif=exif)
        if missing := [image.file_name for image in self.split.images if not self.split.path(image).is_file()]:
            raise HdovdError(
                f"{self.split.folder}: not there: {len(missing)} of {len(self.split.images)} validation pictures "
                f"({shorten(list(missing))})"
            )
        self.truth = GroundTruth(
            self.split.annotations, self.split.coco_ids, [image.id for image in self.split.images], protocol, engine
        )
        self._order = by_shape(self.split)

    def run(self, model: Detector, texts: Tensor) -> Validated:
        """Detect on all images and count AP, combined and split-blind.

        Leaves every module in the mode it was in, and torch's random state as it was: training goes on as if this had
        not been.

        Args:
            model: on the device given; not wrapped for several processes. texts: (C, D) embeddings of the protocol's
            classes.

        Raises HdovdError if a picture cannot be read: an AP without it would not be the protocol's.
        """
        if len(texts) != len(self.protocol.names):
            raise HdovdError(
                f"protocol {self.protocol.name} has {len(self.protocol.names)} classes, but there are {len(texts)} "
                f"class embeddings: give those of the protocol, base before novel"
            )
        devices = (
            [self.device] if self.device.type == "cuda" else []
        )  # whose generators are kept: a DataLoader draws its seed
        with _evaluating(model), torch.random.fork_rng(devices), inference_autocast(self.device, model.recipe):
            detections, blind = self._detect(model, texts.to(self.device))
        combined = self.truth.average_precision(results(self.split, detections))
        split_blind = combined if blind is None else self.truth.average_precision(results(self.split, blind))
        for ap in (combined, split_blind):
            ap.check_weighted_mean()
        return Validated(detections, combined, split_blind)

    def _detect(self, model: Detector, texts: Tensor) -> tuple[list[Detections], list[Detections] | None]:
        """Detections in the split's order, with both scores and split-blind; None for the latter if there is one score
        alone.
        """
        is_novel = torch.arange(len(self.protocol.names), device=self.device) >= len(self.protocol.base)
        batches = Batches(_Pictures(self.split, self._order), self.batch_size, self.workers, device=self.device)
        combined: list[Detections] = []
        blind: list[Detections] = []
        for pictures in progress(batches, "eval", "batch", len(batches)):
            predictions = model.predict([picture.to(self.device, non_blocking=True) for picture in pictures], texts)
            combined += detect_batch(predictions, is_novel, model.recipe.inference)
            if predictions[0].distillation_score is not None:
                blind += detect_batch(predictions, is_novel, model.recipe.inference, split_blind=True)
        return self._in_order(combined), self._in_order(blind) if blind else None

    def _in_order(self, detections: list[Detections]) -> list[Detections]:
        place = {image: k for k, image in enumerate(self._order)}
        return [detections[place[image]] for image in range(len(detections))]


def by_shape(split: Split) -> list[int]:
    """The places of a split's images, from wide to high: pictures of one shape make a batch with little padding to
    compute.
    """
    return sorted(range(len(split.images)), key=lambda i: split.images[i].height / split.images[i].width)


def results(split: Split, detections: list[Detections]) -> list[dict[str, Any]]:
    """COCO results form."""
    rows = []
    for image, found in zip(split.images, detections, strict=True):
        for (x0, y0, x1, y1), score, label in zip(
            found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
        ):
            rows.append(
                {
                    "image_id": image.id,
                    "category_id": split.coco_ids[label],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": score,
                }
            )
    return rows


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval(), and afterwards every module back in its own mode, which need not be the whole model's."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:  # parents first; torch.fx's modules change more than a flag
            module.train(mode)
