"""Rows that are fitted to what a detector sees at examples in their pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from torchvision.ops import box_iou

from hdovd.core import lines_to
from hdovd.data import DataPaths, Protocol
from hdovd.modeling.export.detectors import traceable
from hdovd.pipelines.detection import detector as detector_file
from hdovd.pipelines.detection.detector import Detector, fit_rows
from hdovd.pipelines.detection.names import Examples, read_examples
from hdovd.pipelines.evaluation.config import EvalConfig
from hdovd.pipelines.runs import RunFolder


@pytest.fixture
def shown(world: Path, tmp_path: Path) -> Path:
    """A COCO file of all boxes of two novel classes of the training pictures."""
    tree, out = json.loads((world / "annotations" / "instances_train2017.json").read_text()), tmp_path / "shown.json"
    wanted = {one["id"] for one in tree["categories"] if one["name"] in ("fish", "star")}
    tree["annotations"] = [one for one in tree["annotations"] if one["category_id"] in wanted]
    pictures = {one["image_id"] for one in tree["annotations"]}
    tree["images"] = [one for one in tree["images"] if one["id"] in pictures]
    out.write_text(json.dumps(tree))
    return out


@pytest.fixture
def detector(distilled: RunFolder) -> Detector:
    return Detector.from_run(distilled.path, device="cpu")


def _parts(detector: Detector, examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Names' rows of the classes with examples, and of all others of the protocol."""
    names = detector.protocol.names
    return tuple(  # type: ignore[return-value]
        detector.embedder.own_rows(some) for some in (examples.names, [n for n in names if n not in examples.names])
    )


def _seen(
    detector: Detector, examples: Examples, rows: torch.Tensor, others: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities (n, K + O + 1) of the regions of all pictures, the classes of those on examples, and which are off
    all: found again from scratch.
    """
    found = traceable(detector.model)
    probabilities, labels, off = [], [], []
    with torch.no_grad():
        for image in examples.images:
            pixels = examples.picture(examples.path(image), image.width, image.height, "apply").pixels
            seen = found.rois(pixels)
            iou, best = box_iou(seen.boxes, torch.from_numpy(image.boxes)).max(dim=1)
            probabilities.append(detector.model.scores(seen.c, seen.d, torch.cat([rows, others]))[0])
            labels.append(torch.where(iou >= 0.5, torch.from_numpy(image.labels)[best], -1))
            off.append(iou < 0.3)
    return torch.cat(probabilities), torch.cat(labels), torch.cat(off)


def test_regions_on_examples_are_found_rather_and_others_stay(
    detector: Detector, shown: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = read_examples(shown, world / "train2017")
    rows, others = _parts(detector, examples)
    before, label, off = _seen(detector, examples, rows, others)
    on = label >= 0
    assert on.sum() > 3
    assert off.sum() > 20

    def told(moved: torch.Tensor) -> tuple[float, float]:
        """How likely the right classes are, and how far probabilities off examples moved."""
        after = _seen(detector, examples, moved, others)[0]
        likely = after[on].gather(1, label[on, None]).log().mean()
        far = torch.nn.functional.kl_div(after[off].log(), before[off], reduction="batchmean")
        return float(likely), float(far)

    fitted = fit_rows(detector.model, examples, rows, others)
    assert torch.allclose(fitted.norm(dim=1), torch.ones(len(rows)), atol=1e-5)
    assert told(fitted)[0] > told(rows)[0] + 0.01
    monkeypatch.setattr(detector_file, "KEPT", 0.0)
    careless = fit_rows(detector.model, examples, rows, others)
    assert told(careless)[1] > 2 * told(fitted)[1]
    monkeypatch.setattr(detector_file, "PRIOR", 1e9)
    assert torch.allclose(fit_rows(detector.model, examples, rows, others), rows, atol=0.02)


def test_the_objective_is_less_than_at_any_step_beside(detector: Detector, shown: Path, world: Path) -> None:
    """As it is written, over regions that were found from scratch."""
    examples = read_examples(shown, world / "train2017")
    rows, others = _parts(detector, examples)
    before, label, off = _seen(detector, examples, rows, others)
    assert max(len(image.boxes) for image in examples.images) < 10

    def objective(moved: torch.Tensor) -> float:
        after = _seen(detector, examples, moved, others)[0]
        on = label >= 0
        away = detector_file.PRIOR * (1 - (moved * rows).sum(dim=1)).sum()
        kept = (before[off] * (before[off].log() - after[off].log())).sum()
        return float(away + detector_file.KEPT * kept - after[on].gather(1, label[on, None]).log().sum())

    fitted = fit_rows(detector.model, examples, rows, others)
    best, rng = objective(fitted), np.random.default_rng(0)
    assert best < objective(rows)
    for _ in range(6):
        step = torch.from_numpy(rng.standard_normal(rows.shape).astype(np.float32))
        assert best < objective(normalize(fitted + 0.1 * normalize(step, dim=1), dim=1))


def test_crops_alone_and_mix_0_leave_rows_as_they_are(detector: Detector, shown: Path, world: Path) -> None:
    examples = read_examples(shown, world / "train2017")
    rows, others = _parts(detector, examples)
    picture = next((world / "train2017").iterdir())
    assert fit_rows(detector.model, read_examples({name: [picture] for name in examples.names}), rows, others) is rows
    assert torch.allclose(detector.example_rows(examples, 0.0, others), normalize(rows, dim=1), atol=1e-6)


def test_a_picture_that_cannot_be_read_counts_for_nothing(
    detector: Detector, shown: Path, world: Path, tmp_path: Path
) -> None:
    examples = read_examples(shown, world / "train2017")
    rows, others = _parts(detector, examples)
    pictures = Path(shutil.copytree(world / "train2017", tmp_path / "pictures"))
    bad = examples.images[0]
    (pictures / bad.file_name).write_bytes(b"torn")
    tree = json.loads(shown.read_text())
    for part, key in (("images", "id"), ("annotations", "image_id")):
        tree[part] = [one for one in tree[part] if one[key] != bad.id]
    (tmp_path / "without.json").write_text(json.dumps(tree))
    without = fit_rows(detector.model, read_examples(tmp_path / "without.json", pictures), rows, others)
    assert torch.equal(fit_rows(detector.model, read_examples(shown, pictures), rows, others), without)


@pytest.mark.parametrize("way", ["inference", "no gradient"])
def test_it_does_not_matter_where_it_is_called(way: str, detector: Detector, shown: Path, world: Path) -> None:
    examples = read_examples(shown, world / "train2017")
    rows, others = _parts(detector, examples)
    with torch.inference_mode() if way == "inference" else torch.no_grad():
        found = fit_rows(detector.model, examples, rows.clone(), others.clone())
    assert torch.equal(found, fit_rows(detector.model, examples, rows, others))


def test_pictures_are_turned_as_their_boxes_say(detector: Detector, shown: Path, world: Path, tmp_path: Path) -> None:
    """A picture with an orientation, annotated as it is stored, is read as it is stored; one of another size counts for
    nothing, for it is told as left out.
    """
    examples = read_examples(shown, world / "train2017")
    rows, others = _parts(detector, examples)
    pictures, tree = Path(shutil.copytree(world / "train2017", tmp_path / "pictures")), json.loads(shown.read_text())
    for one in tree["images"]:
        one["file_name"] = f"{one['id']}.png"
        with Image.open(pictures / f"{one['id']:012d}.jpg") as picture:
            exif = picture.getexif()
            picture.save(pictures / f"{one['id']}-plain.png")
            exif[0x0112] = 6
            picture.save(pictures / one["file_name"], exif=exif)
    (tmp_path / "turned.json").write_text(json.dumps(tree))
    turned = fit_rows(detector.model, read_examples(tmp_path / "turned.json", pictures), rows, others)
    for one in tree["images"]:
        one["file_name"] = f"{one['id']}-plain.png"
    (tmp_path / "plain.json").write_text(json.dumps(tree))
    plain = fit_rows(detector.model, read_examples(tmp_path / "plain.json", pictures), rows, others)
    assert torch.equal(turned, plain)
    first = tree["images"][0]["id"]
    without = {
        "images": tree["images"][1:],
        "annotations": [one for one in tree["annotations"] if one["image_id"] != first],
        "categories": tree["categories"],
    }
    (tmp_path / "without.json").write_text(json.dumps(without))
    tree["images"][0] |= {side: 2 * tree["images"][0][side] for side in ("width", "height")}
    (tmp_path / "larger.json").write_text(json.dumps(tree))
    found = [
        fit_rows(detector.model, read_examples(tmp_path / name, pictures), rows, others)
        for name in ("larger.json", "without.json")
    ]
    assert torch.equal(*found)


def test_detection_and_evaluation_take_the_same_rows(
    distilled: RunFolder, detector: Detector, shown: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, pictures, taken = Path(shutil.copytree(distilled.path, tmp_path / "run")), world / "train2017", []
    real = detector_file.evaluate_by

    def noting(job: EvalConfig, protocol: Protocol, texts: torch.Tensor, out: Path) -> Any:
        taken.append(texts)
        return real(job, protocol, texts, out)

    monkeypatch.setattr(detector_file, "evaluate_by", noting)
    data = DataPaths(world)
    job = EvalConfig(run=run, data=data, device="cpu", examples=shown, example_images=pictures, mix=1.0, pictures=0)
    detector_file.evaluate_examples(job, shown)
    examples = read_examples(shown, pictures)
    rest = [name for name in detector.protocol.names if name not in examples.names]
    lines: list[str] = []
    with lines_to(lines.append):
        detector.set_examples(shown, images=pictures, names=rest, mix=1.0)
    assert any("region" in line for line in lines)
    assert detector.names == (*examples.names, *rest)
    places = [detector.protocol.names.index(name) for name in detector.names]
    assert torch.allclose(detector.class_embeddings, normalize(taken[0][places], dim=1), atol=1e-3)
    by_crops = detector.embedder.embed_examples(examples, 1.0)
    assert not torch.allclose(detector.class_embeddings[: len(by_crops)], by_crops, atol=1e-3)
