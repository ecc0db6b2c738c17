"""Proposal files of every form: one identity, what made them, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdovd.cache import Catalog, Level
from hdovd.core import HdovdError, lines_to
from hdovd.pipelines.common.options import ListOrder
from hdovd.pipelines.proposal_files.file import (
    Proposals,
    ProposalTable,
    convert_proposals,
    info_lines,
    made_by_file,
    read_table,
    write_proposals,
)

MADE_BY = {"detector": "oln", "training_boxes": {"anchor": 3}}
SIZES = {9: (300, 200), 2: (50, 400), 5: (200, 200)}  # in the order of the annotation file, which is not that of ids


def _found(seed: int = 0) -> dict[int, Proposals]:
    """Boxes inside their images, with all the digits of float32."""
    rng = np.random.default_rng(seed)
    found = {}
    for image_id, size in SIZES.items():
        low = rng.uniform(0, 0.4, (4, 2)) * size
        high = low + rng.uniform(0.1, 0.5, (4, 2)) * size
        scores = np.sort(rng.uniform(size=4).astype(np.float32))[::-1]
        found[image_id] = Proposals(np.concatenate([low, high], 1).astype(np.float32), scores)
    return found


def _same(a: dict[int, Proposals], b: dict[int, Proposals]) -> None:
    assert a.keys() == b.keys()
    for image_id in a:
        np.testing.assert_array_equal(a[image_id].boxes, b[image_id].boxes)
        np.testing.assert_array_equal(a[image_id].scores, b[image_id].scores)


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    file = tmp_path / "instances.json"
    images = [{"id": i, "file_name": f"{i}.jpg", "width": w, "height": h} for i, (w, h) in SIZES.items()]
    file.write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    return file


def _pickled(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def _rows(found: Proposals) -> np.ndarray:
    return np.concatenate([found.boxes, found.scores[:, None]], 1)


# --- the same numbers in every form ---


def test_every_form_holds_the_same_numbers_and_identity(tmp_path: Path, annotations: Path) -> None:
    found = _found()
    write_proposals(tmp_path / "p.json", found)
    write_proposals(tmp_path / "p.npz", found)
    _pickled(tmp_path / "list.pkl", [_rows(found[i]) for i in SIZES])
    _pickled(
        tmp_path / "ids.pkl",
        {
            "ids": [str(i) for i in found],
            "boxes": [p.boxes for p in found.values()],
            "objectness_logits": [p.scores for p in found.values()],
            "bbox_mode": 0,
        },
    )
    expected = ProposalTable.of(found).identity()
    for name in ("p.json", "p.npz", "list.pkl", "ids.pkl"):
        table = read_table(tmp_path / name, annotations)
        _same(table.by_image(), found)
        assert table.identity() == expected


def test_numbers_that_have_no_short_decimals_come_back_from_json(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    low = np.exp(rng.uniform(-20, 9, (4000, 2)))
    boxes = np.concatenate([low, low + np.exp(rng.uniform(-20, 9, (4000, 2)))], 1).astype(np.float32)
    scores = np.sort(rng.normal(size=4000).astype(np.float32) * 7)[::-1]
    write_proposals(tmp_path / "p.json", {1: Proposals(boxes, scores)})
    _same(read_table(tmp_path / "p.json").by_image(), {1: Proposals(boxes, scores)})


def test_identity_knows_boxes_scores_and_images_but_no_order(tmp_path: Path) -> None:
    found = _found()
    table = ProposalTable.of(found)
    shuffled = np.random.default_rng(2).permutation(len(table.image_id))
    assert (
        ProposalTable(table.image_id[shuffled], table.box[shuffled], table.score[shuffled]).identity()
        == table.identity()
    )
    assert ProposalTable.of(dict(reversed(found.items()))).identity() == table.identity()
    assert (
        ProposalTable.of(found | {77: Proposals(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))}).identity()
        == table.identity()
    )
    box, score, image_id = table.box.copy(), table.score.copy(), table.image_id.copy()
    box[3, 2] = np.nextafter(box[3, 2], np.float32(1e9))
    score[5] = np.nextafter(score[5], np.float32(2))
    image_id[0] = 2
    others = [
        ProposalTable(table.image_id, box, table.score),
        ProposalTable(table.image_id, table.box, score),
        ProposalTable(image_id, table.box, table.score),
        ProposalTable(table.image_id[1:], table.box[1:], table.score[1:]),
    ]
    assert len({table.identity(), *(other.identity() for other in others)}) == 5


def test_converting_there_and_back_changes_nothing(tmp_path: Path, annotations: Path) -> None:
    source = _pickled(
        tmp_path / "list.pkl", [[_rows(p)] for p in _found().values()]
    )  # a detector of one class: a list of one
    lines: list[str] = []
    with lines_to(lines.append):
        identity = convert_proposals(source, tmp_path / "a.npz", annotations)
    assert any("in the order of its images" in line and "--order file" in line for line in lines)
    assert any(identity in line and "unknown" in line for line in lines)
    with lines_to(lines.append):
        assert convert_proposals(tmp_path / "a.npz", tmp_path / "b.json") == identity
    with lines_to(lines.append):
        assert convert_proposals(tmp_path / "b.json", tmp_path / "c.npz") == identity
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "c.npz").read_bytes()


def test_equal_float32_scores_keep_the_decimals_order_in_npz(tmp_path: Path) -> None:
    entries = [{"image_id": 1, "bbox": [k, 0, 10, 10], "score": 0.5 + (k * 7 % 20) * 1e-12} for k in range(20)]
    (tmp_path / "p.json").write_text(json.dumps(entries))
    convert_proposals(tmp_path / "p.json", tmp_path / "p.npz")
    assert read_table(tmp_path / "p.npz").by_image()[1].boxes[:, 0].tolist() == sorted(
        range(20), key=lambda k: -(k * 7 % 20)
    )


def test_npz_is_plain_numpy(tmp_path: Path) -> None:
    write_proposals(tmp_path / "p.npz", _found(), MADE_BY)
    with np.load(tmp_path / "p.npz", allow_pickle=False) as file:
        kinds = {name: file[name].dtype for name in ("image_id", "offset", "box", "score")}
        assert kinds == {"image_id": np.int64, "offset": np.int64, "box": np.float32, "score": np.float32}
        assert file["offset"].tolist() == [0, 4, 8, 12]
        assert json.loads(str(file["metadata"]))["made_by"] == MADE_BY


# --- what made them ---


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_made_by_is_kept_and_converted(tmp_path: Path, suffix: str) -> None:
    write_proposals(tmp_path / f"p.{suffix}", _found(), MADE_BY)
    assert read_table(tmp_path / f"p.{suffix}").made_by == MADE_BY
    for other in ("json", "npz"):
        convert_proposals(tmp_path / f"p.{suffix}", tmp_path / f"q.{other}")
        assert read_table(tmp_path / f"q.{other}").made_by == MADE_BY
    assert any(line.split() == ["detector", "oln"] for line in info_lines(tmp_path / f"p.{suffix}"))


def test_a_sidecar_of_other_proposals_is_noticed(tmp_path: Path) -> None:
    write_proposals(tmp_path / "p.json", _found(0), MADE_BY)
    write_proposals(tmp_path / "q.json", _found(1))
    (tmp_path / "q.json").rename(tmp_path / "p.json")
    table = read_table(tmp_path / "p.json")
    assert table.made_by is None
    assert any(
        "p.json.made_by.json" in note and ProposalTable.of(_found(0)).identity() in note and table.identity() in note
        for note in table.notes
    )


def test_writing_without_made_by_takes_an_old_sidecar_away(tmp_path: Path) -> None:
    write_proposals(tmp_path / "p.json", _found(), MADE_BY)
    assert made_by_file(tmp_path / "p.json").is_file()
    write_proposals(tmp_path / "p.json", _found())
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"identity": "a"}',
        '{"identity": "a", "made_by": 3}',
        "[" * 100_000,
        '{"identity": "a", "made_by": {"a": ["\\u001b[31m"]}}',
        '{"identity": "a", "made_by": {"\\u0007": 1}}',
    ],
    ids=lambda content: content[:40],
)
def test_a_damaged_sidecar_says_nothing(tmp_path: Path, content: str) -> None:
    write_proposals(tmp_path / "p.json", _found(), MADE_BY)
    made_by_file(tmp_path / "p.json").write_text(content)
    table = read_table(tmp_path / "p.json")
    assert table.made_by is None
    assert any("unknown" in note for note in table.notes)


@pytest.mark.parametrize("method", [14, 99])  # one whose data are damaged then, one that nobody knows
def test_npz_of_another_compression_is_damaged(tmp_path: Path, method: int) -> None:
    write_proposals(tmp_path / "p.npz", _found())
    data = bytearray((tmp_path / "p.npz").read_bytes())
    for head, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = -1
        while (at := data.find(head, at + 1)) >= 0:
            data[at + place : at + place + 2] = method.to_bytes(2, "little")
    (tmp_path / "p.npz").write_bytes(data)
    with pytest.raises(HdovdError, match=r"p\.npz is damaged .*is the download complete"):
        read_table(tmp_path / "p.npz")


def test_npz_whose_boxes_were_changed_keeps_no_made_by(tmp_path: Path) -> None:
    write_proposals(tmp_path / "p.npz", _found(), MADE_BY)
    with np.load(tmp_path / "p.npz") as file:
        columns = dict(file)
    columns["box"][0] += 1
    np.savez(tmp_path / "p.npz", **columns)
    table = read_table(tmp_path / "p.npz")
    assert table.made_by is None
    assert any("unknown" in note for note in table.notes)


# --- pickled lists ---


def test_a_list_by_image_id(tmp_path: Path, annotations: Path) -> None:
    source = _pickled(tmp_path / "p.pkl", [_rows(_found()[i]) for i in sorted(SIZES)])
    _same(read_table(source, annotations, ListOrder.ID).by_image(), _found())


def test_a_list_in_the_other_order_is_refused_by_the_image_sizes(tmp_path: Path, annotations: Path) -> None:
    source = _pickled(tmp_path / "p.pkl", [_rows(_found()[i]) for i in sorted(SIZES)])
    with pytest.raises(
        HdovdError, match=r"does not fit .*instances\.json in the order of its images: \d of 12 .*--order id --out"
    ):
        read_table(source, annotations)


def test_a_list_needs_its_annotation_file(tmp_path: Path, annotations: Path) -> None:
    source = _pickled(tmp_path / "p.pkl", [_rows(p) for p in _found().values()][:2])
    with pytest.raises(HdovdError, match=r"p\.pkl is a list of 2 arrays .*--annotations"):
        read_table(source)
    with pytest.raises(HdovdError, match=r"for 2 images, .*instances\.json lists 3"):
        read_table(source, annotations)


def test_boxes_without_scores_keep_the_lists_order(tmp_path: Path, annotations: Path) -> None:
    source = _pickled(tmp_path / "p.pkl", [p.boxes for p in _found().values()], 2)
    table = read_table(source, annotations)
    assert set(table.score.tolist()) == {1.0}
    for image_id, own in table.by_image().items():
        np.testing.assert_array_equal(own.boxes, _found()[image_id].boxes)


# --- Detectron2 ---


def test_old_keys_and_xywh(tmp_path: Path) -> None:
    boxes = np.array([[10, 20, 30, 5]], np.float32)
    source = _pickled(
        tmp_path / "p.pkl", {"indexes": np.array([7]), "boxes": [boxes], "scores": [np.array([-2.5])], "bbox_mode": 1}
    )
    found = read_table(source).by_image()[7]
    assert (found.boxes.tolist(), found.scores.tolist()) == ([[10, 20, 40, 25]], [-2.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox_mode": 2}, "bbox_mode is 2"),
        ({"bbox_mode": np.zeros(2)}, "bbox_mode is of type ndarray"),
        ({"ids": [7, 8]}, "2 ids"),
        ({"ids": ["a"]}, "one of ids is the text 'a', expected a whole number"),
        ({"ids": [7.5]}, "ids is 7.5"),
        ({"ids": [True]}, "ids is true"),
        ({"ids": [np.zeros(2)]}, "ids is of type ndarray"),
        ({"ids": ["9" * 30]}, "more than 64 bits"),
        ({"ids": [None]}, "ids is null"),
        ({"objectness_logits": ["0.5"]}, "image 7: objectness_logits are the text '0.5'"),
        ({"objectness_logits": [{}]}, "an object"),
        ({"objectness_logits": [[[1], [1, 2]]]}, "a list of something else than numbers"),
        ({"objectness_logits": 3}, "one entry an image"),
        ({"boxes": [np.zeros((2, 4))]}, "2 boxes"),
        ({"boxes": [np.zeros((1, 3))]}, r"expected \(n, 4\)"),
        ({"boxes": [[1, 2, 3, 4]]}, "found a list"),
        ({"ids": 3}, "one entry an image"),
    ],
)
def test_a_dict_that_does_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {"ids": [7], "boxes": [np.ones((1, 4), np.float32)], "objectness_logits": [np.zeros(1)]}
    with pytest.raises(HdovdError, match=rf"p\.pkl.*{message}"):
        read_table(_pickled(tmp_path / "p.pkl", good | change))


# --- what is refused ---


def test_a_pickle_never_runs(tmp_path: Path, annotations: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch '{tmp_path / 'ran'}'",)

    for name in ("p.pkl", "p.json"):  # by content, whatever the name says
        with pytest.raises(HdovdError, match="was not loaded"):
            read_table(_pickled(tmp_path / name, [Evil()]), annotations)
    assert not (tmp_path / "ran").exists()


def test_npz_of_pickled_objects_or_other_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", boxes=np.zeros(3))
    np.savez(tmp_path / "b.npz", image_id=np.array([{}]), offset=0, box=0, score=0, metadata=np.array("{}"))
    write_proposals(tmp_path / "c.npz", _found())
    (tmp_path / "c.npz").write_bytes((tmp_path / "c.npz").read_bytes()[:-80])
    for name, message in (("a", "lacks box, image_id"), ("b", "damaged|version"), ("c", "damaged")):
        with pytest.raises(HdovdError, match=rf"{name}\.npz.*({message})"):
            read_table(tmp_path / f"{name}.npz")


@pytest.mark.parametrize(
    "change",
    [
        {"offset": np.array([0, 4, 3, 12])},
        {"image_id": np.array([9, 9, 5])},
        {"score": np.zeros(3, np.float32)},
        {"box": np.zeros((12, 4))},
        {"offset": np.array([0, 4, 8, 11])},
    ],
)
def test_npz_arrays_that_do_not_fit_together(tmp_path: Path, change: dict[str, np.ndarray]) -> None:
    write_proposals(tmp_path / "p.npz", _found())
    with np.load(tmp_path / "p.npz") as file:
        columns = dict(file)
    np.savez(tmp_path / "p.npz", **(columns | change))
    with pytest.raises(HdovdError, match="do not fit together"):
        read_table(tmp_path / "p.npz")


def test_convert_says_where_it_cannot_write(tmp_path: Path) -> None:
    write_proposals(tmp_path / "p.json", _found())
    with pytest.raises(HdovdError, match=r"ends in \.json or \.npz"):
        convert_proposals(tmp_path / "p.json", tmp_path / "q.pkl")
    with pytest.raises(HdovdError, match="is the file to read"):
        convert_proposals(tmp_path / "p.json", tmp_path / "." / "p.json")


# --- in the cache ---


def test_the_set_says_what_made_its_proposals_and_no_key_depends_on_it(
    tmp_path: Path, copied_cache: Path, proposals: Path, extraction: Any
) -> None:
    from hdovd.pipelines.cache_tools.listing import info_lines as cache_info
    from hdovd.pipelines.extraction.extract_clip import extract_clip

    (tmp_path / "p.json").write_bytes(proposals.read_bytes())
    first = Catalog(copied_cache).sets()["default"]
    assert first.proposals["made_by"] is None
    assert first.proposals["identity"] == read_table(proposals).identity()
    convert_proposals(proposals, tmp_path / "plain.npz")
    write_proposals(tmp_path / "p.npz", read_table(tmp_path / "plain.npz").by_image(), MADE_BY)
    lines: list[str] = []
    with lines_to(lines.append):
        report = extract_clip(extraction(copied_cache, proposals=tmp_path / "p.npz"))
    assert set(report.levels.values()) == {"hit"}
    assert any(first.proposals["identity"] in line and "detector oln" in line for line in lines)
    now = Catalog(copied_cache).sets()["default"]
    assert (now.levels, now.proposals) == (
        first.levels,
        {"file": "p.npz", "identity": first.proposals["identity"], "made_by": MADE_BY},
    )
    shown = "\n".join(cache_info(Catalog(copied_cache), None))
    assert "training_boxes.anchor" in shown
    with lines_to(lines.append):
        extract_clip(extraction(copied_cache))  # the same boxes from a file that does not say it: nothing is forgotten
    assert Catalog(copied_cache).sets()["default"].proposals["made_by"] == MADE_BY
    assert now.levels[Level.BOXES] in {p.key for p in Catalog(copied_cache).products(Level.BOXES)}
