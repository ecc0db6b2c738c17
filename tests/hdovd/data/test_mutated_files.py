"""Files changed at random: an error of a line, or what a plain, strict reader makes of them."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from mutations import mutated

from hdovd.core import HdovdError
from hdovd.data import Protocol, load_split, parse_protocol, read_instances
from hdovd.evaluation.coco import GroundTruth
from hdovd.pipelines.nouns.allowed import read_captions, read_noun_file
from hdovd.pipelines.proposal_files.file import read_table

FACTOR = int(os.environ.get("HDOVD_FUZZ", "1"))  # times as many files
PROTOCOL = Protocol("mine", ("zebra", "cat"), ("dog",))
INSTANCES = {
    "images": [{"id": k, "file_name": f"{k}.jpg", "width": 100, "height": 80} for k in (1, 2, 3)],
    "annotations": [
        {
            "id": k,
            "image_id": image,
            "category_id": category,
            "bbox": [10, 20, 30.5, 40],
            "iscrowd": crowd,
            "area": 9.5,
            "segmentation": [[10, 20, 40, 20, 40, 60]],
        }
        for k, (image, category, crowd) in enumerate([(1, 7, 0), (1, 2, 0), (2, 90, 1), (3, 7, 0)], start=1)
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 90, "name": "zebra"}],
}
PROPOSALS = [{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}, {"image_id": 2, "bbox": [1, 2.5, 3, 4], "score": 1}]
CAPTIONS = {
    "images": [{"id": 1}, {"id": 2}],
    "annotations": [{"image_id": 1, "caption": "A dog."}, {"image_id": 2, "caption": "A cat."}],
}
NOUNS = {"format": "hdovd nouns", "version": 1, "vocabulary": ["cat", "hot dog"], "images": {"1": [0, 1], "2": []}}


def _strict(value: Any) -> int:
    assert type(value) in (int, float)
    assert value == int(value)
    return int(value)


def _reference(tree: Any, base_only: bool) -> dict[int, list[tuple[int, int, list[float]]]]:
    """Image id -> (annotation id, label, box) in the file's order, for files that are known to be sound."""
    labels = {
        _strict(c["id"]): PROTOCOL.names.index(c["name"]) for c in tree["categories"] if c["name"] in PROTOCOL.names
    }
    sizes = {_strict(i["id"]): (_strict(i["width"]), _strict(i["height"])) for i in tree["images"]}
    found: dict[int, list[tuple[int, int, list[float]]]] = {}
    for a in tree["annotations"]:
        label = labels.get(_strict(a["category_id"]), -1)
        box = (
            [10, 20, 30, 40]
            if a.get("bbox") is None and a.get("segmentation") == [[10, 20, 40, 20, 40, 60]]
            else a.get("bbox")
        )
        if label < 0 or (base_only and (label >= len(PROTOCOL.base) or a.get("iscrowd"))):
            continue
        if (
            not isinstance(box, list)
            or len(box) != 4
            or not all(type(v) in (int, float) and abs(v) <= 1e308 for v in box)
        ):
            continue
        (x, y, w, h), (width, height) = box, sizes[_strict(a["image_id"])]
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if w > 0 and h > 0 and right > left and bottom > top:
            found.setdefault(_strict(a["image_id"]), []).append((_strict(a["id"]), label, [left, top, right, bottom]))
    return found


@pytest.mark.parametrize("base_only", [True, False])
def test_instances(tmp_path: Path, base_only: bool) -> None:
    file, read, refused = tmp_path / "i.json", 0, list[str]()
    for seed in range(250 * FACTOR):
        tree = mutated(INSTANCES, seed, 1 + seed % 2)
        file.write_text(json.dumps(tree))
        try:
            split = load_split(file, tmp_path, PROTOCOL, base_only=base_only)
        except HdovdError as error:
            refused.append(str(error))
            continue
        read += 1
        found = {
            i.id: list(zip(i.annotation_ids.tolist(), i.labels.tolist(), i.boxes.tolist(), strict=True))
            for i in split.images
        }
        expected = _reference(tree, base_only)
        assert found == {i: rows for i, rows in expected.items() if i in found}, seed
        small = {i for i, size in ((i["id"], (i["width"], i["height"])) for i in tree["images"]) if min(size) < 32}
        assert expected.keys() - found.keys() <= (small if base_only else set()), seed
        GroundTruth(file, split.coco_ids, [i.id for i in split.images], PROTOCOL)
        truth = read_instances(file, tmp_path)
        assert truth.ids.tolist() == [int(a["id"]) for a in tree["annotations"]]
    assert min(read, len(refused)) > 50
    assert max(map(len, refused)) < 700


def test_proposals_captions_nouns_and_protocols(tmp_path: Path) -> None:
    file, refused = tmp_path / "f.json", list[str]()
    for seed in range(120 * FACTOR):
        changes = 1 + seed % 2
        for tree, read in (
            (PROPOSALS, read_table),
            (CAPTIONS, lambda file: [*read_captions(file, set())]),
            (NOUNS, read_noun_file),
        ):
            changed = mutated(tree, seed, changes)
            file.write_text(json.dumps(changed))
            try:
                found: Any = read(file)
            except HdovdError as error:
                refused.append(str(error))
                continue
            if tree is PROPOSALS:
                assert found.image_id.tolist() == [_strict(entry["image_id"]) for entry in changed], seed
                for entry, score in zip(changed, found.score.tolist(), strict=True):
                    plain = type(entry["score"]) in (int, float) and abs(entry["score"]) < 1e308
                    assert score == entry["score"] if plain else not math.isfinite(score), seed
        try:
            parse_protocol(mutated(PROTOCOL.to_dict(), seed, changes))
        except HdovdError as error:
            refused.append(str(error))
    assert len(refused) > 80
    assert max(map(len, refused)) < 700
