"""Proposals as a stage: class-agnostic boxes of training images, from base boxes alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.ops import box_iou

from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths
from hdovd.pipelines.demo.world import BASE
from hdovd.pipelines.proposal_files.file import made_by_file
from hdovd.pipelines.proposals.networks import made_by
from hdovd.pipelines.proposals.propose import Example, ProposeConfig, Selection, choose, propose


def _job(data: Path, out: Path, recipe: Recipe, **changes: object) -> ProposeConfig:
    return ProposeConfig(
        data=DataPaths(data), out=out, recipe=recipe, protocol=str(data / "protocol.toml"), device="cpu", **changes
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def proposed(world: Path, micro_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("proposed") / "p.json"
    propose(_job(world, out, micro_recipe(), top=6, overlap=0.5, min_side=10.0, min_score=0.0))
    return out


def test_file_keeps_its_promises(proposed: Path, world: Path, kept: list[int]) -> None:
    tree = json.loads((world / "annotations" / "instances_train2017.json").read_text())
    sizes = {i["id"]: (i["width"], i["height"]) for i in tree["images"]}
    base = {c["id"] for c in tree["categories"] if c["name"] in BASE}
    truth = {
        i: [
            (x, y, x + w, y + h)
            for a in tree["annotations"]
            if a["image_id"] == i and a["category_id"] in base
            for x, y, w, h in [a["bbox"]]
        ]
        for i in kept
    }
    entries = json.loads(proposed.read_text())
    assert {e["image_id"] for e in entries} <= set(kept)
    assert len(entries) > 2 * len(kept)
    for image_id in kept:
        found = [e for e in entries if e["image_id"] == image_id]
        assert len(found) <= 6
        scores = [e["score"] for e in found]
        assert scores == sorted(scores, reverse=True)
        boxes = torch.tensor([(x, y, x + w, y + h) for e in found for x, y, w, h in [e["bbox"]]]).reshape(-1, 4)
        assert ((boxes[:, 2:] - boxes[:, :2]) >= 10 - 0.02).all()
        assert (boxes[:, 2:] <= torch.tensor(sizes[image_id]) + 0.02).all()
        assert (boxes >= 0).all()
        assert (box_iou(boxes, torch.tensor(truth[image_id], dtype=boxes.dtype)) <= 0.51).all()


def test_a_file_in_the_place_of_the_new_one_is_named(
    proposed: Path, world: Path, micro_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    out, network = tmp_path / "p.json", proposed.with_name("p.oln.safetensors")

    def notes() -> list[str]:
        lines: list[str] = []
        with lines_to(lines.append):
            propose(_job(world, out, micro_recipe(), top=3, checkpoint=(network,)))
        return [line for line in lines if line.startswith("note: " + str(out))]

    assert notes() == []
    [note] = notes()
    assert "will be replaced" in note


def test_novel_annotations_leave_no_trace(
    proposed: Path, copied_world: Path, micro_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """The network saw base boxes alone: without the others in the file the proposals are the same, byte by byte."""
    file = copied_world / "annotations" / "instances_train2017.json"
    tree = json.loads(file.read_text())
    base = {c["id"] for c in tree["categories"] if c["name"] in BASE}
    file.write_text(json.dumps(tree | {"annotations": [a for a in tree["annotations"] if a["category_id"] in base]}))
    propose(_job(copied_world, tmp_path / "p.json", micro_recipe(), top=6, overlap=0.5, min_side=10.0, min_score=0.0))
    assert (tmp_path / "p.json").read_bytes() == proposed.read_bytes()


def test_labels_do_not_matter(
    proposed: Path, copied_world: Path, micro_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    file = copied_world / "annotations" / "instances_train2017.json"
    tree = json.loads(file.read_text())
    base = sorted(c["id"] for c in tree["categories"] if c["name"] in BASE)
    for a in tree["annotations"]:
        if a["category_id"] in base:
            a["category_id"] = base[(base.index(a["category_id"]) + 1) % len(base)]
    file.write_text(json.dumps(tree))
    propose(_job(copied_world, tmp_path / "p.json", micro_recipe(), top=6, overlap=0.5, min_side=10.0, min_score=0.0))
    assert (tmp_path / "p.json").read_bytes() == proposed.read_bytes()


def test_broken_picture_is_left_out_and_named(
    copied_world: Path, micro_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    (copied_world / "train2017" / "000000000003.jpg").unlink()
    said: list[str] = []
    with lines_to(said.append):
        found = propose(_job(copied_world, tmp_path / "p.json", micro_recipe()))
    assert 3 not in found
    assert len(found) > 1
    assert len([line for line in said if "skipped" in line and "000000000003.jpg" in line]) == 1


def test_no_readable_picture_is_an_error(
    copied_world: Path, micro_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    for picture in (copied_world / "train2017").iterdir():
        picture.unlink()
    with pytest.raises(HdovdError, match="no training picture"):
        propose(_job(copied_world, tmp_path / "p.json", micro_recipe()))
    assert not (tmp_path / "p.json").exists()


def _select(
    boxes: list[list[float]], scores: list[float], base: list[list[float]], top: int = 10, min_side: float = 8.0
) -> list[int]:
    selection = Selection(top, 0.5, min_side, 0.0)
    return selection.keep(torch.tensor(boxes).float(), torch.tensor(scores), torch.tensor(base).float()).tolist()


def test_selection_is_best_first_without_repeats_small_ones_and_base_boxes() -> None:
    boxes = [[0, 0, 40, 40], [100, 0, 140, 40], [101, 0, 141, 40], [200, 0, 205, 40], [300, 0, 340, 40]]
    scores = [0.9, 0.5, 0.6, 0.8, 0.7]
    assert _select(boxes, scores, [[0, 0, 40, 38]]) == [4, 2]
    assert _select(boxes, scores, [[0, 0, 40, 38]], top=1) == [4]
    assert _select(boxes, scores, [[500, 0, 540, 40]], min_side=4.0) == [0, 3, 4, 2]


def test_base_boxes_that_overlap_each_other_all_count() -> None:
    """Two base objects close together: neither of them may come back as a pseudo box."""
    base = [[0, 0, 100, 100], [0, 25, 100, 125]]  # IoU 0.6
    assert _select([[0, 0, 100, 100], [0, 25, 100, 125], [0, 48, 100, 148]], [0.9, 0.8, 0.7], base) == []


def _scene(number: int, unlabelled: bool) -> Example:
    """Two base objects and perhaps an unlabelled one, 40 pixels each and found with scores of 0.8; a part of a base
    object at IoU 0.4 with a score of 0.9; five boxes on nothing with scores of 0.3; and one of 10 pixels with 0.85.
    """
    objects = [[0, 0, 40, 40], [100, 0, 140, 40]] + [[200, 0, 240, 40]] * unlabelled
    part, nothing = [0, 0, 16, 40], [[300 + 50 * k, 100, 340 + 50 * k, 140] for k in range(5)]
    boxes = torch.tensor([*objects, part, *nothing, [500, 0, 510, 40]]).float()
    scores = torch.tensor([0.8] * len(objects) + [0.9] + [0.3] * 5 + [0.85])
    return Example(boxes, scores, torch.tensor(objects[:2]).float(), torch.tensor([number % 4, (number + 1) % 4]))


def _open(**given: object) -> ProposeConfig:
    return ProposeConfig(data=DataPaths(), out=Path(), recipe=None, **given)  # type: ignore[arg-type]


def test_what_is_kept_is_chosen_by_base_boxes_alone() -> None:
    """Half of the pictures have an unlabelled object: every proposal that is kept lies on one."""
    chosen = choose([_scene(number, number % 2 == 0) for number in range(40)], _open())
    assert chosen is not None
    kept = chosen.selection
    assert kept.overlap < 0.4
    assert 0.3 < kept.min_score <= 0.8
    assert 10 < kept.min_side <= 40
    assert chosen.recall == 1
    assert chosen.per_image == pytest.approx(0.5)
    assert chosen.on_object == 1
    scene = _scene(0, True)
    assert kept.keep(*scene[:3]).tolist() == [2]
    assert kept.keep(*_scene(1, False)[:3]).tolist() == []


def test_a_rehearsal_says_how_many_unlabelled_objects_are_found() -> None:
    """The network knows its base objects, with scores of 0.8, and finds an unlabelled one in half of the pictures with
    0.5; the rehearsal finds the class that it never saw with 0.46 or 0.51, and in a third of the pictures not at all.
    """

    def scene(number: int) -> Example:
        own = _scene(number, number % 2 == 0)
        labels = torch.tensor([0, 1])
        scores = own.scores.where(own.boxes[:, 0] != 200, torch.tensor(0.5))
        rehearsed = own.boxes[[1 - (number % 3 == 0), 0]], torch.tensor([0.46 + 0.05 * (number % 2), 0.1])
        return Example(own.boxes, scores, own.base, labels, (*rehearsed, labels == 1))

    scenes = [scene(number) for number in range(42)]
    chosen = choose(scenes, _open())
    assert chosen is not None
    assert chosen.selection.min_score == 0.45
    assert chosen.recall == pytest.approx(2 / 3)
    assert chosen.per_image == pytest.approx(0.5)  # of the network's boxes
    alone = choose([one._replace(rehearsed=None) for one in scenes], _open())
    assert alone is not None
    assert alone.recall == 1


def test_a_rehearsal_never_sees_the_held_out_classes(
    world: Path, micro_recipe: Callable[..., Recipe], tmp_path: Path, proposed: Path
) -> None:
    """It is trained once, is no proposal network of all base classes, and lies beside a checkpoint or is missed."""
    lines, out = list[str](), tmp_path / "p.json"
    (tmp_path / "p.oln.safetensors").write_bytes(proposed.with_name("p.oln.safetensors").read_bytes())
    propose(_job(world, out, micro_recipe(), top=3))
    rehearsal = tmp_path / "p.rehearsal.oln.safetensors"
    origin = made_by(rehearsal)
    assert origin["protocol"]["base"] == list(BASE[::2])
    assert origin["training_boxes"].keys() <= set(BASE[::2])
    first = out.read_bytes()
    with lines_to(lines.append):
        propose(_job(world, out, micro_recipe(), top=3))
        propose(_job(world, tmp_path / "q.json", micro_recipe(), top=3, checkpoint=(tmp_path / "p.oln.safetensors",)))
    assert sum("trained with these settings before" in line for line in lines) == 2
    assert out.read_bytes() == first == (tmp_path / "q.json").read_bytes()
    assert not any("classes that the network has learnt" in line for line in lines)
    assert json.loads(made_by_file(out).read_text())["made_by"]["selection"]["by_base_boxes"]["held_out"] == list(
        BASE[1::2]
    )
    whole = (tmp_path / "q.json", (tmp_path / "p.oln.safetensors",))
    other = micro_recipe("train.lr=0.001")
    propose(_job(world, tmp_path / "r.json", other, top=3))
    rehearsal.write_bytes((tmp_path / "r.rehearsal.oln.safetensors").read_bytes())  # of another training
    with lines_to(lines.append):
        propose(_job(world, whole[0], micro_recipe(), top=3, checkpoint=whole[1]))
    assert any("no p.rehearsal.oln.safetensors of its lies beside it" in line for line in lines)


def test_without_a_rehearsal_none_is_trained(
    world: Path, micro_recipe: Callable[..., Recipe], tmp_path: Path, proposed: Path
) -> None:
    (tmp_path / "p.oln.safetensors").write_bytes(proposed.with_name("p.oln.safetensors").read_bytes())
    propose(_job(world, tmp_path / "p.json", micro_recipe(), top=3, no_rehearsal=True))
    assert not list(tmp_path.glob("*rehearsal*"))


def test_what_is_given_stays_and_what_it_costs_is_said() -> None:
    """With the boxes on nothing there are seven proposals an image, but still no more than half an object."""
    chosen = choose([_scene(number, number % 2 == 0) for number in range(40)], _open(min_score=0.0, top=20))
    assert chosen is not None
    assert (chosen.selection.min_score, chosen.selection.top) == (0.0, 20)
    assert chosen.per_image > 5
    table = chosen.about()
    assert table["by_base_boxes"]["per_image"] == pytest.approx(chosen.per_image, abs=1e-4)


def test_without_a_held_out_box_that_is_found_nothing_is_chosen() -> None:
    nothing = Example(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert choose([], _open()) is None
    assert choose([nothing], _open()) is None
    assert choose([_scene(0, True)._replace(boxes=torch.zeros(0, 4), scores=torch.zeros(0))], _open()) is None


def test_where_nothing_is_unlabelled_the_strictest_choice_is_made() -> None:
    chosen = choose([_scene(number, False) for number in range(40)], _open())
    assert chosen is not None
    assert chosen.selection.min_score == 0.8
    assert (chosen.per_image, chosen.recall) == (0, 1)


def test_the_choice_is_said_and_kept_with_the_proposals(
    world: Path, micro_recipe: Callable[..., Recipe], tmp_path: Path, proposed: Path
) -> None:
    lines = list[str]()
    network = proposed.with_name("p.oln.safetensors")
    with lines_to(lines.append):
        propose(_job(world, tmp_path / "q.json", micro_recipe(), checkpoint=(network,), top=3))
    [line] = [line for line in lines if line.startswith("chosen by base boxes alone: --overlap")]
    kept = json.loads(made_by_file(tmp_path / "q.json").read_text())["made_by"]["selection"]
    assert kept["top"] == 3
    assert f"--min-score {kept['min_score']:g}" in line
    assert kept["by_base_boxes"].keys() == {"recall", "per_image", "on_object"}
