"""Adaptation to new classes on a micro world: what is trained on, what is kept, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import adamixer_micro
import numpy as np
import pytest
import rtdetr_micro
import torch
import torch.nn.functional as F
from audit_scenes import check_of, report_of
from forked_group import ranks
from safetensors.torch import load_file
from typer.testing import CliRunner

from hdovd.cache import Catalog
from hdovd.cache.reader import FeatureCache
from hdovd.cli.main import app
from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError, Stopped, lines_to, shorten
from hdovd.data import DataPaths, Protocol, load_protocol, parse_protocol
from hdovd.data.targets import Targets
from hdovd.modeling.boxes import Detections
from hdovd.pipelines.adaptation import adapt as stage
from hdovd.pipelines.adaptation.adapt import adapt, retention
from hdovd.pipelines.adaptation.config import AdaptConfig
from hdovd.pipelines.adaptation.data import (
    MOST_EPOCHS,
    JudgedSet,
    adapted_from,
    class_rows,
    joined_protocol,
    mix_examples,
    parted,
    planned,
    with_taught,
)
from hdovd.pipelines.audit.checks import Verdict
from hdovd.pipelines.dataloading.loader import Draw, Streams
from hdovd.pipelines.demo.world import BASE, NOVEL, make_world
from hdovd.pipelines.detection.names import Gap
from hdovd.pipelines.evaluation.evaluate import Validated, Validation, results
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.runs import RunFolder, read_run
from hdovd.pipelines.runs.listing import State
from hdovd.pipelines.training.config import TrainConfig
from hdovd.pipelines.training.hooks import RunHooks
from hdovd.pipelines.training.loop import Loop
from hdovd.pipelines.training.train import train

NEW = {"anchor": "hook", "bell": "chime"}  # the world's classes, and what they are called in the new data
MINE = ("hook", "chime", "star")


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """New pictures: two classes under names that the run does not know, and one that was novel to it."""
    root = tmp_path_factory.mktemp("mine") / "mine"
    make_world(root, train_images=40, val_images=12, seed=11, workers=1)
    for split in ("train", "val"):
        file = root / "annotations" / f"instances_{split}2017.json"
        tree = json.loads(file.read_text())
        kept = {c["id"]: NEW.get(c["name"], c["name"]) for c in tree["categories"] if c["name"] in (*NEW, "star")}
        tree["categories"] = [{"id": i, "name": name} for i, name in kept.items()]
        tree["annotations"] = [a for a in tree["annotations"] if a["category_id"] in kept]
        file.write_text(json.dumps(tree))
    (root / "protocol.toml").write_text('name = "mine"\nbase = ["hook", "chime", "star"]\nnovel = []\n')
    return root


@pytest.fixture(scope="module")
def my_cache(mine: Path, extraction: Callable[..., ExtractConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    entries = [
        {"image_id": i["id"], "bbox": [x, 10, 40, 40], "score": 0.5}
        for i in json.loads((mine / "annotations" / "instances_train2017.json").read_text())["images"]
        for x in (5, 50)
    ]
    file = tmp_path_factory.mktemp("proposals") / "mine.json"
    file.write_text(json.dumps(entries))
    cache = tmp_path_factory.mktemp("my cache") / "cache"
    extract_clip(extraction(cache, data=mine, proposals=file))
    return cache


@pytest.fixture(scope="module")
def config(
    mine: Path, my_cache: Path, training_cache: Path, distilled: RunFolder, tmp_path_factory: pytest.TempPathFactory
) -> AdaptConfig:
    return AdaptConfig(
        init=distilled.path,
        data=DataPaths(mine),
        cache=my_cache,
        replay=training_cache,
        out=tmp_path_factory.mktemp("adapted") / "new",
        device="cpu",
        validation=DataPaths(mine),
        settings=("train.epochs=2",),
    )


@pytest.fixture(scope="module")
def adapted(config: AdaptConfig) -> tuple[RunFolder, str]:
    """A run adapted with all that there is, and what was said."""
    said = list[str]()
    with pytest.MonkeyPatch.context() as patch, lines_to(said.append):
        patch.setattr(stage, "SURE", 0.0)
        run = adapt(replace(config, compare_naive=True))
    return run, "\n".join(said)


def weights(run: RunFolder, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(run.path / name)


# --- classes ---


def test_classes_are_joined_and_base_labels_stay() -> None:
    run = Protocol("run", ("cat", "dog"), ("bus", "cup"), groups={"some": ("cat",)})
    said = list[str]()
    with lines_to(said.append):
        joined = joined_protocol(run, Protocol("mine", ("cup", "dog", "saw"), ("cat", "axe")))
    assert joined.base == ("cat", "dog", "cup", "saw")
    assert joined.novel == ("bus", "axe")
    assert joined.groups == {
        "new": ("cup", "saw"),
        "old base": ("cat", "dog"),
        "old novel": ("bus",),
        "new novel": ("axe",),
    }
    assert "trained further: dog; novel before, and base now: cup" in said[0]
    assert parse_protocol(joined.to_dict()) == joined  # as records hold it


@pytest.mark.parametrize("name", ["Cat", "cats", "hot dogs", "hotdog", "bus_stops"])
def test_a_class_in_another_spelling_is_refused(name: str) -> None:
    run = Protocol("run", ("cat", "hot dog"), ("bus stop",))
    with pytest.raises(HdovdError, match=rf"class '{name}' of protocol mine is '(cat|hot dog|bus stop)' of the run"):
        joined_protocol(run, Protocol("mine", (name,), ()))


def test_rows_are_the_runs_and_of_new_classes_the_caches(distilled: RunFolder, my_cache: Path) -> None:
    cache = FeatureCache(my_cache)
    rows = class_rows(distilled, cache, (*distilled.protocol().names, "hook"))
    np.testing.assert_array_equal(
        np.stack([rows[name] for name in distilled.protocol().names]), distilled.class_embeddings().float().numpy()
    )
    np.testing.assert_array_equal(rows["hook"], cache.class_embeddings(["hook"])[0])
    with pytest.raises(HdovdError, match=r"no text embedding of .*'saw'"):
        class_rows(distilled, cache, ("saw",))


def test_a_cache_of_another_clip_is_refused(
    mine: Path,
    my_cache: Path,
    distilled: RunFolder,
    config: AdaptConfig,
    extraction: Callable[..., ExtractConfig],
    save_clip: Callable[..., str],
    tmp_path: Path,
) -> None:
    for name, changes in (
        ("seed", {"clip": save_clip(tmp_path / "clip", seed=1)}),
        ("size", {"clip": save_clip(tmp_path / "wide", embed_dim=16)}),
        ("prompts", {"templates": ("a drawing of a {}.",)}),
    ):
        extract_clip(extraction(tmp_path / name, data=mine, proposals=None, **changes, vocabulary=None, captions=None))
        with pytest.raises(HdovdError, match="another CLIP or other prompts") as error:
            adapt(replace(config, cache=tmp_path / name, out=tmp_path / "out"))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()


# --- data ---


@pytest.fixture(scope="module")
def data(mine: Path, my_cache: Path, world: Path, training_cache: Path, distilled: RunFolder) -> JudgedSet:
    """New pictures, and the run's own at a share of three quarters."""
    recipe, own = distilled.recipe(), load_protocol(str(mine / "protocol.toml"))
    joined, cache = joined_protocol(distilled.protocol(), own), FeatureCache(my_cache)
    rows = class_rows(distilled, cache, joined.names)
    old = DataPaths(world).load("train2017", distilled.protocol(), base_only=True)
    replay = JudgedSet(old, FeatureCache(training_cache), recipe, distilled.protocol(), rows, joined.base)
    split = DataPaths(mine).load("train2017", own, base_only=True)
    found = JudgedSet(split, cache, recipe, own, rows, joined.base, replay)
    found.drawn = 3 * len(found.images)
    return found


def test_pictures_are_judged_by_the_classes_of_their_own_data(data: JudgedSet, mine: Path) -> None:
    tree = json.loads((mine / "annotations" / "instances_train2017.json").read_text())
    names = {c["id"]: c["name"] for c in tree["categories"]}
    for index in range(len(data.images)):
        _, targets, image_id = data[Draw(0, 0, index)]
        called = [data.base[label] for label in targets.labels.tolist()]
        wanted = [names[a["category_id"]] for a in tree["annotations"] if a["image_id"] == image_id]
        assert sorted(called) == sorted(wanted)
        assert targets.judged is not None
        assert {data.base[k] for k in targets.judged.nonzero().flatten().tolist()} == set(MINE)
    assert data.replay is not None
    _, targets, image_id = data[Draw(0, 0, len(data.images))]
    assert targets.judged is not None
    assert [data.base[k] for k in targets.judged.nonzero().flatten().tolist()] == list(BASE)
    assert -1 - image_id in {image.id for image in data.replay.images}


def test_a_share_is_held_out_of_many(data: JudgedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pictures are all trained on, and judged by: a tenth of them says nothing."""
    assert data.few
    assert {i.id for i in data.judging} == {i.id for i in data.images if len(i.labels)}
    assert len(data.images) == len(data.split.images) < 100
    monkeypatch.setattr("hdovd.pipelines.adaptation.data.FEW", len(data.images))
    monkeypatch.setattr("hdovd.pipelines.adaptation.data.HELD_OUT", 3)
    many = made_again(data)
    held, kept = {i.id for i in many.judging}, {i.id for i in many.images}
    assert not many.few
    assert not held & kept
    assert held | kept == {i.id for i in many.split.images}
    assert len(held) == len(many.split.images) // 3 > 1


def test_an_epoch_has_the_share_of_earlier_pictures_and_each_epoch_others(data: JudgedSet) -> None:
    assert data.drawn == 3 * len(data.images)
    assert len(data) == len(data.image_ids()) == 4 * len(data.images)
    assert sorted(data.order(Streams())(1).tolist()) == list(range(len(data)))

    def drawn(epoch: int) -> list[int]:
        return [data[Draw(epoch, 0, index)][2] for index in range(len(data.images), len(data))]

    first, second = drawn(0), drawn(1)
    assert first == drawn(0)
    assert first != second
    assert len(set(first + second)) > len(data.replay.images) // 2  # type: ignore[union-attr]
    assert all(image_id < 0 for image_id in first)


def targets_of(boxes: list[list[float]], pseudo: list[list[float]]) -> Targets:
    n, m = len(boxes), len(pseudo)
    return Targets(
        torch.tensor(boxes).reshape(n, 4),
        torch.zeros(n, dtype=torch.int64),
        torch.ones(n, 3),
        torch.tensor(pseudo).reshape(m, 4),
        torch.arange(m * 3.0).reshape(m, 3),
        torch.arange(m * 3.0).reshape(m, 3) + 100,
        torch.zeros(3),
    )


def test_a_taught_box_takes_the_row_of_its_pseudo_box() -> None:
    before = targets_of([[0, 0, 5, 5]], [[50, 50, 70, 70], [10, 10, 30, 30], [11, 11, 30, 30], [10, 10, 30, 60]])
    found = with_taught(before, torch.tensor([[11.0, 11.0, 31.0, 30.0, 7.0]]))
    assert found.boxes.tolist() == [[0, 0, 5, 5], [11, 11, 31, 30]]
    assert found.labels.tolist() == [0, 7]
    assert found.embeddings[1].tolist() == before.pseudo_embeddings[2].tolist()
    assert found.pseudo_boxes.tolist() == [[50, 50, 70, 70], [10, 10, 30, 60]]  # the other lies on it, too
    assert found.pseudo_texts.tolist() == before.pseudo_texts[[0, 3]].tolist()
    alone = with_taught(targets_of([], []), torch.tensor([[1.0, 1.0, 9.0, 9.0, 2.0]]))
    assert alone.embeddings.tolist() == [[0, 0, 0]]
    assert len(alone.pseudo_boxes) == 0


def test_the_run_teaches_what_nobody_looked_for(data: JudgedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sure box on a pseudo box: but not where a box stands, nor of a class that the pictures are judged by, nor an
    unsure one."""
    image = data.images[0]
    targets = data.targets(image)
    own, free = (
        targets.boxes[0],
        next(box for box in targets.pseudo_boxes if stage.box_iou(box[None], targets.boxes).max() < 0.3),
    )
    nowhere = torch.tensor([0.0, 0.0, 3.0, 3.0])
    boat, hook = data.base.index("boat"), data.base.index("hook")
    rows = [(free, 0.9, boat), (free, 0.9, hook), (free, 0.4, boat), (own, 0.9, boat), (nowhere, 0.9, boat)]
    sure = Detections(
        torch.stack([box for box, _, _ in rows]),
        torch.tensor([score for _, score, _ in rows]),
        torch.tensor([label for _, _, label in rows]),
    )
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))

    def detect(self: Validation, model: Any, texts: torch.Tensor) -> Any:
        assert texts.shape == (len(data.base), data.dim)
        return [sure] + [nothing] * (len(self.split.images) - 1), None

    monkeypatch.setattr(Validation, "detect", detect)
    said = list[str]()
    with lines_to(said.append):
        found = stage.taught_boxes(None, data, torch.device("cpu"))  # type: ignore[arg-type]
    assert found.pop(image.id) == [[*free.tolist(), boat]]
    assert not any(found.values())
    assert "sure of 2 boxes" in said[-1]
    assert "; 1 of them are taught, on 1 pictures" in said[-1]


def test_held_out_pictures_are_judged_as_they_should_be(data: JudgedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """What finds all is worth 100; a box of a class that nobody looked for costs nothing, one that was looked for
    does."""
    held = [(part, image) for part in (data, data.replay) if part is not None for image in part.judging]
    validation = stage._judging(data, held, torch.device("cpu"))
    perfect = [
        Detections(t.boxes, torch.full((len(t.boxes),), 0.5), t.labels)
        for t in (part.targets(image) for part, image in held)
    ]
    rows = results(validation.split, perfect)
    ap50 = validation.truth.average_precision(rows).summary()["ap50"]
    assert ap50["new"] == pytest.approx(100)
    assert ap50["old base"] == pytest.approx(100)
    there = {row["category_id"] for row in rows if row["image_id"] > 0}
    old = next(k for k in there if data.base[k] in BASE)

    def with_wrong(image: int, label: int) -> Any:
        wrong = {"image_id": image, "category_id": label, "bbox": [0, 0, 3, 3], "score": 0.9}
        return validation.truth.average_precision([*rows, wrong]).summary()["ap50"]

    assert with_wrong(0, old) == ap50  # image 0 is a new one
    earlier = [row for row in rows if row["image_id"] >= len(data.judging)]
    other = next(row["image_id"] for row in earlier if row["category_id"] != old)
    assert with_wrong(other, old)["old base"] < 100
    both = replace_replay(data, data.replay)
    both.taught = {data.judging[0].id: torch.tensor([[1.0, 1.0, 20.0, 20.0, float(old)]])}
    taught = stage._judging(both, [(both, image) for image in both.judging], torch.device("cpu"))
    assert taught.truth.average_precision([]).summary()["ap50"]["old base"] is None  # it would be found by heart
    alone = replace_replay(data, None)
    alone.taught = {data.judging[0].id: torch.tensor([[1.0, 1.0, 20.0, 20.0, float(old)]])}
    taught = stage._judging(alone, [(alone, image) for image in alone.judging], torch.device("cpu"), every=True)
    wrong = Detections(torch.tensor([[30.0, 30.0, 40.0, 40.0]]), torch.tensor([0.9]), torch.tensor([old]))
    rows = results(taught.split, [wrong, *[wrong] * (len(alone.judging) - 1)])
    assert taught.truth.average_precision(rows).summary()["ap50"]["old base"] == 0


def replace_replay(data: JudgedSet, replay: JudgedSet | None) -> JudgedSet:
    found = copy.copy(data)
    found.replay, found.drawn = replay, 0
    return found


def made_again(data: JudgedSet, names: tuple[str, ...] = MINE) -> JudgedSet:
    """With rows of its own."""
    own = Protocol("mine", names, ())
    return JudgedSet(data.split, data.cache, data.recipe, own, dict(data.rows), data.base)


# --- embeddings of new classes ---


def boxes_of(data: JudgedSet, name: str, like: torch.Tensor, count: int, noise: float, seed: int = 0) -> Any:
    """`targets` that give an image `count` boxes of a class, whose rows are near `like`."""
    drawn = torch.randn(count, data.dim, generator=torch.Generator().manual_seed(seed)) * noise
    rows = F.normalize(F.normalize(like, dim=0) + F.normalize(drawn, dim=1) * noise, dim=1)
    one = targets_of([[0, 0, 5, 5]] * count, [])
    return replace(one, labels=torch.full((count,), data.base.index(name)), embeddings=rows)


@pytest.mark.parametrize("known", [True, False])
def test_a_class_whose_name_says_nothing_is_what_its_boxes_are(
    data: JudgedSet, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Where names tell the boxes they stay: then examples have nothing to add."""
    some = made_again(data)
    texts = {name: torch.from_numpy(row) for name, row in some.rows.items()}
    middle = torch.stack([texts[name] for name in some.base]).mean(dim=0)
    aside = F.normalize(torch.randn(some.dim, generator=torch.Generator().manual_seed(5)), dim=0)
    shown = texts["hook"] if known else texts["boat"] + aside  # unknown: of all names the boats' is nearest to it
    found = {1: boxes_of(some, "hook", shown, 6, 0.2), 2: boxes_of(some, "chime", texts["chime"], 1, 0.0)}
    some.images, some.judging = [replace(some.images[0], id=k) for k in found], []
    monkeypatch.setattr(JudgedSet, "targets", lambda _, image: found[image.id])
    gap = Gap(middle, middle, float((torch.stack([texts[name] for name in some.base]) - middle).norm(dim=1).mean()))
    said = list[str]()
    with lines_to(said.append):
        rows = mix_examples(some, ["hook", "chime"], gap)
    if known:
        assert rows == {}
        assert said == []
        return
    assert "in fewer than half of their boxes, embedded by these: hook (0 of 6)" in said[-1]
    assert set(rows) == {"hook"}  # the chime's name says what it is
    assert np.linalg.norm(rows["hook"]) == pytest.approx(1, abs=1e-5)
    assert (found[1].embeddings.numpy() @ rows["hook"] > found[1].embeddings.numpy() @ some.rows["boat"]).all()


def test_old_classes_are_judged_by_pictures_that_the_run_was_not_trained_on(
    data: JudgedSet, config: AdaptConfig, distilled: RunFolder, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    olds = stage._old_validation(config, distilled)
    (part,) = stage._old_judges(distilled, data, olds)
    tree = json.loads((world / "annotations" / "instances_val2017.json").read_text())
    names = {c["id"]: c["name"] for c in tree["categories"]}
    wanted = {a["image_id"] for a in tree["annotations"] if names[a["category_id"]] in BASE}
    assert {image.id for image in part.judging} == wanted
    judged = part.targets(part.judging[0]).judged
    assert judged is not None
    assert {part.base[k] for k in judged.nonzero().flatten().tolist()} == set(BASE)
    monkeypatch.setattr(stage, "MOST_JUDGED", 2)
    assert len(stage._old_judges(distilled, data, olds)[0].judging) == 2
    assert stage._old_judges(distilled, data, []) == [data.replay]


# --- how much ---


def test_how_much_is_trained_is_decided_by_how_much_there_is(
    data: JudgedSet, distilled: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of the time of training anew on both: of steps that take 0.8 of its own, where the backbone rests."""
    old, backbone, data = data.recipe.train, data.recipe.detector.backbone, copy.copy(data)
    monkeypatch.setattr(RunFolder, "entries", lambda _: [{"step": 3}, {"step": 40}])
    assert data.replay is not None
    new, earlier, anew = len(data.images), len(data.replay.images), 40 * old.batch_size
    said = list[str]()
    with lines_to(said.append):
        recipe = planned(distilled, data, [])
    known = 0.9 * distilled.record()["cache"]["levels"]["boxes"]["inputs"]["images"]["count"]
    earlier = max(earlier, known)
    seen = anew * (1 + new / earlier) / 4 / 0.8
    assert recipe.train.epochs == round(0.75 * seen / new)
    assert data.drawn == max(round(new / 3), round(seen / recipe.train.epochs) - new)
    assert len(data) * recipe.train.epochs == pytest.approx(seen, abs=recipe.train.epochs)
    assert (recipe.train.batch_size, recipe.train.lr) == (old.batch_size, old.lr / 4)  # few pictures
    assert recipe.detector.backbone.frozen_stages == 5
    assert recipe.loss.class_.federated
    assert "the run had 40 steps" in said[0]
    planned(distilled, data, [], share=0.5)
    assert data.drawn == new
    few = replace_replay(data, data.replay)
    data.few = False
    assert planned(distilled, data, []).train.lr == old.lr
    few.images = few.images[:2]
    with monkeypatch.context() as patch:  # a long run, and so 200 steps or more
        patch.setattr(RunFolder, "entries", lambda _: [{"step": 800}])
        assert planned(distilled, data, []).detector.backbone.frozen_stages == backbone.frozen_stages != 5
        assert planned(distilled, few, []).detector.backbone.frozen_stages == 5  # few pictures
        patch.setattr(RunFolder, "entries", lambda _: [{"step": int(790 / (1 + new / earlier))}])
        assert planned(distilled, data, []).detector.backbone.frozen_stages == 5
    assert planned(distilled, few, []).train.epochs == MOST_EPOCHS  # no new picture is seen more often
    seen = anew * (1 + 2 / earlier) / 4 / 0.8
    assert len(few) * MOST_EPOCHS == pytest.approx(seen, abs=MOST_EPOCHS)  # the rest are earlier ones
    alone = replace_replay(few, None)
    plan = planned(distilled, alone, [])
    assert (alone.drawn, plan.train.batch_size, plan.train.epochs) == (0, 2, MOST_EPOCHS)
    assert plan.train.lr == pytest.approx(old.lr / 4 * 2 / old.batch_size)
    alone.images, alone.few = [data.images[0]] * 1000, False
    many = planned(distilled, alone, [])
    assert many.detector.backbone.frozen_stages == backbone.frozen_stages
    assert many.train.epochs == round(anew * (1 + 1000 / known) / 4 / 1000)
    own = planned(distilled, alone, ["train.lr=0.5", "detector.backbone.frozen_stages=2"])
    assert (own.train.lr, own.detector.backbone.frozen_stages) == (0.5, 2)
    rests = planned(distilled, alone, ["detector.backbone.frozen_stages=5"])  # asked for: steps are shorter then
    assert rests.train.epochs == round(anew * (1 + 1000 / known) / 4 / 0.8 / 1000) > many.train.epochs
    monkeypatch.setattr(RunFolder, "entries", lambda _: [])
    imported = {"imported": {"file": "theirs.pth"}}  # has no log, and knows no cache
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "record", lambda _: imported)
        assert planned(distilled, alone, []).train.epochs == 1000 * old.batch_size // 1000
    slow = distilled.written_recipe().model_copy(update={"train": old.model_copy(update={"warmup_iterations": 1000})})
    monkeypatch.setattr(RunFolder, "written_recipe", lambda _: slow)
    short = planned(distilled, alone, ["train.epochs=2", "train.batch_size=50"])
    assert short.train.lr == pytest.approx(old.lr / 4 * 50 / old.batch_size)
    assert short.train.warmup_iterations == 2 * 20 // 10  # a tenth of what is trained, not of what was planned


def test_the_weights_of_pseudo_boxes_are_the_runs(
    data: JudgedSet, distilled: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few pictures tell none, and those of many would weigh the run's earlier pictures too."""
    record, recipe = distilled.record(), distilled.written_recipe()
    found = {"centre": 0.41, "width": 0.03, "scale": 1.25}
    auto = recipe.pseudo_boxes.model_copy(update={f"reliability_{name}": "auto" for name in found})
    monkeypatch.setattr(RunFolder, "record", lambda _: record | {"reliability": found})
    assert planned(distilled, data, []).pseudo_boxes.reliability == recipe.pseudo_boxes.reliability
    monkeypatch.setattr(RunFolder, "written_recipe", lambda _: recipe.model_copy(update={"pseudo_boxes": auto}))
    assert planned(distilled, data, []).pseudo_boxes.reliability == (0.41, 0.03, 1.25)


def test_a_chain_of_adaptations_is_planned_from_its_first_run(distilled: RunFolder, tmp_path: Path) -> None:
    """Each would else be trained a quarter of the one before, and a tenth as fast."""
    runs = [distilled]
    for name in ("one", "two"):
        run = RunFolder(Path(shutil.copytree(distilled.path, tmp_path / name)))
        run.add_to_record(adapted={}, init={"run": str(runs[-1].path), "sha256": ""})
        runs.append(run)
    assert [adapted_from(run)[-1].path for run in runs] == [distilled.path] * 3
    shutil.rmtree(runs[1].path)
    assert [run.path for run in adapted_from(runs[2])] == [runs[2].path]


@pytest.mark.parametrize(
    ("most", "accumulate", "world", "found"),
    [(16, 1, 1, (16, 1)), (10, 16, 1, (10, 2)), (32, 8, 3, (30, 2)), (8, 8, 2, (8, 4)), (2, 4, 4, (4, 1))],
)
def test_batches_are_shared_by_processes(most: int, accumulate: int, world: int, found: tuple[int, int]) -> None:
    batch, settings = parted(most, accumulate, world)
    assert (batch, settings) == (found[0], [f"train.batch_size={found[0]}", f"train.accumulate={found[1]}"])
    assert batch % (world * found[1]) == 0


# --- the whole ---


def test_an_adapted_run_knows_both(adapted: tuple[RunFolder, str], distilled: RunFolder, training_cache: Path) -> None:
    run, said = adapted
    record, protocol = run.record(), run.protocol()
    assert protocol.base == (*BASE, *MINE)
    assert protocol.novel == tuple(name for name in NOVEL if name != "star")
    torch.testing.assert_close(
        run.class_embeddings()[: len(BASE)].float(), distilled.class_embeddings()[: len(BASE)].float()
    )
    assert record["adapted"]["protocol"]["base"] == list(MINE)
    assert record["init"]["run"] == str(distilled.path.resolve())
    assert str(run.path.resolve()) in {user.path for user in Catalog(training_cache).runs()}
    assert [row["factor"] for row in record["mix"]["table"]] == [0.0, 0.25, 0.5, 0.75]  # few pictures
    table = record["mix"]["table"]
    kept = [row for row in table if row["old base"] >= table[0]["old base"] - stage.MOST_LOST]  # on validation images
    assert record["mix"]["factor"] == max(kept, key=lambda row: (row["new"], row["factor"]))["factor"]
    assert read_run(run.path).state is State.NOT_EVALUATED
    assert "taught, on" in said
    assert json.loads((run.path / "teacher.json").read_text())


def test_the_table_says_what_became_of_the_classes(adapted: tuple[RunFolder, str], mine: Path, world: Path) -> None:
    run, said = adapted
    tree = json.loads((run.path / "retention.json").read_text())
    assert [Path(one["data"]).parents[1] for one in tree] == [mine, world]
    assert set(tree[0]["groups"]) == {"new"}
    assert set(tree[1]["groups"]) == {"new", "old base", "old novel"}  # star is in both
    assert set(tree[1]["ap50"]) == {"before", "after", "naive"}
    line = next(line for line in said.splitlines() if "old base" in line and str(world) in line)
    assert line.split()[-3:] == [f"{tree[1]['ap50'][which]['old base']:.1f}" for which in ("before", "after", "naive")]


def test_plain_fine_tuning_sees_no_replay_and_no_levels(adapted: tuple[RunFolder, str]) -> None:
    naive = RunFolder(adapted[0].path / "naive")
    assert not naive.recipe().loss.class_.federated
    assert all(entry["instance_alignment"] == entry["image_alignment"] == 0 for entry in naive.entries())
    assert "mix" not in naive.record()
    assert weights(naive).keys() == weights(adapted[0]).keys()


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
def test_weights_are_interpolated_and_memories_are_not(
    config: AdaptConfig, distilled: RunFolder, adapted: tuple[RunFolder, str], tmp_path: Path, factor: float
) -> None:
    shutil.copytree(adapted[0].path, tmp_path / "new")
    run = adapt(replace(config, out=tmp_path / "new", resume=True, mix=factor))
    before, after, found = weights(distilled), weights(run, "trained.safetensors"), weights(run)
    assert any(not torch.equal(after[name], before[name]) for name in after if name in before)
    for name, value in found.items():
        if "_queue." in name or name == "background_texts":
            assert torch.equal(value, after[name])
        else:
            torch.testing.assert_close(value, (1 - factor) * before[name] + factor * after[name])
    assert any("running_mean" in name for name in found)
    assert run.record()["mix"]["factor"] == factor
    known, tried = adapted[0].record()["mix"]["table"], run.record()["mix"]["table"]
    assert [row for row in tried if row["factor"] != 1.0] == known  # what was measured before stays


def test_it_goes_on_to_the_sample(
    config: AdaptConfig, adapted: tuple[RunFolder, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taught boxes are those of before, whatever the run would be sure of now."""
    asked = replace(config, out=tmp_path / "new", resume=True)
    step = RunHooks.step

    def stop(self: RunHooks, loop: Loop[Any]) -> None:
        if loop.step_number == 2:
            self.stop.signals.append(15)
        step(self, loop)

    with monkeypatch.context() as patch:
        patch.setattr(RunHooks, "step", stop)
        patch.setattr(stage, "SURE", 0.0)
        with pytest.raises(Stopped):
            adapt(asked)
    others: list[tuple[dict[str, Any], str]] = [({"share": 0.25}, "share"), ({"teacher": False}, "teacher")]
    for changes, why in (*others, ({"replay": None}, "replay")):
        with pytest.raises(HdovdError, match=f"new began otherwise: .*{why}"):
            adapt(replace(asked, **changes))
    run = adapt(asked)
    one, other = weights(run, "trained.safetensors"), weights(adapted[0], "trained.safetensors")
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    assert weights(run).keys() == weights(adapted[0]).keys()
    assert run.record()["mix"] == adapted[0].record()["mix"]


def test_two_processes_adapt_as_one(config: AdaptConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are padded alike, and plain SGD does not blow rounding up; sums come in another order, no more."""
    monkeypatch.setattr(stage, "SURE", 0.0)
    alike = ("input.short_side=64", "input.long_side=64", "train.optimizer=sgd", "train.lr=0.002", "train.epochs=1")
    asked = replace(config, settings=alike, validation=None)
    alone = adapt(replace(asked, out=tmp_path / "one"))

    def body() -> int:
        adapt(replace(asked, out=tmp_path / "two"))
        return 0

    code, printed = ranks(body, tmp_path / "log", processes=2)
    assert code == 0, printed
    run = RunFolder.open(tmp_path / "two")
    assert (run.path / "teacher.json").read_text() == (alone.path / "teacher.json").read_text()
    other = weights(alone, "trained.safetensors")
    for name, value in weights(run, "trained.safetensors").items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-3)
    assert [row["factor"] for row in run.record()["mix"]["table"]] == [0.0, 0.25, 0.5, 0.75]
    assert (run.path / "retention.json").is_file()


@pytest.mark.parametrize("micro", [adamixer_micro, rtdetr_micro], ids=["adamixer", "rtdetr"])
def test_other_detectors(
    config: AdaptConfig,
    micro: ModuleType,
    world: Path,
    training_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "SURE", 0.0)
    job = TrainConfig(
        data=DataPaths(world),
        cache=training_cache,
        out=tmp_path / "run",
        recipe=micro.recipe("train.epochs=1"),
        protocol=str(world / "protocol.toml"),
        device="cpu",
    )
    before = train(job)
    run = adapt(replace(config, init=before.path, out=tmp_path / "new", mix=1.0, settings=(), compare_naive=True))
    first, last = weights(before), weights(run)
    assert any(not torch.equal(first[name], last[name]) for name in first if name.startswith("adapters."))
    assert run.entries()[-1]["classification"] > 0
    plain = RunFolder(run.path / "naive").entries()[-1]  # no level teaches it
    levels = [name for name in plain if name.endswith(("_alignment", "_relation"))]
    assert len(levels) >= 4
    assert all(plain[name] == 0 for name in levels)


def test_without_replay_and_teacher(
    config: AdaptConfig, adapted: tuple[RunFolder, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of a run that had both. Where its data are gone nothing tells what its classes lose."""
    monkeypatch.setattr(stage, "_old_validation", lambda *_: [])
    out = Path(shutil.copytree(adapted[0].path, tmp_path / "new"))
    run = adapt(replace(config, replay=None, teacher=False, out=out, overwrite=True, protocol=None))
    assert not (run.path / "teacher.json").exists()
    assert {row["old base"] for row in run.record()["mix"]["table"]} == {None}  # nothing tells
    assert run.record()["adapted"]["replay"] == {}


def test_a_run_without_distillation(
    config: AdaptConfig, base_only: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is sure of needs no row."""
    monkeypatch.setattr(stage, "SURE", 0.0)
    said = list[str]()
    with lines_to(said.append):
        adapt(replace(config, init=base_only.path, out=tmp_path / "new", replay=None, settings=()))
    line = next(line for line in said if "sure of" in line)
    sure, _, taught, *_ = [int(word.replace(",", "")) for word in line.split() if word.replace(",", "").isdigit()]
    assert sure == taught > 0


def test_an_adapted_run_is_adapted_again_with_the_first_cache(
    config: AdaptConfig, adapted: tuple[RunFolder, str], tmp_path: Path, mine: Path, my_cache: Path, world: Path
) -> None:
    """And the audit says which boxes were seen when."""
    run = adapt(replace(config, init=adapted[0].path, out=tmp_path / "new", settings=("train.epochs=1",)))
    assert run.protocol().base == adapted[0].protocol().base
    tables = json.loads((run.path / "retention.json").read_text())
    assert [Path(one["data"]).parents[1] for one in tables] == [mine, world]  # of the first run's data too
    report = report_of(mine, my_cache, run=run.path)
    assert check_of(report, "class lists").verdict is not Verdict.LEAK
    found = check_of(report, "run: backbone")
    assert found.verdict is Verdict.UNKNOWN  # the first run's: what it was drawn from
    assert sorted(found.notes) == sorted(
        [
            f"{path} was trained on boxes of {names}"
            for path, names in (
                (run.path, f"hook, chime, star, and of earlier classes: {shorten(list(BASE))}"),
                (adapted[0].path.resolve(), f"hook, chime, star, and of earlier classes: {shorten(list(BASE))}"),
                (config.init.resolve(), shorten(list(BASE))),
            )
        ]
    )
    held_back = tmp_path / "held_back.toml"
    held_back.write_text('name = "mine"\nbase = ["hook", "chime"]\nnovel = ["star"]\n')
    report = report_of(mine, my_cache, run=run.path, protocol=str(held_back))
    assert check_of(report, "run: backbone").leaks == [
        f"{adapted[0].path.resolve()}, whose weights it began with, was trained on boxes of 'star', which is novel"
    ]
    assert any("'star'" in line for line in check_of(report, "class lists").leaks)
    lone = {"teacher": False, "replay": {}, "protocol": run.record()["adapted"]["protocol"]}
    for before, more in (
        (adapted[0].path, ""),
        (tmp_path / "gone", f", and of earlier classes: {shorten(list(BASE))}"),
    ):
        run.add_to_record(adapted=lone, init=run.record()["init"] | {"run": str(before)})
        notes = check_of(report_of(mine, my_cache, run=run.path), "run: backbone").notes
        assert f"{run.path} was trained on boxes of hook, chime, star{more}" in notes


def test_an_import_is_adapted(
    config: AdaptConfig, distilled: RunFolder, tmp_path: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    record = {"cache": {"path": None, "levels": {}}, "imported": {"file": "theirs.pth"}}
    recipe, protocol, rows = distilled.recipe(), distilled.protocol(), distilled.class_embeddings()
    run = RunFolder.create(tmp_path / "run", recipe, protocol, rows, record)
    shutil.copy(distilled.path / "model.safetensors", run.path)
    said = list[str]()
    with lines_to(said.append):
        new = adapt(replace(config, init=run.path, replay=None, out=tmp_path / "new", settings=()))
    assert new.record()["mix"]["factor"] is not None
    assert any("note: no validation on the data of" in line for line in said)
    with pytest.raises(HdovdError, match="is not the cache that RUN was trained from: the run was imported"):
        adapt(replace(config, init=run.path, out=tmp_path / "other"))


def test_another_cache_is_no_replay(config: AdaptConfig, my_cache: Path, mine: Path, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"--replay .* is not the cache that RUN was trained from: .* has no set"):
        adapt(replace(config, replay=my_cache, out=tmp_path / "new"))
    with pytest.raises(HdovdError, match="protocol demo-world names classes"):
        adapt(replace(config, replay_data=mine, out=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"share": 1.0}, "--share 1.0: expected"),
        ({"mix": 1.5}, "--mix 1.5: expected"),
        ({"replay": "x/{000..002}.tar"}, "tar shards"),
        ({"init": Path("nowhere")}, "nowhere is no run"),
        ({"protocol": "nowhere.toml"}, "nowhere.toml"),
        ({"validation": DataPaths(Path("nowhere"))}, "nowhere"),
    ],
)
def test_bad_input(config: AdaptConfig, changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=why):
        adapt(replace(config, out=tmp_path / "new", **changes))


def test_what_is_found_no_more_is_named(
    distilled: RunFolder, adapted: tuple[RunFolder, str], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that found all but crowds before, and lost the first object of each picture."""
    tree = json.loads((world / "annotations" / "instances_val2017.json").read_text())
    asked = list[int]()

    def run(self: Validation, model: Any, texts: torch.Tensor) -> Any:
        asked.append(len(texts))
        first = len(asked) - 1
        found = [
            Detections(*(torch.from_numpy(part[first:]) for part in (i.boxes, np.ones(len(i.labels)), i.labels)))
            for i in self.split.images
        ]
        combined = self.truth.average_precision(results(self.split, found))
        return Validated(found, combined, combined)

    monkeypatch.setattr(Validation, "run", run)
    retention({"before": distilled, "after": adapted[0]}, [DataPaths(world)], torch.device("cpu"))
    missed = json.loads((adapted[0].path / "retention.json").read_text())[0]["missed"]
    names, first = {c["id"]: c["name"] for c in tree["categories"]}, dict[int, tuple[int, str]]()
    for a in tree["annotations"]:
        first.setdefault(a["image_id"], (a["id"], names[a["category_id"]]))
    assert missed == [[image, number, name] for image, (number, name) in sorted(first.items())]


def test_commands(adapted: tuple[RunFolder, str], config: AdaptConfig, world: Path, mine: Path, tmp_path: Path) -> None:
    words = [config.init, "--data", mine, "--cache", config.cache, "--replay", config.replay, "--out", tmp_path / "new"]
    done = CliRunner().invoke(app, ["adapt", *map(str, words), "--device", "cpu", "--mix", "0.5", "--no-teacher"])
    assert done.exit_code == 0, done.output
    assert "0.5 new and 0.5 of RUN" in done.output
    assert "objects found before are missed now" in done.output
    seen = CliRunner().invoke(
        app, ["eval", str(tmp_path / "new"), "--before", str(config.init), "--data", str(world), "--device", "cpu"]
    )
    assert seen.exit_code == 0, seen.output
    assert [line.split()[1:3] for line in seen.output.splitlines() if "old base" in line] == [["old", "base"]]
    assert len(json.loads((tmp_path / "new" / "retention.json").read_text())) == 1
    listed = CliRunner().invoke(app, ["runs", "ls", str(tmp_path / "new")])
    assert listed.exit_code == 0, listed.output
    assert "not evaluated" in listed.output


def test_eval_and_report_take_data_that_know_all_classes(adapted: tuple[RunFolder, str], copied_world: Path) -> None:
    for split in ("train", "val"):
        file = copied_world / "annotations" / f"instances_{split}2017.json"
        tree = json.loads(file.read_text())
        tree["categories"] += [{"id": 1000 + k, "name": name} for k, name in enumerate(NEW.values())]
        file.write_text(json.dumps(tree))
    run = str(adapted[0].path)
    done = CliRunner().invoke(app, ["eval", run, "--data", str(copied_world), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "new   old base  old novel" in done.output
    lost = next(a for a in reversed(tree["annotations"]) if a["category_id"] < 1000)
    name = next(c["name"] for c in tree["categories"] if c["id"] == lost["category_id"])
    before = (adapted[0].path / "retention.json").read_text()
    table = [
        {"data": str(file), "missed": [[lost["image_id"], lost["id"], name]]},
        {"data": "other.json", "missed": []},
    ]
    (adapted[0].path / "retention.json").write_text(json.dumps(table))
    page = CliRunner().invoke(
        app, ["report", run, "--data", str(copied_world), "--device", "cpu", "--out", str(copied_world / "page")]
    )
    assert page.exit_code == 0, page.output
    text = (copied_world / "page" / "index.html").read_text()
    assert "old novel" in text
    assert text.count(f"missed, and found before the adaptation: {name}") == 1
    assert text.count("; 1 missed that was found before<") == 1
    first = text.index('<article class="card"')  # the picture of it is the first one
    assert f'aria-label="image {lost["image_id"]}"' in text[first : text.index(">", first)]
    (adapted[0].path / "retention.json").write_text(before)
    (adapted[0].path / "metrics.json").unlink()  # other tests read the run as it was
