"""Evaluation as a stage: metrics.json, detections that give the same AP elsewhere, pictures, and refusals."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hdovd.core import HdovdError
from hdovd.data import DataPaths
from hdovd.evaluation import Engine
from hdovd.pipelines.demo.world import BASE, NOVEL
from hdovd.pipelines.evaluation.evaluate import EvalConfig, EvalResult, class_table, evaluate, result_table
from hdovd.pipelines.runs import RunFolder, Weights

GROUPS = {"novel", "base", "all"}


def _evaluate(run: RunFolder, tmp_path: Path, data: Path, **changes: Any) -> tuple[EvalResult, Path]:
    """Evaluate a copy of `run`: the shared one stays as training left it."""
    out = Path(shutil.copytree(run.path, tmp_path / "run"))
    return evaluate(EvalConfig(run=out, data=DataPaths(data), device="cpu", **changes)), out


@pytest.fixture(scope="module")
def evaluated(distilled: RunFolder, world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[EvalResult, Path]:
    return _evaluate(distilled, tmp_path_factory.mktemp("evaluated"), world, pictures=3)


def _metrics(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "metrics.json").read_text()))


def test_metrics_have_the_promised_keys(evaluated: tuple[EvalResult, Path], distilled: RunFolder) -> None:
    metrics = _metrics(evaluated[1])
    assert {"protocol", "ap50", "ap", "split_blind", "per_class", "images", "cache"} <= metrics.keys()
    assert metrics["protocol"] == "demo-world"
    assert metrics["ap50"].keys() == metrics["ap"].keys() == GROUPS
    assert metrics["split_blind"].keys() == {"ap50", "ap"}
    assert metrics["split_blind"]["ap50"].keys() == metrics["split_blind"]["ap"].keys() == GROUPS
    assert list(metrics["per_class"]) == [*BASE, *NOVEL]
    assert all(entry.keys() == {"ap50", "ap"} for entry in metrics["per_class"].values())
    assert metrics["images"] == 8
    assert metrics["cache"] == distilled.record()["cache"]


def test_group_values_are_means_over_classes_with_ground_truth(evaluated: tuple[EvalResult, Path], world: Path) -> None:
    metrics = _metrics(evaluated[1])
    tree = json.loads((world / "annotations" / "instances_val2017.json").read_text())
    shown = {a["category_id"] for a in tree["annotations"]}
    present = {c["name"] for c in tree["categories"] if c["id"] in shown}
    assert present < {*BASE, *NOVEL}  # a class without ground truth is among them
    for key in ("ap50", "ap"):
        values = {name: entry[key] for name, entry in metrics["per_class"].items()}
        assert {name for name, value in values.items() if value is not None} == present
        for group, names in (("base", BASE), ("novel", NOVEL), ("all", (*BASE, *NOVEL))):
            assert metrics[key][group] == pytest.approx(np.mean([values[n] for n in names if n in present]), abs=1e-9)
    assert set(metrics["classes_without_ground_truth"]) == {*BASE, *NOVEL} - present


def test_detections_file_gives_the_same_ap_through_pycocotools(evaluated: tuple[EvalResult, Path], world: Path) -> None:
    metrics = _metrics(evaluated[1])
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(world / "annotations" / "instances_val2017.json")
        found = truth.loadRes(str(evaluated[1] / "detections.json"))
        run = COCOeval(truth, found, "bbox")
        run.params.maxDets = [100, 300, 1000]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"]  # IoU x recall x class x area x maxDets
    checked = 0
    for place, category in enumerate(run.params.catIds):
        name = truth.loadCats([category])[0]["name"]
        for key, values in (("ap50", precision[0, :, place, 0, -1]), ("ap", precision[:, :, place, 0, -1])):
            if (values < 0).all():
                assert metrics["per_class"][name][key] is None
            else:
                assert metrics["per_class"][name][key] == pytest.approx(100 * values.mean(), abs=1e-9)
                checked += values.mean() > 0
    assert checked  # some class is found, so that the comparison is not of zeros


def test_detections_are_in_results_form_inside_the_picture(evaluated: tuple[EvalResult, Path], world: Path) -> None:
    tree = json.loads((world / "annotations" / "instances_val2017.json").read_text())
    sizes = {i["id"]: (i["width"], i["height"]) for i in tree["images"]}
    categories = {c["id"] for c in tree["categories"]}
    detections = json.loads((evaluated[1] / "detections.json").read_text())
    assert {d["image_id"] for d in detections} == sizes.keys()
    for d in detections:
        assert d.keys() == {"image_id", "category_id", "bbox", "score"}
        assert d["category_id"] in categories
        assert 0 < d["score"] <= 1
        x, y, w, h = d["bbox"]
        width, height = sizes[d["image_id"]]
        assert min(x, y, w, h) >= 0
        assert x + w <= width + 1e-3
        assert y + h <= height + 1e-3


def test_split_blind_is_another_result_when_there_is_distillation(evaluated: tuple[EvalResult, Path]) -> None:
    metrics = _metrics(evaluated[1])
    assert metrics["split_blind"]["ap"] != metrics["ap"]
    assert (metrics["alpha"], metrics["beta"]) == (0.25, 0.45)


def test_split_blind_is_the_result_without_distillation(base_only: RunFolder, world: Path, tmp_path: Path) -> None:
    result, out = _evaluate(base_only, tmp_path, world)
    metrics = _metrics(out)
    assert metrics["split_blind"] == {"ap50": metrics["ap50"], "ap": metrics["ap"]}
    assert (metrics["alpha"], metrics["beta"]) == (0, 0)
    assert "classification score alone" in result_table(result)


def _scores_by_box(
    run: RunFolder, world: Path, out: Path, alpha: float, beta: float
) -> dict[tuple[Any, ...], dict[str, float]]:
    """The scores of all classes at every box, with nothing suppressed or cut off; boxes that stand twice are left
    out."""
    shutil.copytree(run.path, out)
    config = (out / "config.toml").read_text()
    for old, new in (
        ("alpha = 0.25", f"alpha = {alpha}"),
        ("beta = 0.45", f"beta = {beta}"),
        ("nms = 0.5\ndetections_per_image = 100", "nms = 1.0\ndetections_per_image = 100000"),
    ):
        assert old in config
        config = config.replace(old, new)
    (out / "config.toml").write_text(config)
    evaluate(EvalConfig(run=out, data=DataPaths(world), device="cpu", trust=True))
    name = {
        c["id"]: c["name"]
        for c in json.loads((world / "annotations" / "instances_val2017.json").read_text())["categories"]
    }
    found: dict[tuple[Any, ...], list[tuple[str, float]]] = {}
    for d in json.loads((out / "detections.json").read_text()):
        found.setdefault((d["image_id"], *d["bbox"]), []).append((name[d["category_id"]], d["score"]))
    return {box: dict(scores) for box, scores in found.items() if len(scores) == len(BASE + NOVEL)}


def test_second_score_counts_for_the_classes_it_is_meant_for(distilled: RunFolder, world: Path, tmp_path: Path) -> None:
    """alpha moves the base classes, beta the novel ones; all scores of a box sum to one with the background's, so the
    others keep their ratio.
    """
    plain = _scores_by_box(distilled, world, tmp_path / "plain", 0.0, 0.0)
    assert len(plain) > 100
    for alpha, beta, moved, left in ((0.0, 1.0, NOVEL, BASE), (1.0, 0.0, BASE, NOVEL)):
        other = _scores_by_box(distilled, world, tmp_path / f"{alpha} {beta}", alpha, beta)
        assert other.keys() == plain.keys()
        for names, same in ((left, True), (moved, False)):
            ratios = np.array([[other[box][n] / plain[box][n] for n in names] for box in plain])
            spread = ratios.max(axis=1) / ratios.min(axis=1)
            assert (spread < 1.0001).all() if same else (spread > 2).all()


def test_result_does_not_depend_on_batch_size_or_workers(
    distilled: RunFolder, evaluated: tuple[EvalResult, Path], world: Path, tmp_path: Path
) -> None:
    result, _ = _evaluate(distilled, tmp_path, world, batch_size=8, workers=1)
    np.testing.assert_allclose(result.combined.ap, evaluated[0].combined.ap, atol=0.5)  # NaN where both have none


def test_pictures_are_written_and_named(evaluated: tuple[EvalResult, Path]) -> None:
    result, out = evaluated
    pictures = sorted((out / "pictures").glob("*.png"))
    assert len(pictures) == 3
    assert set(pictures) <= set(result.files)
    assert {out / "metrics.json", out / "detections.json"} <= set(result.files)
    assert all(file.is_file() for file in result.files)
    for picture in pictures:
        with Image.open(picture) as image:
            image.load()
            assert image.width > 2 * 400  # detections beside the ground truth
            assert len(image.getcolors(1 << 24) or []) > 1000


def test_tables_show_the_numbers_and_the_protocol(evaluated: tuple[EvalResult, Path]) -> None:
    result, out = evaluated
    metrics, table = _metrics(out), result_table(result)
    assert "demo-world" in table
    assert "split-blind" in table
    for group in GROUPS:
        assert f"{metrics['ap50'][group]:.1f}" in table
        assert f"{metrics['split_blind']['ap50'][group]:.1f}" in table
    assert "without ground truth" in table
    listed = class_table(result)
    assert all(name in listed for name in (*BASE, *NOVEL))
    assert "nan" not in (table + listed).lower()


def test_images_without_annotations_are_left_out(base_only: RunFolder, copied_world: Path, tmp_path: Path) -> None:
    file = copied_world / "annotations" / "instances_val2017.json"
    tree = json.loads(file.read_text())
    gone = tree["images"][2]["id"]
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] != gone]
    file.write_text(json.dumps(tree))
    _, out = _evaluate(base_only, tmp_path, copied_world)
    assert _metrics(out)["images"] == 7
    assert gone not in {d["image_id"] for d in json.loads((out / "detections.json").read_text())}


def test_weighted_mean_holds_when_every_class_has_ground_truth(
    base_only: RunFolder, copied_world: Path, tmp_path: Path
) -> None:
    file = copied_world / "annotations" / "instances_val2017.json"
    tree = json.loads(file.read_text())
    shown = {a["category_id"] for a in tree["annotations"]}
    number = len(tree["annotations"])
    for missing in (c["id"] for c in tree["categories"] if c["id"] not in shown):
        number += 1
        tree["annotations"].append(
            {
                "id": number,
                "image_id": tree["images"][0]["id"],
                "category_id": missing,
                "bbox": [5, 5, 30, 30],
                "area": 900,
                "iscrowd": 0,
            }
        )
    file.write_text(json.dumps(tree))
    _, out = _evaluate(base_only, tmp_path, copied_world)
    metrics = _metrics(out)
    for key in ("ap50", "ap"):
        weighted = (len(BASE) * metrics[key]["base"] + len(NOVEL) * metrics[key]["novel"]) / len(BASE + NOVEL)
        assert math.isclose(metrics[key]["all"], weighted, abs_tol=1e-9)


def test_no_detection_at_all_is_an_ap_of_zero(base_only: RunFolder, world: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(base_only.path, tmp_path / "run"))
    config = (out / "config.toml").read_text()
    (out / "config.toml").write_text(config.replace("score_threshold = 0.0", "score_threshold = 1.0"))
    evaluate(EvalConfig(run=out, data=DataPaths(world), device="cpu", trust=True))
    assert json.loads((out / "detections.json").read_text()) == []
    assert _metrics(out)["ap50"] == {"novel": 0, "base": 0, "all": 0}


def test_the_other_engine_gives_the_same_and_is_recorded(
    distilled: RunFolder, evaluated: tuple[EvalResult, Path], world: Path, tmp_path: Path
) -> None:
    result, out = _evaluate(distilled, tmp_path, world, engine=Engine.FASTER)
    for found, expected in ((result.combined, evaluated[0].combined), (result.split_blind, evaluated[0].split_blind)):
        np.testing.assert_allclose(found.ap50, expected.ap50, rtol=0, atol=1e-6)
        np.testing.assert_allclose(found.ap, expected.ap, rtol=0, atol=1e-6)
    assert _metrics(out)["engine"] == {"name": "faster-coco-eval", "version": version("faster-coco-eval")}
    assert _metrics(evaluated[1])["engine"] == {"name": "pycocotools", "version": version("pycocotools")}
    assert _metrics(out)["precision"] == "fp32"


# --- refusals ---


def test_a_missing_engine_says_what_to_install(
    base_only: RunFolder, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(HdovdError, match=r"pip install 'hdovd\[fast-eval\]'"):
        _evaluate(base_only, tmp_path, world, engine=Engine.FASTER)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other size"])
def test_validation_picture_that_cannot_be_read_is_an_error(
    base_only: RunFolder, copied_world: Path, tmp_path: Path, damage: str
) -> None:
    file = sorted((copied_world / "val2017").iterdir())[4]
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:1500])
    else:
        Image.new("RGB", (10, 10)).save(file)
    with pytest.raises(HdovdError, match=file.name):
        _evaluate(base_only, tmp_path, copied_world)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_error_in_a_worker_process_is_still_one_message(
    base_only: RunFolder, copied_world: Path, tmp_path: Path
) -> None:
    file = sorted((copied_world / "val2017").iterdir())[4]
    file.unlink()
    with pytest.raises(HdovdError, match=file.name) as error:
        _evaluate(base_only, tmp_path, copied_world, workers=1)
    assert "Traceback" not in str(error.value)


def test_protocol_of_other_classes(base_only: RunFolder, world: Path, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"demo-world.*ov-coco"):
        _evaluate(base_only, tmp_path, world, protocol="ov-coco")


def test_folder_that_is_no_run(world: Path, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match="no run"):
        evaluate(EvalConfig(run=tmp_path, data=DataPaths(world)))


def test_run_that_did_not_finish_an_epoch(base_only: RunFolder, world: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(base_only.path, tmp_path / "run"))
    (out / "model.safetensors").unlink()
    with pytest.raises(HdovdError, match=r"no model\.safetensors"):
        evaluate(EvalConfig(run=out, data=DataPaths(world)))


def test_weights_of_another_recipe(base_only: RunFolder, distilled: RunFolder, world: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(base_only.path, tmp_path / "run"))
    shutil.copy(distilled.path / "model.safetensors", out)
    with pytest.raises(HdovdError, match=r"does not fit config\.toml"):
        evaluate(EvalConfig(run=out, data=DataPaths(world), device="cpu"))


def test_the_best_weights_where_there_are_any(distilled: RunFolder, world: Path, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"no best\.safetensors: was the run copied whole, and validated"):
        _evaluate(distilled, tmp_path / "none", world, weights=Weights.BEST)
    result, out = _evaluate(distilled, tmp_path / "last", world)
    shutil.copy(out / "model.safetensors", out / "best.safetensors")
    (out / "model.safetensors").write_bytes(b"others")
    assert evaluate(
        EvalConfig(run=out, data=DataPaths(world), device="cpu", weights=Weights.BEST)
    ).combined.summary() == (result.combined.summary())
    assert _metrics(out)["weights"] == "best"


def test_missing_validation_annotations(base_only: RunFolder, copied_world: Path, tmp_path: Path) -> None:
    (copied_world / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(HdovdError, match=r"instances_val2017.json"):
        _evaluate(base_only, tmp_path, copied_world)
