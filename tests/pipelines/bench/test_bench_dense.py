"""Dense against crops: the figures are those of the boxes that they are said to be of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hdovd.core.errors import HdovdError
from hdovd.data.coco import DataPaths, load_split
from hdovd.data.protocol import load_protocol
from hdovd.pipelines.bench.bench_dense import DenseBenchConfig, bench_dense
from hdovd.pipelines.common.images import pixels_of, read_image
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.embedding.crop_recipe import PLAIN_BOX
from hdovd.pipelines.teachers.dense import DenseClip, scale_boxes
from hdovd.pipelines.teachers.openclip import load_clip


@pytest.fixture
def bench(world: Path, clip: str) -> Any:
    def make(**changes: Any) -> DenseBenchConfig:
        return DenseBenchConfig(**{"data": DataPaths(world), "clip": clip, "sides": (32, 64), "protocol": str(world / "protocol.toml"),
                             "device": "cpu", "boxes": 9, "batch_size": 7, "rounds": 1} | changes)

    return make


def test_figures_are_those_of_the_boxes_one_by_one(bench: Any, world: Path, clip: str) -> None:
    teacher, protocol = load_clip(clip, None, device="cpu"), load_protocol(str(world / "protocol.toml"))
    names = torch.from_numpy(teacher.embed_names(protocol.names, ("a photo of a {}",)))
    dense, transform, reference = DenseClip(teacher.model.visual, 64), teacher.transform.squashed(64), teacher.reference_transform()
    right, dense_right, cosines = [], [], []
    split = load_split(world / "annotations" / "instances_val2017.json", world / "val2017", protocol, base_only=False)
    for image in split.images:
        picture = read_image(split.path(image), image.width, image.height)
        whole = transform.normalise(transform.fit(pixels_of(picture))[None])
        for box, label in zip(image.boxes, image.labels.tolist(), strict=True):
            crop = reference(picture.crop(PLAIN_BOX.regions(box[None], image.width, image.height)[0].tolist()))
            row = F.normalize(teacher.model.encode_image(crop[None]), dim=1)
            other = dense.embed_boxes(whole, [scale_boxes(torch.from_numpy(box)[None], image.width, image.height, 64)])
            right.append(int((row @ names.T).argmax()) == label)
            dense_right.append(int((other @ names.T).argmax()) == label)
            cosines.append(float((row * other).sum()))
    lines: list[str] = []
    figures = bench_dense(bench(), lines.append)
    assert (figures.images, figures.boxes, figures.labelled, figures.classes) == (len(split.images), 9 * len(split.images), len(right), 24)
    crops, _, way = figures.embedders
    assert [w.name for w in figures.embedders] == ["crops", "dense 32", "dense 64"]
    assert crops.accuracy == pytest.approx(sum(right) / len(right))
    assert crops.cosine_min == pytest.approx(1, abs=1e-6)
    assert way.accuracy == pytest.approx(sum(dense_right) / len(right))
    assert way.cosine_mean == pytest.approx(sum(cosines) / len(right), abs=1e-3)
    assert way.cosine_min == pytest.approx(min(cosines), abs=1e-3)  # the reference's crops are Pillow's
    assert all(w.model_per_s > w.per_s > 0 for w in figures.embedders)  # preparing takes time too
    assert lines == figures.lines()
    assert len(lines) == 5


def test_fewer_images_are_spread_over_the_list(bench: Any) -> None:
    figures = bench_dense(bench(images=2, boxes=1), lambda _: None)
    assert figures.images == 2
    assert figures.boxes == figures.labelled  # every picture has one at least: nothing is added


def test_dense_runs_in_the_precision_of_the_crops(bench: Any) -> None:
    exact, rounded = (bench_dense(bench(precision=p), lambda _: None).embedders[1] for p in (Precision.FP32, Precision.BF16))
    assert rounded.cosine_mean == pytest.approx(exact.cosine_mean, abs=0.02)
    assert rounded.cosine_mean != exact.cosine_mean


def test_squashed_picture_is_the_models_own_preprocessing(clip: str) -> None:
    """At the model's own side, where its own way is to squash."""
    transform, picture = load_clip(clip, None, device="cpu").transform, torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    assert torch.equal(transform.squashed(32).fit(picture), transform.fit(picture))
    assert torch.equal(replace(transform, resize_mode="shortest").squashed(32).fit(picture), transform.fit(picture))
    assert transform.squashed(80).fit(picture).shape == (3, 80, 80)


def test_boxes_are_scaled_with_the_picture() -> None:
    boxes = torch.tensor([[0.0, 0, 160, 120], [80, 30, 120, 60]])
    assert scale_boxes(boxes, 160, 120, 64).tolist() == [[0, 0, 64, 64], [32, 16, 48, 32]]


@pytest.mark.parametrize("changes", [{"sides": ()}, {"images": 0}, {"rounds": 0}], ids=str)
def test_nothing_to_measure_is_refused(bench: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(HdovdError, match="at least"):
        bench(**changes)


def test_side_that_the_clip_cannot_take_is_refused_at_once(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match="side 30"):
        bench_dense(bench(sides=(30,), data=DataPaths(tmp_path / "not there")))
