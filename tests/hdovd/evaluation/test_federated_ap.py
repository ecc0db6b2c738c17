"""AP of federated annotations (LVIS) through hdovd against the package `lvis`, by both engines; and the analyses that
are counted from the same matching.
"""

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdovd.core import HdovdError
from hdovd.data import Protocol, parse_protocol
from hdovd.evaluation import Engine
from hdovd.evaluation.coco import AveragePrecision, GroundTruth, found_of
from hdovd.evaluation.matching import Verdict, confusion, find_overlaps, match, precision_curves
from hdovd.evaluation.tide import break_down

NAMES = ("zebra", "cat", "bus", "tram", "dog", "ant")
IDS = {"zebra": 90, "cat": 7, "bus": 41, "tram": 3, "dog": 2, "ant": 18}
COCO_IDS = tuple(IDS[name] for name in NAMES)
FREQUENCY = {"zebra": "f", "cat": "c", "bus": "f", "tram": "c", "dog": "r", "ant": "r"}
PROTOCOL = Protocol(
    "federated",
    NAMES[:4],
    NAMES[4:],
    keep_empty_val=True,
    max_detections=(20,),
    federated=True,
    metric="ap",
    groups={group: tuple(n for n in NAMES if FREQUENCY[n] == group) for group in "rcf"},
)
EVERY_ENGINE = pytest.mark.parametrize("engine", list(Engine))
Tree = dict[str, Any]


def world(seed: int, *, without: str | None = None, images: int = 12) -> tuple[Tree, list[dict[str, Any]]]:
    """Annotations as LVIS has them, and more detections of an image than its cap: near objects and elsewhere, of all
    classes.
    """
    rng = np.random.default_rng(seed)
    entries, annotations, detections = list[Tree](), list[Tree](), list[Tree]()
    for number in rng.permutation(images).tolist():
        kinds = rng.permutation(NAMES).tolist()
        there, absent, unknown = kinds[:3], kinds[3:4], kinds[4:]
        entries.append(
            {
                "id": number,
                "coco_url": f"http://images.invalid/val2017/{number:012d}.jpg",
                "width": 200,
                "height": 150,
                "neg_category_ids": [IDS[name] for name in absent],
                "not_exhaustive_category_ids": [IDS[name] for name in there[:1]],
            }
        )
        for name in [*there, *there, *unknown]:
            for _ in range(int(rng.integers(0, 4))):
                x, y, w, h = (float(v) for v in (*rng.uniform(0, 100, 2), *rng.uniform(10, 50, 2)))
                if name in there and name != without:
                    annotations.append(
                        {
                            "id": len(annotations),
                            "image_id": number,
                            "category_id": IDS[name],
                            "bbox": [x, y, w, h],
                            "area": w * h * 0.7,
                            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                        }
                    )
                box = np.array([x, y, w, h]) + rng.normal(0, 3, 4)
                detections.append(detection(number, name, box, rng))
        for name in rng.choice(NAMES, 15).tolist():
            detections.append(detection(number, name, np.r_[rng.uniform(0, 100, 2), rng.uniform(10, 50, 2)], rng))
    categories = [{"id": IDS[n], "name": n, "frequency": FREQUENCY[n], "synset": n} for n in NAMES]
    return {"images": entries, "annotations": annotations, "categories": categories}, detections


def detection(image_id: int, name: str, box: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    score = round(float(rng.random()), 2)  # some are equal
    return {"image_id": image_id, "category_id": IDS[name], "score": score, "bbox": [float(v) for v in box]}


def truth_of(folder: Path, tree: Tree, engine: str = Engine.PYCOCOTOOLS, protocol: Protocol = PROTOCOL) -> GroundTruth:
    file = folder / "lvis.json"
    file.write_text(json.dumps(tree))
    return GroundTruth(file, COCO_IDS, [image["id"] for image in tree["images"]], protocol, engine)


def lvis_ap(folder: Path, tree: Tree, detections: list[dict[str, Any]]) -> tuple[np.ndarray, dict[str, float]]:
    """(IoU, recall, class) precision by ascending category id, and the summary, of LVIS's own package."""
    from lvis import LVIS, LVISEval, LVISResults

    tree, file = copy.deepcopy(tree), folder / "theirs.json"
    for annotation in tree["annotations"]:
        annotation["id"] += 1  # 0 is "unmatched" to it, too
    file.write_text(json.dumps(tree))
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patched:
        patched.setitem(vars(np), "float", float)  # which the package still calls by numpy's old name
        truth = LVIS(str(file))
        results = LVISResults(truth, copy.deepcopy(detections), max_dets=max(PROTOCOL.max_detections))
        evaluation = LVISEval(truth, results, "bbox")
        evaluation.run()
    return evaluation.eval["precision"][:, :, :, 0], dict(evaluation.get_results())


@EVERY_ENGINE
@pytest.mark.parametrize("seed", range(5))
def test_ap_is_that_of_the_lvis_package(tmp_path: Path, seed: int, engine: str) -> None:
    tree, detections = world(seed, without="dog" if seed == 3 else None)
    ap = truth_of(tmp_path, tree, engine).average_precision(detections)
    precision, summary = lvis_ap(tmp_path, tree, detections)
    order = np.argsort(np.argsort(COCO_IDS))  # of its classes, which are sorted by category id
    theirs = np.where(precision < 0, np.nan, precision)[:, :, order]
    np.testing.assert_allclose(ap.ap, theirs.mean(axis=(0, 1)) * 100, atol=1e-9, rtol=0)
    np.testing.assert_allclose(ap.ap50, theirs[0].mean(axis=0) * 100, atol=1e-9, rtol=0)
    groups = ap.summary()["ap"]
    for group, name in (("r", "APr"), ("c", "APc"), ("f", "APf"), ("all", "AP"), ("novel", "APr")):
        assert groups[group] == pytest.approx(summary[name] * 100, abs=1e-9)
    assert np.isnan(ap.ap[NAMES.index("dog")]) == (seed == 3)
    assert len({round(value, 6) for value in ap.ap.tolist()}) > 3  # else a mixed-up order could hide


def test_the_rules_of_federated_annotations_change_what_is_counted(tmp_path: Path) -> None:
    """Each of them, or the comparison above would say nothing of it."""
    tree, detections = world(1)

    def ap(tree: Tree, most: int = 20) -> AveragePrecision:
        protocol = Protocol("p", NAMES, (), keep_empty_val=True, max_detections=(most,), federated=True)
        return truth_of(tmp_path, tree, protocol=protocol).average_precision(detections)

    def images_with(**values: Any) -> Tree:
        return tree | {"images": [image | values for image in tree["images"]]}

    whole = ap(tree).ap
    for other in (
        ap(tree, most=1000).ap,
        ap(images_with(neg_category_ids=[])).ap,
        ap(images_with(not_exhaustive_category_ids=[])).ap,
        ap(images_with(neg_category_ids=list(COCO_IDS))).ap,
    ):
        assert not np.allclose(whole, other)


@pytest.mark.parametrize("seed", range(3))
def test_curves_errors_and_verdicts_are_of_the_detections_that_ap_counts(tmp_path: Path, seed: int) -> None:
    tree, detections = world(seed)
    truth = truth_of(tmp_path, tree)
    ap = truth.average_precision(detections)
    found = found_of(detections, COCO_IDS)
    overlaps = find_overlaps(found, truth.objects)
    matching = match(found, truth.objects, overlaps, max(PROTOCOL.max_detections))
    np.testing.assert_allclose(precision_curves(found, truth.objects, matching, PROTOCOL).ap50(), ap.ap50, atol=1e-9)
    errors = break_down(found, truth.objects, PROTOCOL)
    assert errors.groups["r"].ap50 == pytest.approx(ap.summary()["ap50"]["r"])
    assert errors.groups["r"].counts == errors.groups["novel"].counts
    judged = {image["id"]: set(image["neg_category_ids"]) for image in tree["images"]}
    for annotation in tree["annotations"]:
        judged[annotation["image_id"]].add(annotation["category_id"])
    for one, verdict in zip(detections, matching.verdict.tolist(), strict=True):
        if one["category_id"] not in judged[one["image_id"]]:
            assert verdict == Verdict.IGNORED
    shown = confusion(found, truth.objects, overlaps, PROTOCOL, 0.0)
    assert shown.counts[:-1].sum() == len(tree["annotations"])
    assert shown.counts[:, :-1].sum() < len(detections)


def test_a_cocos_file_is_no_federated_one(tmp_path: Path) -> None:
    tree, _ = world(0)
    tree["images"] = [{k: v for k, v in image.items() if "category_ids" not in k} for image in tree["images"]]
    with pytest.raises(HdovdError, match=r"lvis\.json: image 0 has no neg_category_ids.*protocol federated"):
        truth_of(tmp_path, tree)


@pytest.mark.parametrize("ids", [[90, 5], ["90"], 90, None])
def test_lists_of_categories_are_checked(tmp_path: Path, ids: Any) -> None:
    tree, _ = world(0)
    tree["images"][0]["neg_category_ids"] = ids
    with pytest.raises(HdovdError, match=r"lvis\.json: image \d+: neg_category_ids is .*expected a list of ids"):
        truth_of(tmp_path, tree)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"r": ["dog", "cow"]}, "groups: r holds .*cow.*neither base nor novel"),
        ({"novel": ["dog"]}, "every protocol has a group 'novel' already"),
        ({"r": []}, "groups.r is a list: .*at least 1"),
        ({"r": ["dog", "dog"]}, "groups: r names a class twice"),
        (["dog"], "groups is a list: "),
    ],
)
def test_groups_of_a_protocol_are_checked(groups: Any, words: str) -> None:
    with pytest.raises(HdovdError, match=words):
        parse_protocol({"name": "mine", "base": ["cat"], "novel": ["dog"], "groups": groups})
    with pytest.raises(HdovdError, match=r"metric is the text 'AP': .*ap50.* or 'ap'"):
        parse_protocol({"name": "mine", "base": ["cat"], "novel": ["dog"], "metric": "AP"})
    with pytest.raises(HdovdError, match="metric is a list: "):
        parse_protocol({"name": "mine", "base": ["cat"], "novel": ["dog"], "metric": ["ap"]})


def test_a_protocol_is_the_same_after_its_plain_values() -> None:
    assert parse_protocol(PROTOCOL.to_dict()) == PROTOCOL
    assert set(Protocol("mine", ("cat",), ("dog",)).to_dict()) == {
        "name",
        "base",
        "novel",
        "min_image_side_px",
        "max_detections",
    }
