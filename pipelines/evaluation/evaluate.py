"""Evaluation: detections of a run on validation images, their OV-COCO AP, and pictures of them.

Needs no cache: a run holds its class embeddings.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from hdovd.core.errors import HdovdError
from hdovd.data.coco import ImageBoxes, Split
from hdovd.data.protocol import Protocol, load_protocol
from hdovd.evaluation.coco import GROUPS, AveragePrecision
from hdovd.evaluation.engines import require
from hdovd.evaluation.tide import ERRORS, ErrorBreakdown, break_down
from hdovd.modeling.base import build_detector
from hdovd.modeling.boxes import Detections
from hdovd.pipelines.common.atomic_write import write_picture, write_text
from hdovd.pipelines.common.device import pick_device, placed
from hdovd.pipelines.common.drawing import BASE_COLOUR, NOVEL_COLOUR, Labelled, draw_boxes
from hdovd.pipelines.common.images import read_image
from hdovd.pipelines.common.precision import inference_precision
from hdovd.pipelines.evaluation.analysis import found_of
from hdovd.pipelines.evaluation.config import SHOWN_SCORE, EvalConfig
from hdovd.pipelines.evaluation.validation import Validation, results
from hdovd.pipelines.runs.folder import RunFolder, weights_hash


@dataclass(frozen=True, slots=True)
class EvalResult:
    """`combined` uses the base/novel split at test time (METHOD section 7), `split_blind` does not. `errors`: of
    `combined`.
    """

    protocol: Protocol
    combined: AveragePrecision
    split_blind: AveragePrecision
    errors: ErrorBreakdown
    images: int
    alpha: float
    beta: float
    files: list[Path]


def evaluate(job: EvalConfig) -> EvalResult:
    """Evaluate a run; writes metrics.json, detections.json and pictures into it. Raises HdovdError for bad input."""
    job.check()
    run, device = RunFolder(job.run, job.trust), pick_device(job.device)
    trained = run.protocol()
    protocol = trained if job.protocol is None else load_protocol(job.protocol)
    if (protocol.base, protocol.novel) != (trained.base, trained.novel):
        raise HdovdError(
            f"{job.run} was trained for the base and novel classes of protocol {trained.name}, not of {protocol.name}"
        )
    recipe, texts = run.recipe(), run.class_embeddings()
    validation = Validation(
        job.data,
        protocol,
        device,
        exif=recipe.input.exif,
        batch_size=job.batch_size,
        workers=job.workers,
        engine=job.engine,
    )
    model = build_detector(recipe, texts.shape[1], initialise=False)
    run.load_model(model, job.weights.file)
    found = validation.run(placed(model, device), texts)
    split, combined, blind = validation.split, found.combined, found.split_blind
    rows = results(split, found.detections)
    errors = break_down(found_of(rows, split.coco_ids), validation.truth.objects, protocol)
    alpha = beta = 0.0
    if combined is not blind:  # else there is one score, and nothing to combine
        alpha, beta = recipe.inference.alpha, recipe.inference.beta
    files = [run.path / "metrics.json", run.path / "detections.json"]
    metrics = {
        "protocol": protocol.name,
        **combined.summary(),
        "split_blind": blind.summary(),
        "per_class": combined.per_class(),
        "images": len(split.images),
        "alpha": alpha,
        "beta": beta,
        "classes_without_ground_truth": combined.without_ground_truth(),
        "cache": run.record()["cache"],
        "engine": {"name": job.engine.value, "version": require(job.engine)},
        "precision": inference_precision(device, recipe),
        "weights": job.weights.value,
        "weights_hash": weights_hash(run.path / job.weights.file),
        "errors": errors.to_tree(),
    }
    write_text(files[1], json.dumps(rows))
    write_text(files[0], json.dumps(metrics, indent=1))
    if job.pictures:
        files += draw_detections(split, found.detections, protocol, run.path / "pictures", job.pictures)
    return EvalResult(protocol, combined, blind, errors, len(split.images), alpha, beta, files)


def draw_detections(
    split: Split, detections: list[Detections], protocol: Protocol, folder: Path, count: int
) -> list[Path]:
    """Draw the first `count` images that hold a novel object, detections of `SHOWN_SCORE` or more beside the ground
    truth.

    Returns the PNG files written, `IMAGEID.png` each.
    """
    has_novel = [bool((image.labels >= len(protocol.base)).any()) for image in split.images]
    order = sorted(range(len(has_novel)), key=lambda i: not has_novel[i])[:count]
    files = []
    for i in order:
        image, found = split.images[i], detections[i]
        picture = read_image(split.path(image), image.width, image.height, exif=split.exif)
        shown = found.scores >= SHOWN_SCORE
        left = _draw_sheet(
            picture,
            found.boxes[shown],
            found.labels[shown].tolist(),
            found.scores[shown].tolist(),
            protocol,
            "detections",
        )
        truth = _draw_sheet(
            picture, torch.from_numpy(image.boxes), image.labels.tolist(), None, protocol, "ground truth"
        )
        sheet = Image.new("RGB", (left.width * 2 + 8, left.height), "white")
        sheet.paste(left, (0, 0))
        sheet.paste(truth, (left.width + 8, 0))
        files.append(folder / _name(image))
        write_picture(files[-1], sheet, "PNG")
    return files


def _name(image: ImageBoxes) -> str:
    return f"{image.id:012d}.png"


def _draw_sheet(
    picture: Image.Image,
    boxes: torch.Tensor,
    labels: list[int],
    scores: list[float] | None,
    protocol: Protocol,
    title: str,
) -> Image.Image:
    shown = []
    for k, (box, label) in enumerate(zip(boxes.tolist(), labels, strict=True)):
        novel = label >= len(protocol.base)
        text = protocol.names[label] + (f" {scores[k]:.2f}" if scores is not None else "") + (" novel" if novel else "")
        shown.append(Labelled(tuple(box), text, NOVEL_COLOUR if novel else BASE_COLOUR))
    return draw_boxes(picture, shown, title)


def result_table(result: EvalResult) -> str:
    """Novel, base and all of one evaluation, split-blind beside it."""
    protocol = result.protocol
    lines = [
        f"protocol {protocol.name}: {len(protocol.base)} base and {len(protocol.novel)} novel classes in one run, "
        f"{result.images} images, AP in percent",
        f"{'':34s}{'AP50':>22s}{'AP':>24s}",
        f"{'':34s}" + "".join(f"{g:>8s}" for g in GROUPS * 2),
    ]
    combined = (
        f"combined (a={result.alpha:g}, b={result.beta:g})"
        if result.alpha or result.beta
        else "classification score alone"
    )
    rows = {combined: result.combined, "split-blind (a=b=0)": result.split_blind}
    lines += [f"{name:34s}" + "".join(f"{_number(v):>8s}" for v in _values(ap)) for name, ap in rows.items()]
    absent = result.combined.without_ground_truth()
    if absent:
        lines.append(f"{len(absent)} classes without ground truth are left out of the means: {', '.join(absent)}")
    elif protocol.novel:
        base, novel = len(protocol.base), len(protocol.novel)
        lines.append(f"checked: all = ({base}*base + {novel}*novel)/{base + novel}")
    return "\n".join(lines)


def class_table(result: EvalResult) -> str:
    """AP of every class."""
    lines = [f"{'class':24s}{'':8s}{'AP50':>8s}{'AP':>8s}"]
    for label, (name, ap) in enumerate(result.combined.per_class().items()):
        kind = "novel" if label >= len(result.protocol.base) else "base"
        lines.append(f"{name:24s}{kind:8s}{_number(ap['ap50']):>8s}{_number(ap['ap']):>8s}")
    return "\n".join(lines)


def error_table(errors: ErrorBreakdown) -> str:
    """How many errors of each kind the groups have, and the AP50 that mending them would gain."""
    parts = [errors.groups[group] for group in GROUPS]
    rows: list[tuple[str, list[tuple[int, float | None]]]] = [
        *((kind.value, [(part.counts[kind], part.gains[kind]) for part in parts]) for kind in ERRORS),
        ("all wrong detections", [(part.false_positives, part.false_positive_gain) for part in parts]),
        ("all objects not found", [(part.false_negatives, part.false_negative_gain) for part in parts]),
    ]
    lines = [
        "errors at IoU 0.5: how many, and the AP50 gained if that kind alone were mended",
        f"{'':24s}" + "".join(f"{group:>20s}" for group in GROUPS),
        f"{'':24s}" + f"{'count':>11s}{'dAP50':>9s}" * len(GROUPS),
    ]
    lines += [
        f"{name:24s}" + "".join(f"{count:>11,d}{_signed(gain):>9s}" for count, gain in cells) for name, cells in rows
    ]
    shares = [f"{part.found:,d} of {part.objects:,d}" for part in parts]
    lines.append(f"{'objects found':24s}" + "".join(f"{share:>20s}" for share in shares))
    lines.append(f"{'classification errors':24s}" + "".join(f"{f'named {named}':>20s}" for named in ("novel", "base")))
    lines += [
        f"{f'  of {truth} objects':24s}"
        + "".join(f"{errors.misnamed[truth][named]:>20,d}" for named in ("novel", "base"))
        for truth in ("novel", "base")
    ]
    return "\n".join(lines)


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}"


def _values(ap: AveragePrecision) -> list[float | None]:
    summary = ap.summary()
    return [summary[kind][group] for kind in ("ap50", "ap") for group in GROUPS]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
