"""What distillation from the cache adds to a step of the detector, beside no distillation, CLIP in every step, and
torchvision's detector.

    python benchmarks/run.py bench_train --clip CLIP --picture 160 120 --images 64 --rounds 10
    python benchmarks/run.py bench_train --clip CLIP --recipe ov-coco-faster-rcnn-r50 --settings train.batch_size=4
    input.short_side=320 \\
                                     input.long_side=533 --images 16 --rounds 2 --steps 3 --no-online

    python benchmarks/run.py bench_train --classes 866 --no-online

All variants train in one process, in turns, on the same pictures and boxes; ratios are of one run. Weights are random:
for speed alone. torchvision's fasterrcnn_resnet50_fpn is measured with recipes of a resnet50.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from arguments import parsed, workplace
from online_clip import OnlineClip
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.resnet import resnet50
from torchvision.ops import FrozenBatchNorm2d

from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import PRESETS, Recipe, load_recipe
from hdovd.data import DataPaths, load_protocol
from hdovd.modeling.base import build_detector
from hdovd.pipelines.common.device import placed, training_workers
from hdovd.pipelines.dataloading.loader import Dealing, TrainingBatches
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.extraction.forecast import make_world
from hdovd.pipelines.teachers.openclip import ClipTeacher, load_clip
from hdovd.pipelines.training.loop import Loop
from hdovd.pipelines.training.train import loop_of
from hdovd.pipelines.training.training_set import Sample, TrainingSet

SETTLE = 3  # steps at the beginning of a turn that are not timed: what was loaded ahead meanwhile is used up
NOUNS = 200
JUDGED = 10
STUB_S = 0.03  # a step of a GPU


@dataclass(frozen=True)
class TrainBench:
    """`steps`: timed, of a turn. `settings`: laid over the recipe. `clip`: a model name has random weights. `picture`:
    width, height. `classes`: also so many base classes instead of ov-coco's 48, federated as LVIS's 866 are; 0: not.
    """

    recipe: str = "demo"
    settings: tuple[str, ...] = ()
    clip: str = "ViT-B-32"
    device: str = "auto"
    images: int = 96
    picture: tuple[int, ...] = (640, 480)
    rounds: int = 3
    steps: int = 5
    online: bool = True
    classes: int = 0


@dataclass(frozen=True, slots=True)
class _OverAndOver:
    """One long epoch of the same images in the same order: at its start nothing is loaded ahead, and a real one is
    long.
    """

    images: int
    count: int

    def __call__(self, epoch: int) -> np.ndarray:
        return np.arange(self.count) % self.images


@dataclass(slots=True)
class Variant:
    """One way to train. `step`: of the loop whose batches are `batches`. `seconds`: of steps, `waited`: for their
    data."""

    name: str
    batches: TrainingBatches[Sample]
    step: Callable[[list[Sample]], None]
    seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    _running: Iterator[list[Sample]] | None = None

    def take(self) -> None:
        """One step, timed with the wait for its batch."""
        if self._running is None:
            self._running = iter(self.batches)
        since = time.perf_counter()
        batch = next(self._running)
        loaded = time.perf_counter()
        self.step(batch)
        self.seconds.append(time.perf_counter() - since)
        self.waited.append(loaded - since)


def bench_train(folder: Path, bench: TrainBench) -> list[Variant]:
    """Make pictures, boxes and a cache in `folder`, measure, and print."""
    clip = load_clip(bench.clip, None, device=bench.device, random_weights=":" not in bench.clip)
    recipe = load_recipe(bench.recipe, bench.settings).with_reliability(
        0.0, 1.0, 1.0
    )  # no matter of time; auto knows no random CLIP
    width, height = bench.picture
    print(f"making {bench.images} pictures of {width}x{height} and their cache")
    make_world(folder, bench.images, base_boxes=7, proposals=10, size=(width, height))
    (folder / "nouns.txt").write_text("\n".join(f"thing {number}" for number in range(NOUNS)))
    extract_clip(
        ExtractConfig(
            data=_paths(folder),
            cache=folder / "cache",
            clip=bench.clip,
            proposals=folder / "proposals.json",
            vocabulary=folder / "nouns.txt",
            device=bench.device,
        ),
        clip,
    )
    variants = _variants(folder, bench, recipe, clip)
    for _ in range(bench.rounds):
        for variant in variants:
            for step in range(SETTLE + bench.steps):
                variant.take()
                if step < SETTLE:
                    del variant.seconds[-1], variant.waited[-1]
    device = (
        torch.cuda.get_device_name(clip.device)
        if clip.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{device}, {' '.join((bench.recipe, *bench.settings))}, {recipe.train.batch_size} images a step, "
        f"{training_workers(clip.device, recipe.train.workers)} workers; medians, random weights"
    )
    for one in variants:
        # of steps of the same number: each pair lies near in time
        ratio = median(a / b for a, b in zip(one.seconds, variants[0].seconds, strict=True))
        print(
            f"  {one.name:40s} {median(one.seconds) * 1e3:9.1f} ms a step   {ratio:6.3f} of the detector alone   "
            f"{sum(one.waited) / sum(one.seconds):6.2%} waiting for data"
        )
    return variants


def _paths(folder: Path) -> DataPaths:
    return DataPaths(images=folder / "images", annotations=folder / "annotations.json")


def _variants(folder: Path, bench: TrainBench, recipe: Recipe, clip: ClipTeacher) -> list[Variant]:
    base_only = load_recipe(bench.recipe, [*bench.settings, *PRESETS["base-only"]])
    alone, distilled = _loop(folder, bench, base_only, clip), _loop(folder, bench, recipe, clip)
    found = [_of_loop("detector alone", alone), _of_loop("three levels, from the cache", distilled)]
    if bench.online:
        loop = _loop(folder, bench, recipe, clip)
        online = OnlineClip(clip, recipe)
        found.append(
            Variant(
                "three levels, CLIP in every step",
                loop.batches,
                lambda batch: _take(loop, [online.replace(sample) for sample in batch]),
            )
        )
    if recipe.detector.name == "faster_rcnn" and recipe.detector.backbone.name == "resnet50":
        found.append(_torchvision(folder, bench, recipe, clip))
    if bench.classes:
        found.append(_of_many_classes(folder, bench, clip))
    stub = _loop(folder, bench, recipe, clip)
    found.append(
        Variant(f"the cache, a step that sleeps {STUB_S * 1e3:.0f} ms", stub.batches, lambda _: time.sleep(STUB_S))
    )
    return found


def _of_many_classes(folder: Path, bench: TrainBench, clip: ClipTeacher) -> Variant:
    """Three levels with random text embeddings of many base classes, of which an image is judged by its own, which are
    the first, and by JUDGED others.
    """
    recipe = load_recipe(bench.recipe, [*bench.settings, "loss.class.federated=true"]).with_reliability(0.0, 1.0, 1.0)
    texts = normalize(torch.randn(bench.classes, clip.dim), dim=1).to(clip.device)
    loop = _loop(folder, bench, recipe, clip, texts)

    def federated(sample: Sample) -> Sample:
        picture, targets, image_id = sample
        judged = torch.zeros(bench.classes, dtype=torch.bool)
        judged[torch.cat([targets.labels, torch.randint(bench.classes, (JUDGED,))])] = True
        return picture, replace(targets, judged=judged), image_id

    name = f"three levels, {bench.classes} classes, federated"
    return Variant(name, loop.batches, lambda batch: _take(loop, [federated(sample) for sample in batch]))


def _of_loop(name: str, loop: Loop[Sample]) -> Variant:
    return Variant(name, loop.batches, lambda batch: _take(loop, batch))


def _take(loop: Loop[Sample], batch: list[Sample]) -> None:
    loop.take_step(batch, 0)
    loop.window.rows.clear()
    if loop.device.type == "cuda":
        torch.cuda.synchronize(loop.device)


def _batches(folder: Path, bench: TrainBench, recipe: Recipe, device: torch.device) -> TrainingBatches[Sample]:
    """All variants see the same pictures at the same step."""
    split = _paths(folder).load("train2017", load_protocol("ov-coco"), base_only=True)
    data, size = TrainingSet(split, FeatureCache(folder / "cache"), recipe), recipe.train.batch_size
    order = _OverAndOver(len(data), size * bench.rounds * (SETTLE + bench.steps))
    return TrainingBatches(
        data,
        Dealing(order, size, accumulate=recipe.train.accumulate),
        training_workers(device, recipe.train.workers),
        device=device,
    )


def _loop(
    folder: Path, bench: TrainBench, recipe: Recipe, clip: ClipTeacher, texts: Tensor | None = None
) -> Loop[Sample]:
    torch.manual_seed(0)
    protocol, batches = load_protocol("ov-coco"), _batches(folder, bench, recipe, clip.device)
    model = build_detector(recipe, clip.dim, initialise=False)
    model.begin_epoch(recipe.pseudo_boxes.from_epoch)  # with all losses
    calm(model)
    if texts is None:
        texts = torch.from_numpy(FeatureCache(folder / "cache").class_embeddings(protocol.base)).to(clip.device)
    model = placed(model, clip.device).train()
    return loop_of(model, batches, texts, recipe, clip.device)


def _torchvision(folder: Path, bench: TrainBench, recipe: Recipe, clip: ClipTeacher) -> Variant:
    """torchvision's own detector with as many trained stages, samples and proposals, on the same pictures and base
    boxes.
    """
    detector, size = recipe.faster_rcnn, recipe.input
    body = resnet50(
        weights=None, norm_layer=FrozenBatchNorm2d if detector.backbone.norm == "frozen" else nn.BatchNorm2d
    )
    backbone = _resnet_fpn_extractor(body, 5 - detector.backbone.frozen_stages)
    model = TorchvisionFasterRCNN(
        backbone,
        len(load_protocol("ov-coco").base) + 1,
        min_size=size.short_side,
        max_size=size.long_side,
        rpn_pre_nms_top_n_train=detector.rpn.pre_nms,
        rpn_post_nms_top_n_train=detector.rpn.post_nms,
        rpn_batch_size_per_image=detector.rpn.samples,
        box_batch_size_per_image=detector.head.samples,
    )
    calm(model)
    model = model.to(clip.device).train()

    def losses_of(samples: list[Sample], _: int) -> dict[str, Tensor]:
        pictures = [picture.to(clip.device, non_blocking=True).float() / 255 for picture, _, _ in samples]
        boxes = [{"boxes": t.boxes.to(clip.device), "labels": (t.labels + 1).to(clip.device)} for _, t, _ in samples]
        losses: dict[str, Tensor] = model(pictures, boxes)
        return losses

    base_only = load_recipe(bench.recipe, [*bench.settings, *PRESETS["base-only"]])
    loop = Loop(
        model,
        losses_of,
        _batches(folder, bench, base_only, clip.device),
        recipe.train,
        clip.device,
        "torchvision",
        lambda s: s[2],
    )
    return _of_loop("torchvision's fasterrcnn_resnet50_fpn", loop)


def calm(model: nn.Module) -> None:
    """Norms that only scale, without trained weights, would let activations double at every block."""
    for name, module in model.named_modules():
        if isinstance(module, (FrozenBatchNorm2d, nn.BatchNorm2d)) and name.endswith("bn3"):
            module.weight.data.fill_(0.2)


if __name__ == "__main__":
    with workplace() as place:
        bench_train(place, parsed(TrainBench, __doc__))
