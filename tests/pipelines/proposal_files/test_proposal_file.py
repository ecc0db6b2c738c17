"""Proposal files: COCO results JSON, written and read back."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from hdovd.core import HdovdError
from hdovd.data import ImageBoxes, Skips
from hdovd.data.coco import clip_box
from hdovd.pipelines.proposal_files.file import Proposals, read_table, usable_proposals, write_proposals


def read_proposals(path: Path, images: list[ImageBoxes], skips: Skips) -> dict[int, Proposals]:
    return usable_proposals(read_table(path), path, images, skips)


def _image(image_id: int) -> ImageBoxes:
    return ImageBoxes(
        image_id,
        f"{image_id}.jpg",
        200,
        100,
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.int64),
        np.zeros(0, np.int64),
    )


def _proposals(rng: np.random.Generator, count: int) -> Proposals:
    corner = rng.uniform(0, 40, (count, 2))
    return Proposals(
        np.concatenate([corner, corner + rng.uniform(1, 55, (count, 2))], 1).astype(np.float32),
        rng.uniform(0, 1, count).astype(np.float32),
    )


def test_written_then_read_is_the_same_sorted_best_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    written = {7: _proposals(rng, 5), 3: _proposals(rng, 1), 9: _proposals(rng, 0)}
    skips = Skips()
    assert write_proposals(tmp_path / "new folder" / "p.json", written) == 6
    read = read_proposals(tmp_path / "new folder" / "p.json", [_image(i) for i in (3, 7, 9)], skips)
    assert read.keys() == {3, 7}
    assert skips.lines() == []
    for image_id, found in read.items():
        order = np.argsort(-written[image_id].scores)
        np.testing.assert_allclose(found.boxes, written[image_id].boxes[order], atol=0.011)
        np.testing.assert_allclose(found.scores, written[image_id].scores[order], atol=1e-5)
        assert (np.diff(found.scores) <= 0).all()
        assert found.boxes.dtype == found.scores.dtype == np.float32
    assert [p.name for p in (tmp_path / "new folder").iterdir()] == ["p.json"]


def test_file_is_coco_results_form(tmp_path: Path) -> None:
    write_proposals(
        tmp_path / "p.json", {4: Proposals(np.array([[10, 20, 40, 25]], np.float32), np.array([0.5], np.float32))}
    )
    assert json.loads((tmp_path / "p.json").read_text()) == [{"image_id": 4, "bbox": [10, 20, 30, 5], "score": 0.5}]


def test_equal_scores_keep_the_files_order(tmp_path: Path) -> None:
    entries = [{"image_id": 1, "bbox": [k, 0, 10, 10], "score": 1} for k in range(20)]
    (tmp_path / "p.json").write_text(json.dumps(entries))
    assert read_proposals(tmp_path / "p.json", [_image(1)], Skips())[1].boxes[:, 0].tolist() == list(range(20))


def test_the_order_is_that_of_the_written_scores_where_float32_makes_them_equal(tmp_path: Path) -> None:
    entries = [{"image_id": 1, "bbox": [k, 0, 10, 10], "score": 0.5 + (k * 7 % 20) * 1e-12} for k in range(20)]
    (tmp_path / "p.json").write_text(json.dumps(entries))
    found = read_proposals(tmp_path / "p.json", [_image(1)], Skips())[1]
    assert found.boxes[:, 0].tolist() == sorted(range(20), key=lambda k: -(k * 7 % 20))
    assert found.scores.tolist() == [0.5] * 20


def test_images_may_be_mixed_in_the_file(tmp_path: Path) -> None:
    """Against a plain reading of the file."""
    rng = np.random.default_rng(0)
    entries = [
        {
            "image_id": int(rng.integers(5, 30)),
            "bbox": rng.uniform(0, 90, 4).round(3).tolist(),
            "score": float(rng.integers(9)) / 8,
        }
        for _ in range(1000)
    ]
    (tmp_path / "p.json").write_text(json.dumps(entries))
    read = read_proposals(tmp_path / "p.json", [_image(i) for i in range(40)], Skips())
    assert list(read) == list(dict.fromkeys(e["image_id"] for e in entries))
    for image_id, found in read.items():
        wanted = sorted((e for e in entries if e["image_id"] == image_id), key=lambda e: -e["score"])
        assert found.boxes.tolist() == [clip_box(e["bbox"], 200, 100)[0] for e in wanted]
        assert found.scores.tolist() == [e["score"] for e in wanted]


def test_box_over_the_edge_is_cut_to_the_image(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('[{"image_id": 1, "bbox": [-5, 90, 300, 30.5], "score": 1}]')
    assert read_proposals(tmp_path / "p.json", [_image(1)], Skips())[1].boxes.tolist() == [[0, 90, 200, 100]]


def test_bad_entries_are_skipped_with_reason_and_number(tmp_path: Path) -> None:
    good = {"image_id": 1, "bbox": [1, 1, 9, 9], "score": 0.5}
    entries = [
        good,
        good | {"bbox": [1, 1, -9, 9]},
        good | {"image_id": 2},
        good | {"bbox": [1, 1, 9, float("nan")]},
        good | {"score": float("inf")},
        good | {"bbox": [1, 1, 9, 0]},
        good | {"bbox": [1, 1, -2, 9]},
    ]
    (tmp_path / "p.json").write_text(json.dumps(entries))
    skips = Skips()
    read = read_proposals(tmp_path / "p.json", [_image(1)], skips)
    assert len(read[1].boxes) == 1
    by_word = {
        word: ids
        for reason, ids in skips.by_reason.items()
        for word in ("inverted", "not in", "not finite", "score is", "no area")
        if word in reason
    }
    assert by_word == {"inverted": [1, 6], "not in": [2], "not finite": [3], "score is": [4], "no area": [5]}


def test_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text("old")
    broken = Proposals(np.zeros((2, 4), np.float32), np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="shape"):
        write_proposals(tmp_path / "p.json", {1: broken})
    assert (tmp_path / "p.json").read_text() == "old"


def test_empty_file_is_an_error(tmp_path: Path) -> None:
    write_proposals(tmp_path / "p.json", {1: _proposals(np.random.default_rng(0), 0)})
    with pytest.raises(HdovdError, match="no proposals"):
        read_proposals(tmp_path / "p.json", [_image(1)], Skips())


GOOD = {"image_id": 1, "bbox": [1, 1, 9, 9], "score": 0.5}


@pytest.mark.parametrize(
    "tree",
    [
        {},
        3,
        None,
        GOOD,
        {"annotations": [GOOD]},
        [[]],
        [GOOD, 3],
        *([GOOD, {k: v for k, v in GOOD.items() if k != key}] for key in GOOD),
    ],
)
def test_a_file_of_another_form(tmp_path: Path, tree: object) -> None:
    (tmp_path / "p.json").write_text(json.dumps(tree))
    with pytest.raises(
        HdovdError, match=r"p\.json is no proposal file: expected COCO results JSON, a list of \{image_id, bbox"
    ):
        read_proposals(tmp_path / "p.json", [_image(1)], Skips())


@pytest.mark.parametrize(
    ("image_id", "found"),
    [
        ("1", "the text '1', expected a whole number: write it without quotes"),
        (None, "null"),
        (True, "true"),
        (1.5, "1.5"),
        ([1], "a list"),
        (float("nan"), "nan"),
        (1 << 63, "9223372036854775808"),
        (10**400, "a number of more than 64 bits"),
    ],
)
def test_an_image_id_that_is_no_whole_number(tmp_path: Path, image_id: object, found: str) -> None:
    (tmp_path / "p.json").write_text(json.dumps([GOOD, GOOD | {"image_id": image_id}]))
    with pytest.raises(HdovdError, match=rf"p\.json: entry 1: image_id is {found}"):
        read_proposals(tmp_path / "p.json", [_image(1)], Skips())


def test_a_whole_float_is_an_image_id_and_no_bool_is_a_number(tmp_path: Path) -> None:
    entries = [
        GOOD,
        GOOD | {"image_id": 1.0},
        GOOD | {"score": True},
        GOOD | {"bbox": [1, 1, True, 9]},
        GOOD | {"score": "0.9"},
    ]
    (tmp_path / "p.json").write_text(json.dumps(entries))
    skips = Skips()
    assert len(read_proposals(tmp_path / "p.json", [_image(1)], skips)[1].boxes) == 2
    assert sorted(skips.by_reason.values()) == [[2, 4], [3]]


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps([GOOD] * 3)[:-1])
    with pytest.raises(HdovdError, match=r"proposals .*p\.json is not valid JSON .*is the download complete"):
        read_proposals(tmp_path / "p.json", [_image(1)], Skips())


def test_no_proposal_fits_the_images(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps([GOOD, GOOD | {"image_id": 7}]))
    with pytest.raises(
        HdovdError,
        match=r"(?s)no usable proposal for the 1 training images \(ids 2\).*skipped 2: .*not in the training",
    ):
        read_proposals(tmp_path / "p.json", [_image(2)], Skips())


def test_memory_is_that_of_the_boxes(tmp_path: Path) -> None:
    with (tmp_path / "p.json").open("w") as file:
        file.write(
            "["
            + ",\n".join(json.dumps(GOOD | {"image_id": k // 100, "score": k / 50_000}) for k in range(50_000))
            + "]"
        )
    images = [_image(k) for k in range(500)]
    tracemalloc.start()
    try:
        read = read_proposals(tmp_path / "p.json", images, Skips())
        assert (
            tracemalloc.get_traced_memory()[1] < 6_000_000
        )  # arrays of 1.2 MB and some blocks of 1 MiB; lists take 20 MB
    finally:
        tracemalloc.stop()
    assert sum(len(found.scores) for found in read.values()) == 50_000
