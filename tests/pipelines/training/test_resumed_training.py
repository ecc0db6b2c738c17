"""Runs that were killed and resumed, against unbroken ones: the same losses, weights and memories, to the bit."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import train_scenes
from forked_group import ranks
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from hdovd.config.recipe import PRESETS, Recipe
from hdovd.core import HdovdError, Stopped, lines_to
from hdovd.data import DataPaths
from hdovd.pipelines.extraction.export import ExportConfig, export_tars
from hdovd.pipelines.runs import RunFolder, read_run
from hdovd.pipelines.runs.folder import replace_file
from hdovd.pipelines.runs.listing import State
from hdovd.pipelines.training.hooks import load_checkpoint
from hdovd.pipelines.training.train import TrainConfig, train

# 23 images: 5 steps of 4 an epoch; the optimiser has a state, the schedule moves
SETTINGS = (
    "train.epochs=2",
    "train.batch_size=4",
    "input.flip=0.5",
    "train.optimizer=adamw",
    "train.warmup_iterations=2",
    "input.short_side=64",
    "input.long_side=96",
)
Play = Callable[..., None]


def _torchrun(job: dict[str, Any], processes: int) -> int:
    """What torchrun does, but that its processes are forked and have imported everything already; for train_scenes."""
    launch = LaunchConfig(
        1, 1, processes, run_id="resumed", rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork"
    )
    return next(code for code in elastic_launch(launch, train_scenes.main)(job).values() if code is not None)


@pytest.fixture(scope="module")
def play(world: Path, training_cache: Path, micro_settings: list[str]) -> Play:
    """Run a scene, which is to end with `code`; one that is killed saves after every step."""

    def run(
        out: Path,
        *,
        cache: Path | None = None,
        torchrun: bool = False,
        world_size: int = 1,
        settings: tuple[str, ...] = (),
        code: int = 0,
        **job: Any,
    ) -> None:
        sets = [word for word in micro_settings[2:] if word != "--set"]
        whole = {
            "data": None if cache else str(world),
            "cache": str(cache or training_cache),
            "out": str(out),
            "protocol": str(world / "protocol.toml"),
            "settings": [*sets, *SETTINGS, *settings],
            "save_minutes": 0.0 if code == -9 else 60.0,
        } | job
        main = partial(_torchrun, processes=2) if torchrun else train_scenes.main
        found, printed = ranks(partial(main, whole), out.with_name("printed.txt"), world_size)
        assert found == code, printed

    return run


@pytest.fixture(scope="module")
def unbroken(play: Play, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    play(out)
    return out


def _told(run: Path) -> list[dict[str, Any]]:
    """The log without what a clock or a machine decides."""
    return [
        {name: value for name, value in entry.items() if name not in ("images_per_s", "data_wait", "memory_gb")}
        for entry in RunFolder(run).entries()
    ]


def _same(one: Path, two: Path) -> None:
    assert _told(one) == _told(two)
    for name, value in load_file(one / "model.safetensors").items():
        assert torch.equal(value, load_file(two / "model.safetensors")[name]), name
    first, second = load_checkpoint(one), load_checkpoint(two)
    assert first is not None
    assert second is not None
    assert first["step"] == second["step"]
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    for number, state in first["optimizer"]["state"].items():
        assert all(torch.equal(value, second["optimizer"]["state"][number][name]) for name, value in state.items())
    assert ("ema" in first) == ("ema" in second)
    if "ema" in first:
        assert first["ema"]["updates"] == second["ema"]["updates"] == first["step"]
        assert all(
            torch.equal(value, second["ema"]["weights"][name]) for name, value in first["ema"]["weights"].items()
        )


@pytest.fixture(scope="module")
def killed(play: Play, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its first epoch, went on, and was killed in its last one: to be copied."""
    out = tmp_path_factory.mktemp("killed") / "run"
    for kill_at in (3, 8):
        play(out, kill_at=kill_at, resume=kill_at == 8, code=-9)
        assert load_checkpoint(out)["step"] == kill_at - 1  # type: ignore[index] # killed before that of this step
    return out


def test_killed_in_mid_epoch_and_resumed_is_bit_equal(play: Play, unbroken: Path, killed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed, tmp_path / "run")
    play(tmp_path / "run", resume=True)
    _same(tmp_path / "run", unbroken)
    assert [entry["step"] for entry in RunFolder(tmp_path / "run").record()["resumed"]] == [2, 7]


def test_micro_batches_and_averaged_weights_resume_too(play: Play, unbroken: Path, tmp_path: Path) -> None:
    """As many steps as without, and the same bits after kills: as an epoch's weights are kept, and within one."""
    settings = ("train.accumulate=2", "train.ema=0.9")
    play(tmp_path / "whole", settings=settings)
    play(tmp_path / "run", settings=settings, kill_in_catch_up=5, code=-9)
    play(tmp_path / "run", settings=settings, resume=True, kill_at=8, code=-9)
    play(tmp_path / "run", settings=settings, resume=True)
    _same(tmp_path / "run", tmp_path / "whole")
    assert [entry["step"] for entry in _told(tmp_path / "whole")] == [entry["step"] for entry in _told(unbroken)]


def test_killed_before_the_first_checkpoint_and_long_after_one(play: Play, unbroken: Path, tmp_path: Path) -> None:
    """It begins anew; and what was logged after the checkpoint is taken back."""
    play(tmp_path / "run", kill_at=2, save_minutes=60.0, code=-9)
    assert load_checkpoint(tmp_path / "run") is None
    play(tmp_path / "run", kill_at=9, save_minutes=60.0, resume=True, code=-9)
    assert load_checkpoint(tmp_path / "run")["step"] == 5  # type: ignore[index]
    assert _told(tmp_path / "run")[-1]["step"] == 9
    play(tmp_path / "run", resume=True)
    _same(tmp_path / "run", unbroken)


def test_workers_may_change_and_a_signal_to_all_processes_of_a_job_spares_them(
    play: Play, unbroken: Path, tmp_path: Path
) -> None:
    """As a terminal, SLURM and torchrun send it: a worker that dies of it would take the run with it."""
    workers = ("train.workers=2",)
    play(tmp_path / "run", kill_at=3, settings=workers, code=-9)
    play(tmp_path / "run", kill_at=8, signal=int(signal.SIGTERM), group=True, resume=True, settings=workers, code=75)
    assert load_checkpoint(tmp_path / "run")["step"] == 8  # type: ignore[index]
    play(tmp_path / "run", resume=True, settings=("train.workers=1",))
    _same(tmp_path / "run", unbroken)


def test_tar_shards_resume_too(play: Play, training_cache: Path, tmp_path: Path) -> None:
    """The order is that of the streams that the run began with."""
    export_tars(ExportConfig(cache=training_cache, out=tmp_path / "shards", samples=5))
    play(tmp_path / "whole", cache=tmp_path / "shards", settings=("train.workers=2",))
    play(tmp_path / "tar", cache=tmp_path / "shards", settings=("train.workers=2",), kill_at=8, code=-9)
    play(tmp_path / "tar", cache=tmp_path / "shards", resume=True)
    _same(tmp_path / "tar", tmp_path / "whole")


def test_a_signal_saves_and_ends_with_a_code_of_its_own(play: Play, unbroken: Path, tmp_path: Path) -> None:
    for number, code, kill_at in ((signal.SIGUSR1, 75, 3), (signal.SIGINT, 130, 8)):
        play(tmp_path / "run", kill_at=kill_at, signal=int(number), resume=kill_at == 8, code=code)
        assert load_checkpoint(tmp_path / "run")["step"] == kill_at  # type: ignore[index]
        assert (tmp_path / "run" / "stopped").exists()
    play(tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "stopped").exists()
    _same(tmp_path / "run", unbroken)


def test_killed_as_an_epoch_ends(play: Play, unbroken: Path, tmp_path: Path) -> None:
    """Right after its checkpoint, before its weights are kept: the first epoch's, and the last one's."""
    play(tmp_path / "run", kill_in_catch_up=5, save_minutes=60.0, code=-9)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    play(tmp_path / "run", kill_in_catch_up=10, save_minutes=60.0, resume=True, code=-9)
    play(tmp_path / "run", resume=True)
    _same(tmp_path / "run", unbroken)


def test_a_run_that_was_evaluated_on_its_way_is_not_finished(play: Play, killed: Path, tmp_path: Path) -> None:
    """An AP of weights on the way does not stand beside those of the end."""
    shutil.copytree(killed, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"ap50": {"novel": 1.0, "base": 2.0, "all": 1.5}}))
    assert read_run(tmp_path / "run").state is State.STOPPED
    play(tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert read_run(tmp_path / "run").state is State.NOT_EVALUATED


def test_killed_while_it_validates(play: Play, unbroken: Path, tmp_path: Path) -> None:
    """The epoch is not trained again, and its validation is made up for; validating changes nothing else."""
    play(tmp_path / "whole", validate=True)
    play(tmp_path / "run", validate=True, kill_in_validation=1, save_minutes=60.0, code=-9)
    assert load_checkpoint(tmp_path / "run")["step"] == 5  # type: ignore[index]
    play(tmp_path / "run", validate=True, kill_in_validation=2, save_minutes=60.0, resume=True, code=-9)
    assert load_checkpoint(tmp_path / "run")["step"] == 10  # type: ignore[index]
    play(tmp_path / "run", validate=True, resume=True)
    _same(tmp_path / "run", tmp_path / "whole")
    entries = _told(tmp_path / "run")
    assert [entry["epoch"] for entry in entries if "val_all" in entry] == [1, 2]
    assert [entry for entry in entries if "val_all" not in entry] == _told(unbroken)
    with (tmp_path / "run" / "log.csv").open() as file:
        assert [row["val_all"] for row in csv.DictReader(file) if row["val_all"]] == [
            str(entry["val_all"]) for entry in entries if "val_all" in entry
        ]
    assert (tmp_path / "run" / "best.safetensors").is_file()


# --- several processes ---

# What is each process's own: the statistics of batch norm, and how far pictures are padded; here all to 64 x 64 pixels.
# Plain SGD does not blow rounding up.
FROZEN = (
    "detector.backbone.norm=frozen",
    "train.precision=fp32",
    "input.short_side=64",
    "input.long_side=64",
    "train.optimizer=sgd",
    "train.lr=0.002",
)


@pytest.fixture(scope="module")
def frozen(unbroken: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Settings for a backbone that is frozen where it normalises: it starts from some weights."""
    file = tmp_path_factory.mktemp("weights") / "backbone.pth"
    body = {
        name.removeprefix("backbone.body."): value
        for name, value in load_file(unbroken / "model.safetensors").items()
        if name.startswith("backbone.body.")
    }
    torch.save(body, file)
    return (*FROZEN, f"detector.backbone.weights={file}")


@pytest.fixture(scope="module")
def frozen_alone(play: Play, frozen: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's run with them."""
    out = tmp_path_factory.mktemp("frozen") / "run"
    play(out, settings=frozen)
    return out


def _close(one: Path, two: Path, tolerance: float) -> None:
    """Loss curves and weights."""
    first, second = _told(one), _told(two)
    assert [entry["step"] for entry in first] == [entry["step"] for entry in second]
    for a, b in zip(first, second, strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (a["step"], name)
    other = load_file(two / "model.safetensors")
    for name, value in load_file(one / "model.safetensors").items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance)


def test_two_processes_have_the_loss_curve_of_one(
    play: Play, frozen: tuple[str, ...], frozen_alone: Path, tmp_path: Path
) -> None:
    """Sums come in another order, no more."""
    play(tmp_path / "two", settings=frozen, torchrun=True)
    _close(frozen_alone, tmp_path / "two", 1e-3)


def test_micro_batches_of_two_processes_make_the_steps_of_one(
    play: Play, frozen: tuple[str, ...], tmp_path: Path
) -> None:
    """Without distillation no divisor differs between micro-batches: each image has as many RoIs and anchors."""
    settings = (*frozen, *PRESETS["base-only"], "train.clip_norm=1.0", "train.epochs=1")
    play(tmp_path / "one", settings=settings)
    play(tmp_path / "two", settings=(*settings, "train.accumulate=2"), world_size=2)
    _close(tmp_path / "one", tmp_path / "two", 1e-3)


def test_a_run_of_two_processes_goes_on_with_one_and_back(
    play: Play, frozen: tuple[str, ...], frozen_alone: Path, tmp_path: Path
) -> None:
    """Each image still once an epoch: the curve is that of the unbroken run."""
    settings = frozen
    play(tmp_path / "run", settings=settings, world_size=2, kill_at=3, signal=int(signal.SIGTERM), code=75)
    assert load_checkpoint(tmp_path / "run")["step"] == 3  # type: ignore[index]
    play(tmp_path / "run", settings=settings, resume=True, kill_at=8, code=-9)
    play(tmp_path / "run", settings=settings, resume=True, world_size=2)
    _close(frozen_alone, tmp_path / "run", 1e-3)


# --- refusals ---


def _job(world: Path, cache: Path, out: Path, recipe: Recipe, **changes: Any) -> TrainConfig:
    return TrainConfig(
        **(
            {
                "data": DataPaths(world),
                "cache": cache,
                "out": out,
                "recipe": recipe,
                "protocol": str(world / "protocol.toml"),
                "device": "cpu",
                "resume": True,
            }
            | changes
        )
    )


def test_another_recipe_is_refused_naming_what_differs(
    world: Path, training_cache: Path, unbroken: Path, tmp_path: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    out = Path(shutil.copytree(unbroken, tmp_path / "run"))
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(
        HdovdError, match=r"began otherwise:\n  recipe\.train\.lr differs: asked for 0\.5, began with 0\.002"
    ):
        train(_job(world, training_cache, out, micro_recipe(*SETTINGS, "train.lr=0.5")))
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_a_damaged_checkpoint_is_named(
    world: Path, training_cache: Path, unbroken: Path, tmp_path: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    out = Path(shutil.copytree(unbroken, tmp_path / "run"))
    (out / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes()[:1000])
    with pytest.raises(HdovdError, match=r"checkpoint\.pt cannot be read.*--overwrite"):
        train(_job(world, training_cache, out, micro_recipe(*SETTINGS)))


def test_a_run_without_a_checkpoint_is_refused_as_such(
    world: Path, training_cache: Path, unbroken: Path, tmp_path: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    out = Path(shutil.copytree(unbroken, tmp_path / "run"))
    (out / "checkpoint.pt").unlink()
    with pytest.raises(HdovdError, match=r"holds a run without a checkpoint\.pt: it cannot be resumed"):
        train(_job(world, training_cache, out, micro_recipe(*SETTINGS)))


def test_other_images_are_refused(
    world: Path,
    training_cache: Path,
    unbroken: Path,
    tmp_path: Path,
    copied_world: Path,
    play: Play,
    micro_recipe: Callable[..., Recipe],
) -> None:
    """Base-only runs check nothing of their data against the cache."""
    settings = [*SETTINGS, *PRESETS["base-only"], "train.epochs=1"]
    train(_job(world, training_cache, tmp_path / "run", micro_recipe(*settings)))
    file = copied_world / "annotations" / "instances_train2017.json"
    tree = json.loads(file.read_text())
    tree["images"] = tree["images"][1:]
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] in {i["id"] for i in tree["images"]}]
    file.write_text(json.dumps(tree))
    with pytest.raises(HdovdError, match="the run began with 23 images, now there are 22"):
        train(_job(copied_world, training_cache, tmp_path / "run", micro_recipe(*settings)))


def test_a_full_disk_keeps_the_checkpoint_that_is_there(tmp_path: Path) -> None:
    torch.save({"step": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(HdovdError, match=r"checkpoint\.pt cannot be written: No space left .*with --resume"):
        replace_file(tmp_path / "checkpoint.pt", _no_room)
    assert load_checkpoint(tmp_path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def _no_room(partial: Path) -> None:
    partial.write_bytes(b"half of it")
    raise OSError(28, "No space left on device")


def test_a_run_of_before_these_choices_goes_on(play: Play, unbroken: Path, killed: Path, tmp_path: Path) -> None:
    """Its recipe has no such keys, nor has its checkpoint."""
    shutil.copytree(killed, tmp_path / "run")
    file = tmp_path / "run" / "config.toml"
    later = ("accumulate", "ema", "compile")
    assert sum(line.startswith(later) for line in file.read_text().splitlines()) == len(later)
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if not line.startswith(later)))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(
        json.dumps({name: record[name] for name in record if name not in ("files", "sha256")})
    )
    assert "ema" not in load_checkpoint(tmp_path / "run")  # type: ignore[operator]
    play(tmp_path / "run", resume=True)
    _same(tmp_path / "run", unbroken)


def test_a_finished_run_is_left_as_it_is(
    world: Path, training_cache: Path, unbroken: Path, tmp_path: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    out = Path(shutil.copytree(unbroken, tmp_path / "run"))
    before = {name: (out / name).read_bytes() for name in ("model.safetensors", "log.jsonl", "checkpoint.pt")}
    lines: list[str] = []
    with lines_to(lines.append):
        train(_job(world, training_cache, out, micro_recipe(*SETTINGS)))
    assert {name: (out / name).read_bytes() for name in before} == before
    assert lines[-1].endswith("is finished already")


def test_a_stop_says_how_to_go_on() -> None:
    stopped = Stopped("stopped at step 3", 75)
    assert isinstance(stopped, HdovdError)
    assert stopped.code == 75
