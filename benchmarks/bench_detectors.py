"""Time of each detector for a picture, through onnxruntime on the CPU, and for a training step; torchvision's beside
them.

    python benchmarks/run.py bench_detectors [--side 640] [--threads 1 2] [--rounds 5]
    python benchmarks/run.py bench_detectors --no-exports --train-side 640 --train-rounds 3

Weights are random: for speed alone. A round measures every detector once, one after the other; ratios are medians over
rounds of the same run, so that what else the machine does counts for all alike. Pictures are square, of the size of
the detector's input, so that nothing is resized. The score threshold is torchvision's, 0.05, for all, since an NMS
takes the longer the more is over it. Needs pip install 'hdovd[export]'.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from arguments import parsed, workplace
from bench_train import calm
from torch.nn.functional import normalize
from torchvision.models import detection

from hdovd.config.recipe import Recipe, load_recipe
from hdovd.data.targets import Targets
from hdovd.modeling.base import Detector, build_detector
from hdovd.modeling.queries.detector import QueryDetector
from hdovd.pipelines.export.config import ModelForm
from hdovd.pipelines.export.model import require, write

OURS = ("ov-coco-rtdetr-r18", "ov-coco-rtdetr-r50", "ov-coco-faster-rcnn-r50", "ov-coco-adamixer-r50")
THEIRS = ("fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn")  # torchvision's
EXPORTED, STEPPED = OURS[2], OURS[3]  # what the others are compared with
OPSET = 17
DIM, CLASSES, BASE = 512, 65, 48
OBJECTS, PSEUDO = 7, 10  # boxes of a picture


@dataclass(frozen=True)
class DetectorBench:
    """Sides in pixels. `exports` and `steps`: which of the two tables to make."""

    side: int = 640
    threads: tuple[int, ...] = (1, 2)
    rounds: int = 5
    train_side: int = 640
    train_rounds: int = 3
    exports: bool = True
    steps: bool = True


def bench_detectors(folder: Path, bench: DetectorBench) -> dict[str, dict[str, list[float]]]:
    """Measure and print; returns seconds, an entry a round, by table and detector. Raises HdovdError, before that,
    without onnxruntime.
    """
    tables = {}
    if bench.exports:
        require(ModelForm.ONNX)
        files = {name: _exported(name, folder / f"{name}.onnx", bench.side) for name in (*OURS, *THEIRS)}
        for threads in bench.threads:
            title = f"onnxruntime, CPU, {threads} threads, a picture of {bench.side} x {bench.side}"
            calls = {name: _picture(file, bench.side, threads) for name, file in files.items()}
            tables[title] = _measured(title, calls, EXPORTED, bench.rounds)
    if bench.steps:
        title = (
            f"torch, CPU, fp32, {torch.get_num_threads()} threads, forward and backward of a training step of one "
            f"picture of {bench.train_side} x {bench.train_side}"
        )
        steps = {name: _training_step(name, bench.train_side) for name in OURS}
        tables[title] = _measured(title, steps, STEPPED, bench.train_rounds)
    return tables


def _measured(
    title: str, calls: Mapping[str, Callable[[], object]], baseline: str, rounds: int
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            since = time.perf_counter()
            call()
            if number:  # the first round warms up
                found[name].append(time.perf_counter() - since)
    print(f"\n{title}; medians of {rounds} rounds, random weights\n{'':36s}{'ms':>10s} of {baseline}", flush=True)
    for name, seconds in found.items():
        ratio = median(a / b for a, b in zip(seconds, found[baseline], strict=True))
        print(f"{name:36s}{median(seconds) * 1e3:10.1f}{ratio:8.3f}", flush=True)
    return found


def _recipe(name: str, side: int) -> Recipe:
    settings = [f"input.short_side={side}", f"input.long_side={side}", "input.train_short_sides=[]"]
    settings.append("inference.score_threshold=0.05")
    return load_recipe(name, settings).with_reliability(0.0, 1.0, 1.0)  # no matter of time


def _detector(name: str, side: int) -> Detector:
    torch.manual_seed(0)
    model = build_detector(_recipe(name, side), DIM, initialise=False)
    calm(model)
    if isinstance(model, QueryDetector):
        model.set_object_text(_unit())
    return model


def _unit(*count: int) -> torch.Tensor:
    return normalize(torch.randn(*count, DIM), dim=-1)


def _pixels(side: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, side, side), np.uint8))


def _exported(name: str, file: Path, side: int) -> Path:
    image = _pixels(side)
    if name in OURS:
        example = image, _unit(CLASSES), torch.arange(CLASSES) >= BASE
        write(ModelForm.ONNX, _detector(name, side), example, {"about": "a benchmark's"}, file)
    else:
        model = getattr(detection, name)(weights=None, weights_backbone=None, min_size=side, max_size=side).eval()
        calm(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a size could be taken for a constant: the picture has this one
            torch.onnx.export(model, ([image / 255],), str(file), opset_version=OPSET, dynamo=False)
    return file


def _picture(file: Path, side: int, threads: int) -> Callable[[], Any]:
    """One call of a file with what its inputs ask for."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # Threads of the detector before would else go on waiting busily, on the cores of the next one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    image, own = _pixels(side).numpy(), {"texts": _unit(CLASSES).numpy(), "is_novel": np.arange(CLASSES) >= BASE}
    names = [given.name for given in session.get_inputs()]
    given = {"image": image} | own if "texts" in names else {names[0]: (image / 255).astype(np.float32)}
    return lambda: session.run(None, given)


def _training_step(name: str, side: int) -> Callable[[], None]:
    recipe, model = _recipe(name, side), _detector(name, side).train()
    model.begin_epoch(recipe.pseudo_boxes.from_epoch)  # with all losses
    boxes = torch.rand(OBJECTS + PSEUDO, 4) * torch.tensor([0.5, 0.5, 0.4, 0.4]) + torch.tensor([0.0, 0.0, 0.1, 0.1])
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1) * side
    pseudo = boxes[OBJECTS:], _unit(PSEUDO), _unit(PSEUDO)
    targets = Targets(boxes[:OBJECTS], torch.arange(OBJECTS), _unit(OBJECTS), *pseudo, _unit())
    image, texts = _pixels(side), _unit(BASE)

    def step() -> None:
        model.zero_grad()
        sum(model([image], [targets], texts, [0]).values()).backward()

    return step


if __name__ == "__main__":
    with workplace() as place:
        bench_detectors(place, parsed(DetectorBench, __doc__))
