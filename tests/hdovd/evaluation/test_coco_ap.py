"""AP through hdovd against plain COCOeval runs, one class at a time and one group at a time; and the engines against
each other.
"""

import contextlib
import copy
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hdovd.core import HdovdError
from hdovd.data import Protocol, load_split
from hdovd.evaluation import Engine, require
from hdovd.evaluation.coco import AveragePrecision, GroundTruth

PROTOCOL = Protocol("mine", ("zebra", "cat", "bus"), ("dog", "ant"))
IDS = {"zebra": 90, "cat": 7, "bus": 41, "dog": 2, "ant": 18, "ignored": 1}  # not in the order of the labels
COCO_IDS = tuple(IDS[name] for name in PROTOCOL.names)
Tree = dict[str, Any]
Detection = dict[str, Any]
EVERY_ENGINE = pytest.mark.parametrize("engine", list(Engine))


def world(seed: int, *, without: str | None = None) -> tuple[Tree, list[Detection]]:
    """Random ground truth with crowds and an annotation id 0, and detections around it and elsewhere."""
    rng = np.random.default_rng(seed)
    images = [{"id": int(i), "file_name": f"{i}.jpg", "width": 200, "height": 150} for i in rng.permutation(8)]
    annotations: list[dict[str, Any]] = []
    detections: list[Detection] = []
    for image in images:
        for name in rng.choice(list(IDS), 9):
            if name == without:
                continue
            x, y, w, h = (float(v) for v in (*rng.uniform(0, 100, 2), *rng.uniform(10, 50, 2)))
            number = len(annotations)
            annotations.append(
                {
                    "id": number,
                    "image_id": image["id"],
                    "category_id": IDS[name],
                    "bbox": [x, y, w, h],
                    "area": w * h * 0.7,
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
            for _ in range(int(rng.integers(0, 4))):
                shift = rng.normal(0, 4, 4)
                detections.append(
                    {
                        "image_id": image["id"],
                        "category_id": IDS[name],
                        "score": float(rng.random()),
                        "bbox": [float(v) for v in np.array([x, y, w, h]) + shift],
                    }
                )
        for _ in range(4):
            detections.append(
                {
                    "image_id": image["id"],
                    "category_id": IDS[str(rng.choice(PROTOCOL.names))],
                    "score": float(rng.random()),
                    "bbox": [float(v) for v in (*rng.uniform(0, 100, 2), *rng.uniform(10, 50, 2))],
                }
            )
    detections = [d for d in detections if d["category_id"] != IDS["ignored"]]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for n, i in IDS.items()],
    }, detections


def plain_ap(
    tree: Tree, detections: list[Detection], names: tuple[str, ...], image_ids: list[int] | None = None
) -> tuple[float, float]:
    """(AP50, AP) of one COCOeval run over some classes, as its own summary computes them, in percent."""
    tree = copy.deepcopy(tree)
    for a in tree["annotations"]:
        a["id"] += 1  # 0 is "unmatched" to pycocotools
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = tree
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(detections)), "bbox")
        evaluation.params.catIds = sorted(IDS[name] for name in names)
        if image_ids is not None:
            evaluation.params.imgIds = image_ids
        evaluation.params.maxDets = [100, 300, 1000]
        evaluation.evaluate()
        evaluation.accumulate()
    values = []
    for precision in (evaluation.eval["precision"][0, :, :, 0, -1], evaluation.eval["precision"][:, :, :, 0, -1]):
        counted = precision[precision > -1]
        values.append(float(counted.mean()) * 100 if counted.size else float("nan"))
    return values[0], values[1]


def compute(
    folder: Path,
    tree: Tree,
    detections: list[Detection],
    image_ids: list[int] | None = None,
    protocol: Protocol = PROTOCOL,
    engine: Engine = Engine.PYCOCOTOOLS,
) -> AveragePrecision:
    file = folder / "instances.json"
    file.write_text(json.dumps(tree))
    ids = [i["id"] for i in tree["images"]] if image_ids is None else image_ids
    return GroundTruth(file, COCO_IDS, ids, protocol, engine).average_precision(detections)


@EVERY_ENGINE
@pytest.mark.parametrize("seed", range(4))
def test_equals_a_plain_run_per_class_and_per_group(tmp_path: Path, seed: int, engine: Engine) -> None:
    tree, detections = world(seed)
    found = compute(tmp_path, tree, detections, engine=engine)
    for label, name in enumerate(PROTOCOL.names):
        ap50, ap = plain_ap(tree, detections, (name,))
        assert found.ap50[label] == pytest.approx(ap50, abs=1e-9)
        assert found.ap[label] == pytest.approx(ap, abs=1e-9)
    assert len(set(found.ap50.tolist())) == len(PROTOCOL.names)  # else a mixed-up order could hide
    summary = found.summary()
    for group, names in (("novel", PROTOCOL.novel), ("base", PROTOCOL.base), ("all", PROTOCOL.names)):
        ap50, ap = plain_ap(tree, detections, names)
        assert summary["ap50"][group] == pytest.approx(ap50, abs=1e-9)
        assert summary["ap"][group] == pytest.approx(ap, abs=1e-9)
    for values in summary.values():
        assert values["all"] == pytest.approx((3 * values["base"] + 2 * values["novel"]) / 5, abs=1e-9)
    assert found.per_class()["cat"] == {"ap50": pytest.approx(found.ap50[1]), "ap": pytest.approx(found.ap[1])}


def test_a_class_without_ground_truth_counts_in_no_mean(tmp_path: Path) -> None:
    tree, detections = world(5, without="dog")
    assert any(d["category_id"] == IDS["dog"] for d in detections)
    found = compute(tmp_path, tree, detections)
    assert found.without_ground_truth() == ["dog"]
    assert np.isnan(found.ap50[3])
    assert found.per_class()["dog"] == {"ap50": None, "ap": None}
    summary = found.summary()
    assert summary["ap50"]["novel"] == pytest.approx(plain_ap(tree, detections, ("ant",))[0], abs=1e-9)
    assert summary["ap50"]["all"] == pytest.approx(plain_ap(tree, detections, PROTOCOL.names)[0], abs=1e-9)


def test_a_group_without_ground_truth_has_no_mean(tmp_path: Path) -> None:
    tree, detections = world(6)
    tree["annotations"] = [a for a in tree["annotations"] if a["category_id"] not in (IDS["dog"], IDS["ant"])]
    summary = compute(tmp_path, tree, detections).summary()
    assert summary["ap50"]["novel"] is None
    assert summary["ap50"]["all"] == pytest.approx(summary["ap50"]["base"])


@EVERY_ENGINE
def test_no_detections_at_all(tmp_path: Path, engine: Engine) -> None:
    tree, _ = world(7, without="cat")
    found = compute(tmp_path, tree, [], engine=engine)
    assert found.ap50.tolist() == pytest.approx([0, float("nan"), 0, 0, 0], nan_ok=True)
    assert found.summary()["ap50"] == {"novel": 0.0, "base": 0.0, "all": 0.0}


def test_detections_of_one_class_alone(tmp_path: Path) -> None:
    tree, detections = world(8)
    some = [d for d in detections if d["category_id"] == IDS["bus"]]
    found = compute(tmp_path, tree, some)
    assert found.ap50[2] == pytest.approx(plain_ap(tree, some, ("bus",))[0], abs=1e-9)
    assert found.ap50[[0, 1, 3, 4]].tolist() == [0, 0, 0, 0]


def cat(number: int, image_id: int) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image_id,
        "category_id": IDS["cat"],
        "bbox": [10, 10, 50, 40],
        "area": 2000,
        "iscrowd": 0,
    }


@EVERY_ENGINE
@pytest.mark.parametrize("ids", [[0, 1], [1, 2]])
def test_perfect_detections_score_100_also_for_annotation_id_0(tmp_path: Path, ids: list[int], engine: Engine) -> None:
    tree, _ = world(0)
    tree["annotations"] = [cat(number, 1 + k) for k, number in enumerate(ids)]
    detections = [
        {"image_id": 1 + k, "category_id": IDS["cat"], "bbox": [10, 10, 50, 40], "score": 0.9} for k in range(2)
    ]
    found = compute(tmp_path, tree, detections, engine=engine)
    assert found.ap50[1] == pytest.approx(100.0)
    assert found.ap[1] == pytest.approx(100.0)


@EVERY_ENGINE
def test_by_hand(tmp_path: Path, engine: Engine) -> None:
    """Two cats: a hit, a miss above it, and one cat never found: precision 1/2 up to recall 1/2."""
    tree, _ = world(0)
    tree["annotations"] = [cat(1, 1), cat(2, 2)]
    detections = [
        {"image_id": 3, "category_id": IDS["cat"], "bbox": [10, 10, 50, 40], "score": 0.9},
        {"image_id": 1, "category_id": IDS["cat"], "bbox": [10, 10, 50, 30], "score": 0.8},
    ]  # IoU 0.75
    found = compute(tmp_path, tree, detections, engine=engine)
    assert found.ap50[1] == pytest.approx(100 * 51 / 101 / 2)  # 51 of 101 recall points
    assert found.ap[1] == pytest.approx(100 * 51 / 101 / 2 * 6 / 10)  # IoU 0.50 to 0.75


@EVERY_ENGINE
def test_only_the_images_asked_for_count(tmp_path: Path, engine: Engine) -> None:
    tree, detections = world(9)
    some = [0, 2, 5, 6]
    kept = [d for d in detections if d["image_id"] in some]
    found = compute(tmp_path, tree, kept, some, engine=engine)
    for label, name in enumerate(PROTOCOL.names):
        assert found.ap50[label] == pytest.approx(plain_ap(tree, kept, (name,), some)[0], abs=1e-9, nan_ok=True)


def test_iscrowd_and_area_may_be_absent(tmp_path: Path) -> None:
    tree, detections = world(10)
    for a in tree["annotations"]:
        a["iscrowd"] = 0
    expected = compute(tmp_path, tree, detections)
    for a in tree["annotations"]:
        del a["iscrowd"], a["area"]
    np.testing.assert_allclose(compute(tmp_path, tree, detections).ap50, expected.ap50, atol=1e-9)


def test_the_detections_given_are_left_as_they_are(tmp_path: Path) -> None:
    tree, detections = world(11)
    before = copy.deepcopy(detections)
    compute(tmp_path, tree, detections)
    assert detections == before


@EVERY_ENGINE
def test_more_than_100_detections_an_image_count_up_to_the_protocols_maximum(tmp_path: Path, engine: Engine) -> None:
    tree, _ = world(0)
    tree["annotations"] = [cat(1, 1)]
    misses = [
        {"image_id": 1, "category_id": IDS["cat"], "bbox": [100, 100, 20, 20], "score": 0.9 - k * 1e-3}
        for k in range(120)
    ]
    detections = [*misses, {"image_id": 1, "category_id": IDS["cat"], "bbox": [10, 10, 50, 40], "score": 0.1}]
    assert compute(tmp_path, tree, detections, engine=engine).ap50[1] == pytest.approx(100 / 121)
    narrow = Protocol("mine", PROTOCOL.base, PROTOCOL.novel, max_detections=(10, 50, 100))
    assert compute(tmp_path, tree, detections, protocol=narrow, engine=engine).ap50[1] == 0.0


@pytest.mark.parametrize(
    "bbox", [[10, 10, 0, 20], [10, 10, -5, 5], [float("nan"), 1, 5, 5], [500, 10, 20, 20], None, [1, 2, 3]]
)
def test_a_box_that_the_split_leaves_out_is_no_ground_truth(tmp_path: Path, bbox: Any) -> None:
    """`load_split` says that it skips these: AP must not count one as an object that was missed."""
    tree, detections = world(12)
    expected = compute(tmp_path, tree, detections)
    tree["annotations"].append(
        {"id": 999, "image_id": 3, "category_id": IDS["cat"], "bbox": bbox, "area": 100.0, "iscrowd": 0}
    )
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(tree))
    split = load_split(file, tmp_path, PROTOCOL, base_only=False)
    assert [999] in split.skips.by_reason.values()
    np.testing.assert_allclose(compute(tmp_path, tree, detections).ap50, expected.ap50, atol=1e-9)


# --- the truth read once, and the engines ---


def _check_same(found: AveragePrecision, expected: AveragePrecision, atol: float) -> None:
    """Of every class, and of the three groups."""
    for key in ("ap50", "ap"):
        np.testing.assert_allclose(
            getattr(found, key), getattr(expected, key), rtol=0, atol=atol
        )  # NaN where both have none
        groups, wanted = found.summary()[key], expected.summary()[key]
        assert groups == {group: pytest.approx(wanted[group], abs=atol, rel=0) for group in ("novel", "base", "all")}


@pytest.mark.parametrize("seed", range(20, 40))
def test_engines_agree(tmp_path: Path, seed: int) -> None:
    """Crowds and an annotation id 0 are in every world; here also equal scores, images without detections or without
    objects, and classes without ground truth or without detections.
    """
    rng = np.random.default_rng(seed)
    tree, detections = world(seed, without=str(rng.choice(PROTOCOL.names)) if seed % 2 else None)
    bare, unseen = rng.choice([i["id"] for i in tree["images"]], 2, replace=False)
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] != bare]
    silent = IDS[str(rng.choice(PROTOCOL.names))] if seed % 3 == 0 else None
    detections = [
        d | {"score": round(d["score"], 1)}
        for d in detections
        if d["image_id"] != unseen and d["category_id"] != silent
    ]
    rng.shuffle(detections)  # type: ignore[arg-type]
    expected = compute(tmp_path, tree, detections)
    _check_same(compute(tmp_path, tree, detections, engine=Engine.FASTER), expected, 1e-6)
    assert len(set(expected.ap[~np.isnan(expected.ap)].tolist())) >= 3  # not a comparison of zeros
    assert any(a["iscrowd"] for a in tree["annotations"])


@EVERY_ENGINE
def test_a_truth_serves_many_sets_of_detections(tmp_path: Path, engine: Engine) -> None:
    tree, detections = world(13)
    fresh = [compute(tmp_path, tree, some, engine=engine) for some in (detections, detections[::3], [])]
    truth = GroundTruth(tmp_path / "instances.json", COCO_IDS, [i["id"] for i in tree["images"]], PROTOCOL, engine)
    (tmp_path / "instances.json").unlink()  # it is not read again
    for expected, some in zip([*fresh, fresh[0]], (detections, detections[::3], [], detections), strict=True):
        _check_same(truth.average_precision(some), expected, 0.0)
    assert fresh[0].summary() != fresh[1].summary()


@EVERY_ENGINE
def test_detections_of_an_unknown_image(tmp_path: Path, engine: Engine) -> None:
    tree, detections = world(14)
    with pytest.raises(HdovdError, match=r"does not hold.*77.*another split"):
        compute(tmp_path, tree, [*detections, detections[0] | {"image_id": 77}], engine=engine)


def test_an_engine_that_is_not_installed_says_how_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert require(Engine.FASTER)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    tree, detections = world(15)
    with pytest.raises(HdovdError, match=r"faster-coco-eval.*pip install 'hdovd\[fast-eval\]'.*pycocotools"):
        compute(tmp_path, tree, detections, engine=Engine.FASTER)
    compute(tmp_path, tree, detections)  # the reference needs it not
