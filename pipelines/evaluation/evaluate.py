"""Evaluation: detections of a run on validation images, their OV-COCO AP, and pictures of them.

Needs no cache: a run holds its class embeddings. `Validation` is built once and run as often as wanted, also between
epochs of training; it talks to no other process: of several ranks, one runs it alone.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from hdovd.core import HdovdError, log, shorten
from hdovd.data import DataPaths, Exif, Protocol, Split, group_of, load_protocol, shown_groups
from hdovd.evaluation import Engine, require
from hdovd.evaluation.coco import AveragePrecision, GroundTruth, found_of
from hdovd.evaluation.tide import ERRORS, ErrorBreakdown, break_down
from hdovd.modeling.base import Detector, build_detector
from hdovd.modeling.boxes import Detections, detect_batch
from hdovd.pipelines.common.atomic_write import write_picture, write_text
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.common.device import inference_autocast, inference_precision, pick_device, placed, workers_for
from hdovd.pipelines.common.drawing import BASE_COLOUR, NOVEL_COLOUR, Labelled, draw_boxes
from hdovd.pipelines.common.images import read_image, read_pixels
from hdovd.pipelines.dataloading.loader import Batches
from hdovd.pipelines.evaluation.config import SHOWN_SCORE, EvalConfig
from hdovd.pipelines.runs import UPPER_BOUND, RunFolder, Weights, ap as ap_text, tracking, weights_hash

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Validated:
    """`combined` uses the base/novel split at test time (METHOD section 7), `split_blind` does not; the same object
    where there is one score alone. `detections`: of `combined`, one entry an image of the split, in its order, on the
    CPU.
    """

    detections: list[Detections]
    combined: AveragePrecision
    split_blind: AveragePrecision


class Mapped(Dataset[T]):
    """What `read` makes of each item."""

    def __init__(self, items: Sequence[Any], read: Callable[[Any], T]) -> None:
        self.items, self.read = items, read

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> T:
        return self.read(self.items[index])


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
        engine: str = Engine.PYCOCOTOOLS,
    ) -> None:
        """`workers` None: what suits the device. Raises HdovdError for bad data, pictures that are not there, and
        without the engine's package.
        """
        require(engine)  # before the files are read
        self.protocol, self.device = protocol, device
        self.batch_size, self.workers = batch_size, workers_for(device, workers)
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
        detections, blind = self.detect(model, texts.to(self.device))
        combined = self.truth.average_precision(results(self.split, detections))
        split_blind = combined if blind is None else self.truth.average_precision(results(self.split, blind))
        return Validated(detections, combined, split_blind)

    def detect(self, model: Detector, texts: Tensor) -> tuple[list[Detections], list[Detections] | None]:
        """Detections in the split's order, with both scores and split-blind; None for the latter if there is one score
        alone. As `run`, with texts on the device.
        """
        devices = (
            [self.device] if self.device.type == "cuda" else []
        )  # whose generators are kept: a DataLoader draws its seed
        is_novel = torch.arange(len(self.protocol.names), device=self.device) >= len(self.protocol.base)
        ordered = Mapped([self.split.images[k] for k in self._order], partial(read_pixels, self.split))
        batches = Batches(ordered, self.batch_size, self.workers, device=self.device)
        combined, blind = list[Detections](), list[Detections]()
        with _evaluating(model), torch.random.fork_rng(devices), inference_autocast(self.device, model.recipe):
            for pictures in progress(batches, "eval", "batch", len(batches)):
                predictions = model.predict([picture.to(self.device, non_blocking=True) for picture in pictures], texts)
                combined += detect_batch(predictions, is_novel, model.recipe.inference)
                if predictions[0].distillation_score is not None:
                    blind += detect_batch(predictions, is_novel, model.recipe.inference, split_blind=True)
        place = sorted(range(len(self._order)), key=self._order.__getitem__)
        return [combined[k] for k in place], [blind[k] for k in place] if blind else None


def by_shape(split: Split) -> list[int]:
    """The places of a split's images, from wide to high: pictures of one shape make a batch with little padding to
    compute.
    """
    return sorted(range(len(split.images)), key=lambda i: split.images[i].height / split.images[i].width)


def results(split: Split, detections: list[Detections]) -> list[dict[str, Any]]:
    """COCO results form."""
    return [
        {"image_id": image.id, "category_id": split.coco_ids[label], "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for image, found in zip(split.images, detections, strict=True)
        for (x0, y0, x1, y1), score, label in zip(
            found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
        )
    ]


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


@dataclass(frozen=True, slots=True)
class EvalResult(Validated):
    """`errors`: of `combined`. `alpha`, `beta`: 0 where there is one score, and nothing to combine."""

    errors: ErrorBreakdown
    alpha: float
    beta: float
    files: list[Path]


def load_detector(run: RunFolder, dim: int, device: torch.device, file: str = Weights.LAST.file) -> Detector:
    """The detector of a run for embeddings of `dim` numbers, on a device, with the weights in a file of the run's.
    Raises HdovdError as `RunFolder.load_model`.
    """
    model = build_detector(run.recipe(), dim, initialise=False)
    run.load_model(model, file)
    return placed(model, device)


def evaluate(job: EvalConfig) -> EvalResult:
    """Evaluate a run; writes metrics.json, detections.json and pictures into it. Raises HdovdError for bad input."""
    job.check()
    run = RunFolder(job.run, job.trust)
    trained = run.protocol()
    protocol = trained if job.protocol is None else load_protocol(job.protocol)
    if (protocol.base, protocol.novel) != (trained.base, trained.novel):
        raise HdovdError(
            f"{job.run} was trained for the base and novel classes of protocol {trained.name}, not of {protocol.name}"
        )
    result = evaluate_by(job, protocol, run.class_embeddings(), run.path)
    if job.track:
        step = max((entry["step"] for entry in run.entries()), default=0)
        ap = {f"eval_{group}": value for group, value in result.combined.summary()[protocol.metric].items()}
        with tracking(run, job.track) as tracked:
            for name in tracked.trackers:
                tracked.send({"step": step, **ap}, name)
    return result


def evaluate_by(job: EvalConfig, protocol: Protocol, texts: Tensor, out: Path) -> EvalResult:
    """Evaluate a run by a protocol whose classes have the text embeddings `texts` (K, D); files go to `out`."""
    run, device = RunFolder(job.run, job.trust), pick_device(job.device)
    recipe = run.recipe()
    validation = Validation(
        job.data,
        protocol,
        device,
        exif=recipe.input.exif,
        batch_size=job.batch_size,
        workers=job.workers,
        engine=job.engine,
    )
    found = validation.run(load_detector(run, texts.shape[1], device, job.weights.file), texts)
    split, combined, blind = validation.split, found.combined, found.split_blind
    rows = results(split, found.detections)
    errors = break_down(found_of(rows, split.coco_ids), validation.truth.objects, protocol)
    alpha, beta = (0.0, 0.0) if combined is blind else (recipe.inference.alpha, recipe.inference.beta)
    files = [out / "metrics.json", out / "detections.json"]
    metrics = {
        "protocol": protocol.name,
        "oracle": run.saw_novel,
        **combined.summary(),
        "split_blind": blind.summary(),
        "per_class": combined.per_class(),
        "images": len(split.images),
        "alpha": alpha,
        "beta": beta,
        "classes_without_ground_truth": combined.without_ground_truth(),
        "cache": run.record()["cache"],
        "engine": {"name": str(job.engine), "version": require(job.engine)},
        "precision": inference_precision(device, recipe),
        "weights": job.weights.value,
        "weights_hash": weights_hash(run.path / job.weights.file),
        "errors": errors.to_tree(),
    }
    write_text(files[1], json.dumps(rows))
    write_text(files[0], json.dumps(metrics, indent=1))
    if run.saw_novel and protocol.base:
        log(f"oracle: boxes of novel classes were trained on; this AP is {UPPER_BOUND}")
    if job.pictures:
        files += draw_detections(split, found.detections, protocol, out / "pictures", job.pictures)
    return EvalResult(found.detections, combined, blind, errors, alpha, beta, files)


def draw_detections(
    split: Split, detections: list[Detections], protocol: Protocol, folder: Path, count: int
) -> list[Path]:
    """Draw the first `count` images that hold a novel object, detections of `SHOWN_SCORE` or more beside the ground
    truth.

    Returns the PNG files written, `IMAGEID.png` each.
    """
    has_novel = [any(group_of(label, protocol) == "novel" for label in i.labels.tolist()) for i in split.images]
    files = []
    for i in sorted(range(len(has_novel)), key=lambda i: not has_novel[i])[:count]:
        image, found = split.images[i], detections[i]
        picture = read_image(split.path(image), image.width, image.height, exif=split.exif)
        shown = [
            _labelled(box, label, f" {score:.2f}", protocol)
            for box, label, score in zip(
                found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True
            )
            if score >= SHOWN_SCORE
        ]
        truth = [_labelled(*one, "", protocol) for one in zip(image.boxes.tolist(), image.labels.tolist(), strict=True)]
        left, right = draw_boxes(picture, shown, "detections"), draw_boxes(picture, truth, "ground truth")
        sheet = Image.new("RGB", (left.width * 2 + 8, left.height), "white")
        sheet.paste(left, (0, 0))
        sheet.paste(right, (left.width + 8, 0))
        files.append(folder / f"{image.id:012d}.png")
        write_picture(files[-1], sheet, "PNG")
    return files


def _labelled(box: tuple[float, float, float, float], label: int, score: str, protocol: Protocol) -> Labelled:
    novel = group_of(label, protocol) == "novel"
    text = f"{protocol.names[label]}{score}{' novel' if novel else ''}"
    return Labelled(box, text, NOVEL_COLOUR if novel else BASE_COLOUR)


def result_table(result: EvalResult) -> str:
    """Novel, base and all of one evaluation, split-blind beside it."""
    protocol = result.combined.protocol
    groups = shown_groups(protocol)
    wide = max(8, *(len(group) + 2 for group in groups))
    combined = (
        f"combined (a={result.alpha:g}, b={result.beta:g})"
        if result.alpha or result.beta
        else "classification score alone"
    )
    rows = {combined: result.combined.summary(), "split-blind (a=b=0)": result.split_blind.summary()}
    lines = [
        f"protocol {protocol.name}: {len(protocol.base)} base and {len(protocol.novel)} novel classes in one run, "
        f"{len(result.detections)} images, AP in percent",
        f"{'':34s}{'AP50':>{wide * len(groups) - 2}s}{'AP':>{wide * len(groups)}s}",
        f"{'':34s}" + "".join(f"{g:>{wide}s}" for g in groups * 2),
        *(
            f"{name:34s}" + "".join(f"{ap_text(ap[kind][g]):>{wide}s}" for kind in ("ap50", "ap") for g in groups)
            for name, ap in rows.items()
        ),
    ]
    if absent := result.combined.without_ground_truth():
        lines.append(f"{len(absent)} classes without ground truth are left out of the means: {shorten(list(absent))}")
    return "\n".join(lines)


def class_table(result: EvalResult) -> str:
    """AP of every class."""
    rows = (
        f"{name:24s}{group_of(label, result.combined.protocol):8s}{ap_text(ap['ap50']):>8s}{ap_text(ap['ap']):>8s}"
        for label, (name, ap) in enumerate(result.combined.per_class().items())
    )
    return "\n".join([f"{'class':24s}{'':8s}{'AP50':>8s}{'AP':>8s}", *rows])


def error_table(errors: ErrorBreakdown) -> str:
    """How many errors of each kind the groups have, and the AP50 that mending them would gain."""
    groups, sides = shown_groups(errors.protocol), ("novel", "base")
    parts = [errors.groups[group] for group in groups]
    kinds = [*(kind.value for kind in ERRORS), "all wrong detections", "all objects not found"]
    return "\n".join(
        [
            "errors at IoU 0.5: how many, and the AP50 gained if that kind alone were mended",
            f"{'':24s}" + "".join(f"{group:>20s}" for group in groups),
            f"{'':24s}" + f"{'count':>11s}{'dAP50':>9s}" * len(groups),
            *(
                f"{name:24s}"
                + "".join(f"{count:>11,d}{'-' if gain is None else f'{gain:+.1f}':>9s}" for count, gain in cells)
                for name, *cells in zip(kinds, *(part.cells() for part in parts), strict=True)
            ),
            f"{'objects found':24s}"
            + "".join(f"{share:>20s}" for share in [f"{part.found:,d} of {part.objects:,d}" for part in parts]),
            f"{'classification errors':24s}" + "".join(f"{f'named {named}':>20s}" for named in sides),
            *(
                f"{f'  of {truth} objects':24s}" + "".join(f"{errors.misnamed[truth][named]:>20,d}" for named in sides)
                for truth in sides
            ),
        ]
    )
