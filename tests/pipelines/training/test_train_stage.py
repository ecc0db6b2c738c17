"""Training as a stage: what a run folder holds, what repeats, what is refused; and that CLIP takes no part."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hdovd.cache import Catalog, Level
from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import PRESETS, Recipe, load_recipe
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths, load_protocol
from hdovd.pipelines.demo.world import BASE, GROUNDS, NOVEL
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.training.train import TrainConfig, train, training_data
from hdovd.pipelines.training.training_set import TrainingSet

TrainMicro = Callable[..., RunFolder]
LEVELS = ("instance", "class", "image")
DISTILLATION_LOSSES = {
    "instance": {"instance_alignment", "instance_relation"},
    "class": set(),
    "image": {"image_alignment"},
}
DETECTION_LOSSES = {"rpn_objectness", "rpn_box", "classification", "box"}
WITHOUT_CLIP = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "open_clip":
            raise ImportError("open_clip is blocked in this test")

sys.meta_path.insert(0, Blocker())
from hdovd.cli.main import main
main()
"""


def _log(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]


def _weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return dict(load_file(run.path / "model.safetensors"))


def test_trains_where_open_clip_cannot_be_imported(
    world: Path, training_cache: Path, tmp_path: Path, micro_settings: list[str], python: Callable[..., Any]
) -> None:
    found = python(
        [
            "-c",
            WITHOUT_CLIP,
            "train",
            "--data",
            world,
            "--cache",
            training_cache,
            "--out",
            tmp_path / "run",
            "--device",
            "cpu",
            "--protocol",
            world / "protocol.toml",
            *micro_settings,
        ],
        tmp_path,
    )
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert "hdovd eval" in found.stdout


def test_run_folder_holds_what_made_it(
    distilled: RunFolder, training_cache: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    recipe = micro_recipe("train.epochs=3")
    assert load_recipe(str(distilled.path / "config.toml")) == recipe
    record = json.loads((distilled.path / "run.json").read_text())
    reader = FeatureCache(training_cache)
    assert record["cache"]["levels"] == {
        str(level): {"key": reader.key(level), "inputs": reader.key_inputs(level)} for level in reader.levels()
    }
    assert record["cache"]["path"] == str(training_cache)
    assert record["protocol"]["base"] == list(BASE)
    assert record["protocol"]["novel"] == list(NOVEL)
    assert {"hdovd", "torch"} <= record["versions"].keys()
    assert distilled.protocol().names == BASE + NOVEL
    np.testing.assert_array_equal(distilled.class_embeddings().numpy(), reader.class_embeddings([*BASE, *NOVEL]))


def test_log_has_every_loss_and_the_speed(distilled: RunFolder) -> None:
    entries = _log(distilled)
    last = entries[-1]
    assert last["epoch"] == 3
    assert last["step"] == 3 * (23 // 8)
    assert last["lr"] > 0
    assert last["images_per_s"] > 0
    losses = DETECTION_LOSSES | set().union(*DISTILLATION_LOSSES.values())
    assert losses <= last.keys()
    assert all(math.isfinite(entry[name]) for entry in entries for name in losses)


def test_weights_moved_and_queues_are_filled(distilled: RunFolder, train_micro: TrainMicro, tmp_path: Path) -> None:
    other = _weights(train_micro(tmp_path / "run"))
    weights = _weights(distilled)
    assert weights.keys() == other.keys()
    moved = [name for name, value in weights.items() if not torch.equal(value, other[name])]
    assert {"background", "head.distillation.weight", "rpn.head.cls_logits.weight"} <= set(moved)
    for name in (
        "instance_level.student_queue.rows",
        "instance_level.teacher_queue.rows",
        "image_level.student_queue.rows",
        "image_level.teacher_queue.rows",
    ):
        norms = weights[name].norm(dim=1)
        held = norms > 0
        assert held.sum() > 8
        torch.testing.assert_close(norms[held], torch.ones(int(held.sum())), atol=1e-3, rtol=0)


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(train_micro: TrainMicro, tmp_path: Path) -> None:
    one, same, other = (
        _weights(train_micro(tmp_path / name, f"train.seed={seed}")) for name, seed in (("a", 4), ("b", 4), ("c", 5))
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.fc1.weight"], other["head.fc1.weight"])


def test_data_at_another_path_gives_the_same_bits(
    train_micro: TrainMicro, copied_world: Path, copied_cache: Path, tmp_path: Path
) -> None:
    one = _weights(train_micro(tmp_path / "a"))
    other = _weights(train_micro(tmp_path / "b", data=copied_world, from_cache=copied_cache))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_precision_that_auto_came_to_is_recorded_and_gone_on_with(
    train_micro: TrainMicro, world: Path, training_cache: Path, micro_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    lines = list[str]()
    run = train_micro(tmp_path / "auto", "train.precision=auto", log=lines.append)
    assert "precision: fp32, by HDOVD_PRECISION" in lines
    assert (run.recipe().train.precision, run.record()["precision"]) == ("fp32", "fp32")
    begun = train_micro(tmp_path / "bf16", "train.precision=bf16")
    job = TrainConfig(
        data=DataPaths(world),
        cache=training_cache,
        out=begun.path,
        recipe=micro_recipe("train.precision=auto"),
        protocol=str(world / "protocol.toml"),
        device="cpu",
        resume=True,
    )
    lines.clear()
    with lines_to(lines.append):
        train(job)
    assert lines[0].startswith("precision: bf16, the run's own")
    assert lines[-1].endswith("is finished already")
    with pytest.raises(HdovdError, match=r'train\.precision.*"fp32".*"bf16"'), lines_to(lines.append):
        train(replace(job, recipe=micro_recipe("train.precision=fp32")))


def test_resolved_config_repeats_the_run(
    distilled: RunFolder, world: Path, training_cache: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(str(distilled.path / "config.toml"))
    again = train(
        TrainConfig(
            data=DataPaths(world),
            cache=training_cache,
            out=tmp_path / "run",
            recipe=recipe,
            protocol=str(world / "protocol.toml"),
            device="cpu",
        )
    )
    weights = _weights(again)
    assert all(torch.equal(value, weights[name]) for name, value in _weights(distilled).items())


def test_cache_knows_the_runs_that_use_it(train_micro: TrainMicro, copied_cache: Path, tmp_path: Path) -> None:
    """What a run reads is kept for as long as the run is there."""
    run = train_micro(tmp_path / "run", *PRESETS["base-only"], from_cache=copied_cache)
    catalog, reader = Catalog(copied_cache), FeatureCache(copied_cache)
    (record,) = [record for record in catalog.runs() if record.path == str(run.path.resolve())]
    assert record.levels == reader.set.levels
    assert {level: key for (level, key), users in catalog.users().items() if record.path in users} == reader.set.levels
    shutil.rmtree(run.path)
    assert not any(record.path in users for users in catalog.users().values())


def test_cache_that_cannot_be_written_to_can_be_trained_from(
    train_micro: TrainMicro, copied_cache: Path, tmp_path: Path
) -> None:
    shutil.rmtree(copied_cache / "runs", ignore_errors=True)
    (copied_cache / "runs").write_text("in the way")
    lines: list[str] = []
    run = train_micro(tmp_path / "run", *PRESETS["base-only"], from_cache=copied_cache, log=lines.append)
    assert (run.path / "model.safetensors").is_file()
    assert any("hdovd cache gc will not know of this run" in line for line in lines)


def test_features_name_the_set_that_is_read(
    world: Path, copied_cache: Path, tmp_path: Path, extraction: Callable[..., Any], micro_recipe: Callable[..., Recipe]
) -> None:
    extract_clip(extraction(copied_cache, templates=("{} in the snow",), features="snow"))
    job = TrainConfig(
        data=DataPaths(world),
        cache=copied_cache,
        out=tmp_path / "run",
        recipe=micro_recipe(),
        protocol=str(world / "protocol.toml"),
        device="cpu",
        features="snow",
    )
    run = train(job)
    reader = FeatureCache(copied_cache, "snow")
    assert {level: entry["key"] for level, entry in run.record()["cache"]["levels"].items()} == reader.set.levels
    np.testing.assert_array_equal(run.class_embeddings().numpy(), reader.class_embeddings([*BASE, *NOVEL]))
    assert (run.class_embeddings().numpy() != FeatureCache(copied_cache).class_embeddings([*BASE, *NOVEL])).any()
    with pytest.raises(HdovdError, match="no set of features named ice; it has default, snow"):
        train(replace(job, features="ice", out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


# --- switches ---


def test_base_only_has_no_distillation(base_only: RunFolder) -> None:
    assert _log(base_only)[-1].keys() >= DETECTION_LOSSES
    assert not any(name.startswith(("instance", "image_a")) for name in _log(base_only)[-1])
    assert not any("queue" in name or "distillation" in name or "image_level" in name for name in _weights(base_only))


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_can_be_trained_alone(train_micro: TrainMicro, tmp_path: Path, level: str) -> None:
    lines: list[str] = []
    run = train_micro(
        tmp_path / "run", *(f"loss.{other}.enabled=false" for other in LEVELS if other != level), log=lines.append
    )
    assert {name for name in _log(run)[-1] if name.startswith(("instance", "image_a"))} == DISTILLATION_LOSSES[level]
    assert any(f"distillation levels: {level};" in line for line in lines)


def test_pseudo_boxes_change_the_class_level(train_micro: TrainMicro, base_only: RunFolder, tmp_path: Path) -> None:
    """With the class level alone there is no loss of its own name: what it does must show in the weights."""
    run = train_micro(tmp_path / "run", "loss.instance.enabled=false", "loss.image.enabled=false")
    assert not torch.equal(_weights(run)["head.class_feature.weight"], _weights(base_only)["head.class_feature.weight"])


def test_cache_without_proposals_still_trains_the_instance_level(
    train_micro: TrainMicro, tmp_path: Path, extraction: Callable[..., Any]
) -> None:
    extract_clip(extraction(tmp_path / "cache", proposals=None, vocabulary=None, captions=None))
    run = train_micro(tmp_path / "run", "loss.class.enabled=false", from_cache=tmp_path / "cache")
    assert math.isfinite(_log(run)[-1]["instance_relation"])


# --- refusals ---


def test_existing_run_is_refused_and_overwrite_replaces_it(
    train_micro: TrainMicro, base_only: RunFolder, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(base_only.path, tmp_path / "run"))
    (out / "metrics.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(HdovdError, match="--overwrite"):
        train_micro(out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    run = train_micro(out, overwrite=True)
    assert not (out / "metrics.json").exists()  # an AP of other weights
    assert "image_alignment" in _log(run)[-1]
    assert len(_log(run)) == len(_log(base_only))  # the log began anew


@pytest.mark.parametrize("epochs", [2, 15], ids=["short", "long"])
def test_loss_that_is_not_finite_stops_naming_the_step(train_micro: TrainMicro, tmp_path: Path, epochs: int) -> None:
    """The step that broke, not the one at which somebody looked."""
    with pytest.raises(HdovdError, match=r"not finite at step [234]\b.*train\.lr"):
        train_micro(
            tmp_path / "run",
            "train.lr=1e30",
            "train.optimizer=sgd",
            "train.clip_norm=0.0",
            f"train.epochs={epochs}",
            "train.warmup_iterations=0",
        )
    record = json.loads((tmp_path / "run" / "unsound_batch.json").read_text())
    assert record["step"] in (2, 3, 4)
    assert len(set(record["image_ids"])) == 8
    assert record["losses"].keys() >= DETECTION_LOSSES


def test_weights_that_are_not_finite_are_never_saved(train_micro: TrainMicro, tmp_path: Path) -> None:
    """The loss breaks in the second epoch: what is left is no model, or the sound one of the first epoch."""
    with pytest.raises(HdovdError):
        train_micro(
            tmp_path / "run",
            "train.lr=1e30",
            "train.optimizer=sgd",
            "train.clip_norm=0.0",
            "train.epochs=15",
            "train.warmup_iterations=0",
        )
    file = tmp_path / "run" / "model.safetensors"
    assert not file.exists() or all(value.isfinite().all() for value in load_file(file).values())


def test_error_in_a_worker_process_is_still_one_message(
    train_micro: TrainMicro, copied_world: Path, tmp_path: Path
) -> None:
    file = copied_world / "train2017" / "000000000003.jpg"
    file.write_bytes(file.read_bytes()[:1500])
    with pytest.raises(
        HdovdError, match=r"image 3: .*000000000003\.jpg"
    ) as error:  # base-only: nothing asks what the cache saw
        train_micro(tmp_path / "run", "train.workers=1", "train.batch_size=2", *PRESETS["base-only"], data=copied_world)
    assert "Traceback" not in str(error.value)


def test_missing_cache(train_micro: TrainMicro, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match="no feature cache"):
        train_micro(tmp_path / "run", from_cache=tmp_path / "none")
    assert not (tmp_path / "run").exists()


def test_cache_that_is_not_whole(train_micro: TrainMicro, copied_cache: Path, tmp_path: Path) -> None:
    next((copied_cache / "instance").rglob("parts/000000.json")).unlink()
    with pytest.raises(HdovdError, match=r"is not whole, .*run the extract-clip command again"):
        train_micro(tmp_path / "run", from_cache=copied_cache)
    assert not (tmp_path / "run").exists()


def test_base_only_needs_the_class_names_alone(train_micro: TrainMicro, copied_world: Path, tmp_path: Path) -> None:
    """Base-only training takes text embeddings from the cache, but a protocol with other classes has none there."""
    text = (copied_world / "protocol.toml").read_text()
    (copied_world / "protocol.toml").write_text(text.replace(f'"{NOVEL[0]}", ', ""))
    train_micro(tmp_path / "fewer", *PRESETS["base-only"], data=copied_world)
    file = copied_world / "annotations" / "instances_train2017.json"
    tree = json.loads(file.read_text())
    tree["categories"].append({"id": 999, "name": "unicorn"})
    file.write_text(json.dumps(tree))
    (copied_world / "protocol.toml").write_text(text.replace(f'"{NOVEL[0]}"', '"unicorn"'))
    with pytest.raises(HdovdError, match="unicorn"):
        train_micro(tmp_path / "other", *PRESETS["base-only"], data=copied_world)


def test_a_validation_that_fails_is_told_and_training_goes_on(
    copied_world: Path, training_cache: Path, tmp_path: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    """Its figures are empty in the log, the weights of the best epoch are chosen among the others, and the last line
    says it.
    """
    picture = sorted((copied_world / "val2017").iterdir())[3]
    whole, lines = picture.read_bytes(), list[str]()
    picture.write_bytes(whole[: len(whole) // 2])

    def log(line: str) -> None:
        lines.append(line)
        if "NOT validated, and" in line:
            picture.write_bytes(whole)

    job = TrainConfig(
        data=DataPaths(copied_world),
        cache=training_cache,
        out=tmp_path / "run",
        recipe=micro_recipe("train.epochs=3"),
        protocol=str(copied_world / "protocol.toml"),
        device="cpu",
        validation=DataPaths(copied_world),
    )
    with lines_to(log):
        run = train(job)
    told = re.compile(rf"epoch 1: NOT validated, and training goes on: image {int(picture.stem)}: .*{picture.name}")
    assert [line for line in lines if told.match(line)]
    assert "; validations that failed, as said above: 1; next: " in lines[-1]
    found = [entry for entry in _log(run) if "val_base" in entry]
    assert [entry["epoch"] for entry in found] == [1, 2, 3]
    assert [entry["val_base"] is None for entry in found] == [True, False, False]
    with (run.path / "log.csv").open() as file:
        assert [row["val_base"] == "" for row in csv.DictReader(file) if not row["lr"]] == [True, False, False]
    assert (run.path / "best.safetensors").is_file()


def test_validation_pictures_that_are_not_there_are_named_before_the_first_step(
    copied_world: Path, training_cache: Path, tmp_path: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    picture = sorted((copied_world / "val2017").iterdir())[3]
    picture.unlink()
    job = TrainConfig(
        data=DataPaths(copied_world),
        cache=training_cache,
        out=tmp_path / "run",
        recipe=micro_recipe(),
        protocol=str(copied_world / "protocol.toml"),
        device="cpu",
        validation=DataPaths(copied_world),
    )
    with pytest.raises(HdovdError, match=f"val2017: not there: 1 of 8 validation pictures .{picture.name}"):
        train(job)
    assert not (tmp_path / "run").exists()


# --- the oracle ---


def _oracle(world: Path, training_cache: Path, out: Path, recipe: Recipe) -> TrainConfig:
    return TrainConfig(
        data=DataPaths(world),
        cache=training_cache,
        out=out,
        recipe=recipe,
        protocol=str(world / "protocol.toml"),
        device="cpu",
        oracle=True,
    )


def test_an_oracle_is_trained_on_all_classes_in_the_protocols_order(
    world: Path, training_cache: Path, tmp_path: Path, micro_recipe: Callable[..., Recipe], kept: list[int]
) -> None:
    job = _oracle(world, training_cache, tmp_path / "run", micro_recipe(*PRESETS["base-only"]))
    data = training_data(job, load_protocol(job.protocol))
    assert isinstance(data, TrainingSet)
    tree = json.loads((world / "annotations" / "instances_train2017.json").read_text())
    category = {a["id"]: a["category_id"] for a in tree["annotations"]}
    name = {c["id"]: c["name"] for c in tree["categories"]}
    found = {
        number: (BASE + NOVEL)[label]
        for image in data.images
        for number, label in zip(image.annotation_ids.tolist(), image.labels.tolist(), strict=True)
    }
    assert found == {number: name[own] for number, own in category.items()}
    only_novel = {a["image_id"] for a in tree["annotations"]} - set(kept)
    assert only_novel
    assert only_novel <= set(data.image_ids().tolist())


def test_an_oracle_is_refused_with_distillation_and_in_another_runs_folder(
    world: Path, training_cache: Path, tmp_path: Path, micro_recipe: Callable[..., Recipe], base_only: RunFolder
) -> None:
    job = _oracle(world, training_cache, tmp_path / "run", micro_recipe("loss.instance.enabled=false"))
    with pytest.raises(HdovdError, match=r"without distillation.*--preset base-only"):
        train(job)
    assert not job.out.exists()
    shutil.copytree(base_only.path, job.out)
    with pytest.raises(HdovdError, match=r"oracle differs: asked for true, began with false"):
        train(replace(job, recipe=micro_recipe(*PRESETS["base-only"]), resume=True))


def test_backgrounds_of_the_nouns_are_negatives(
    distilled: RunFolder, training_cache: Path, train_micro: TrainMicro, tmp_path: Path
) -> None:
    """Their cached texts are kept with the weights; without the class level, or the recipe's word, there are none."""
    reader = FeatureCache(training_cache)
    grounds = [reader.names(Level.NOUN).index(name) for name in sorted(GROUNDS)]
    rows = _weights(distilled)["background_texts"]
    assert len(rows) == len(grounds)
    np.testing.assert_array_equal(rows.numpy(), reader.embeddings(Level.NOUN)[grounds])
    for number, setting in enumerate(("loss.class.enabled=false", "loss.class.backgrounds=false")):
        run = train_micro(tmp_path / str(number), "train.epochs=1", setting)
        assert "background_texts" not in _weights(run)
