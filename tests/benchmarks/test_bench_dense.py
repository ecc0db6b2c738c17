"""Dense against crops: the figures are those of the boxes that they are said to be of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_dense import DenseBench, Way, bench_dense
from online_clip import reference_transform

from hdovd.core import HdovdError
from hdovd.data import load_protocol, load_split
from hdovd.pipelines.common.images import pixels_of, read_image
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.embedding.crop_recipe import PLAIN_BOX
from hdovd.pipelines.teachers.dense import DenseClip, scale_boxes
from hdovd.pipelines.teachers.openclip import load_clip


@pytest.fixture
def bench(world: Path, clip: str) -> Any:
    def run(data: Path = world, **changes: Any) -> list[Way]:
        return bench_dense(
            DenseBench(
                **{
                    "clip": clip,
                    "sides": (32, 64),
                    "protocol": str(world / "protocol.toml"),
                    "device": "cpu",
                    "boxes": 9,
                    "batch_size": 7,
                    "rounds": 1,
                }
                | changes
            ),
            data,
        )

    return run


def test_figures_are_those_of_the_boxes_one_by_one(
    bench: Any, world: Path, clip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, protocol = load_clip(clip, None, device="cpu"), load_protocol(str(world / "protocol.toml"))
    names = torch.from_numpy(teacher.embed_names(protocol.names, ("a photo of a {}",)))
    dense, transform, reference = (
        DenseClip(teacher.model.visual, 64),
        teacher.transform.squashed(64),
        reference_transform(teacher),
    )
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
    ways = bench()
    crops, _, way = ways
    assert [w.name for w in ways] == ["crops", "dense 32", "dense 64"]
    assert crops.accuracy == pytest.approx(sum(right) / len(right))
    assert crops.cosine_min == pytest.approx(1, abs=1e-6)
    assert way.accuracy == pytest.approx(sum(dense_right) / len(right))
    assert way.cosine_mean == pytest.approx(sum(cosines) / len(right), abs=1e-3)
    assert way.cosine_min == pytest.approx(min(cosines), abs=1e-3)  # the reference's crops are Pillow's
    assert all(w.model_per_s > w.per_s > 0 for w in ways)  # preparing takes time too
    lines = capsys.readouterr().out.splitlines()
    assert (
        f"{9 * len(split.images)} boxes of {len(split.images)} images; accuracy among 24 classes and cosines to crops "
        f"of the "
        f"{len(right)} that are labelled" in lines
    )
    assert [line.split("  ")[0] for line in lines[-3:]] == [w.name for w in ways]


def test_fewer_images_are_spread_over_the_list(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench(images=2, boxes=1)
    said = re.search(r"(\d+) boxes of 2 images; .* of the (\d+) that are labelled", capsys.readouterr().out)
    assert said is not None
    assert said[1] == said[2]  # every picture has one at least: nothing is added


def test_dense_runs_in_the_precision_of_the_crops(bench: Any) -> None:
    exact, rounded = (bench(precision=p)[1] for p in (Precision.FP32, Precision.BF16))
    assert rounded.cosine_mean == pytest.approx(exact.cosine_mean, abs=0.02)
    assert rounded.cosine_mean != exact.cosine_mean


def test_side_that_the_clip_cannot_take_is_refused_at_once(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match="side 30"):
        bench(tmp_path / "not there", sides=(30,))
