"""Ablations before anything runs: the cells of a grid, what is done and what is left, and what is refused."""

from __future__ import annotations

import fcntl
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from hdovd.config.recipe import PRESETS, load_recipe
from hdovd.core import HdovdError
from hdovd.data import DataPaths, load_protocol
from hdovd.pipelines.ablation.ablate import (
    LOCK,
    STAGES,
    AblateConfig,
    ablate,
    commands,
    level_keys,
    places,
    plan,
    stages_left,
)
from hdovd.pipelines.ablation.grid import cells_of
from hdovd.pipelines.common.settings import flat

SWITCHES = ("loss.instance.enabled=true,false", "loss.class.enabled=true,false")


@pytest.fixture
def config(world: Path, cache: Path, tmp_path: Path) -> AblateConfig:
    return AblateConfig(
        data=DataPaths(world),
        cache=cache,
        out=tmp_path / "out",
        grid=SWITCHES[:1],
        recipe="demo",
        settings=("train.epochs=1",),
        seeds=2,
        protocol=str(world / "protocol.toml"),
        device="cpu",
    )


@pytest.fixture
def begun(config: AblateConfig) -> Callable[[AblateConfig], Path]:
    """Leave the folder of an ablation's first run as training leaves it, without metrics."""

    def write(config: AblateConfig) -> Path:
        first = plan(config)[0]
        first.path.mkdir(parents=True)
        (first.path / "config.toml").write_text(first.recipe.to_toml())
        (first.path / "run.json").write_text(
            json.dumps({"protocol": load_protocol(config.protocol).to_dict(), "cache": {"levels": level_keys(config)}})
        )
        return first.path

    return write


# --- cells ---


def test_all_combinations_in_order_with_readable_names() -> None:
    cells = cells_of("demo", (), [*SWITCHES, "train.lr=0.1,2e-3"])
    assert len(cells) == len({cell.name for cell in cells}) == 8
    assert cells[0].name == "instance-on_class-on_lr-0.1"
    assert cells[-1].name == "instance-off_class-off_lr-0.002"
    assert cells[1].values == {"loss.instance.enabled": True, "loss.class.enabled": True, "train.lr": 0.002}
    recipe = cells[-1].recipe("demo", ("train.epochs=3",), 7)
    assert recipe == load_recipe(
        "demo", ["loss.instance.enabled=false", "loss.class.enabled=false", "train.epochs=3", "train.seed=7"]
    )


def test_names_stay_when_the_grid_grows() -> None:
    few, more = (cells_of("demo", (), [f"loss.class.weight={values}"]) for values in ("1.0,2.0", "1.0,2.0,3.0"))
    assert [cell.name for cell in few] == [cell.name for cell in more][:2] == ["class.weight-1.0", "class.weight-2.0"]


def test_values_that_hold_commas_and_values_that_cannot_be_a_name() -> None:
    cells = cells_of("demo", (), ["train.step_epochs=[], [2,3]", 'detector.backbone.weights="a,b/c.pth",none'])
    assert [cell.values["train.step_epochs"] for cell in cells] == [[], [], [2, 3], [2, 3]]
    assert [cell.values["detector.backbone.weights"] for cell in cells[:2]] == ["a,b/c.pth", "none"]
    assert all("/" not in cell.name and not cell.name.startswith((".", "-")) for cell in cells)
    assert len({cell.name for cell in cells}) == 4
    long = ["detector.backbone.weights=" + ",".join(f"/{'x' * 300}/{i}/weights.pth" for i in range(2))]
    assert all(len(cell.name) < 100 for cell in cells_of("demo", (), long))


def test_the_grid_may_turn_on_what_a_preset_turned_off() -> None:
    """Levels one by one, from nothing."""
    cells = cells_of("demo", (), SWITCHES, PRESETS["base-only"])
    assert len(cells) == 4


def test_a_loss_that_the_recipe_adds_can_be_a_cell() -> None:
    cells = cells_of("demo", (), ['loss.extra={},{mine={use="a:B",weight=1.0}}'])
    assert [cell.values["loss.extra"] for cell in cells] == [{}, {"mine": {"use": "a:B", "weight": 1.0}}]
    assert len({cell.name for cell in cells}) == 2


def test_without_a_grid_there_is_one_cell() -> None:
    assert [(cell.name, cell.values) for cell in cells_of("demo", (), [])] == [("recipe", {})]


@pytest.mark.parametrize(
    ("grid", "settings", "expected"),
    [
        (
            ["loss.instanse.enabled=true,false"],
            [],
            r"unknown key loss\.instanse\.enabled; the nearest valid one is loss\.instance\.enabled",
        ),
        (["train.lr=0.1,fast"], [], r"train\.lr = 'fast'"),
        (["train.lr"], [], "KEY=VALUE"),
        (["train.lr=0.1,"], [], "KEY=VALUE"),
        (["=1"], [], "KEY=VALUE"),
        (["train.lr=0.1,0.10"], [], r"train\.lr=0\.10 and train\.lr=0\.1 are the same cell"),
        (["train.lr=0.1", "train.lr=0.2"], [], "a key twice"),
        (["train.seed=1,2"], [], "--seeds N"),
        (["train.lr=0.1,0.2"], ["train.lr=0.3"], r"--grid says what train\.lr is"),
        (["train.lr=0.1,0.2"], ["train.seed=3"], r"--seeds says what train\.seed is"),
        (["loss.image=true,false"], [], r"loss\.image"),
    ],
)
def test_a_wrong_grid_is_refused(grid: list[str], settings: list[str], expected: str) -> None:
    with pytest.raises(HdovdError, match=f"(?s){expected}"):
        cells_of("demo", settings, grid)


# --- what is left to do ---


def test_what_is_left_follows_the_run_folder(config: AblateConfig, begun: Callable[[AblateConfig], Path]) -> None:
    first, keys = plan(config)[0], level_keys(config)
    assert stages_left(first, config, keys) == STAGES
    path = begun(config)
    assert stages_left(first, config, keys) == STAGES
    (path / "log.jsonl").write_text('{"step": 3, "epoch": 1}\n')
    (path / "model.safetensors").touch()
    assert stages_left(first, config, keys) == ("eval",)
    (path / "checkpoint.pt").touch()  # training itself knows best how far it is
    assert stages_left(first, config, keys) == STAGES
    (path / "metrics.json").write_text('{"ap50"')  # killed while it was written
    assert stages_left(first, config, keys) == STAGES
    (path / "metrics.json").write_text('{"ap50": {"novel": 1.0, "base": 2.0, "all": 1.5}}')
    assert stages_left(first, config, keys) == ()
    assert stages_left(first, replace(config, settings=(*config.settings, "train.workers=1")), keys) == ()
    [auto] = [
        one
        for one in plan(replace(config, settings=(*config.settings, "train.precision=auto")))
        if one.name == first.name
    ]
    assert auto.recipe.train.precision == "auto"
    assert stages_left(auto, config, keys) == ()


def test_commands_say_all_that_the_run_needs(config: AblateConfig) -> None:
    validation, data = DataPaths(None, Path("v"), Path("w")), DataPaths(Path("d"), Path("i"), Path("a"), "voc")
    config = replace(config, preset="base-only", data=data, validation=validation)
    first = plan(config)[0]
    train, evaluate = commands(first, config)
    assert train[:4] == (sys.executable, "-m", "hdovd", "train")
    assert "--resume" in train
    pairs = list(pairwise(train))
    for pair in (
        ("--preset", "base-only"),
        ("--images", "i"),
        ("--annotations", "a"),
        ("--data", "d"),
        ("--form", "voc"),
        ("--set", "train.epochs=1"),
        ("--set", "loss.instance.enabled=true"),
        ("--set", "train.seed=0"),
        ("--protocol", config.protocol),
    ):
        assert pair in pairs
    assert evaluate[4:] == (str(first.path), "--images", "v", "--annotations", "w", "--device", "cpu")
    tar = replace(config, cache="shards/{000000..000002}.tar")
    assert "--data" not in commands(first, tar)[0]
    first.left = ("eval",)
    assert commands(first, config) == (evaluate,)
    first.left = ()
    assert commands(first, config) == ()


def test_the_oracle_is_trained_on_all_classes_and_told_from_base_only(
    config: AblateConfig, begun: Callable[[AblateConfig], Path]
) -> None:
    config = replace(config, oracle=True, preset="base-only", seeds=1, grid=())
    base_only, oracle = plan(config)
    assert [p.name for p in (base_only, oracle)] == ["recipe/seed0", "oracle/seed0"]
    assert [p.cell.arm for p in (base_only, oracle)] == ["base-only", "oracle"]
    trained = [commands(p, config)[0] for p in (base_only, oracle)]
    assert ["--oracle" in words for words in trained] == [False, True]
    assert all(("--protocol", config.protocol) in pairwise(words) for words in trained)
    begun(config).rename(config.out / "moved")
    oracle.path.parent.mkdir(parents=True)
    (config.out / "moved").rename(oracle.path)  # base-only, where the oracle should be
    with pytest.raises(HdovdError, match="oracle differs: asked for true, began with false"):
        stages_left(oracle, config, level_keys(config))


def test_jobs_share_cores_and_gpus(config: AblateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert places(replace(config, jobs=3), 9) == [{"OMP_NUM_THREADS": "2"}] * 3
    auto = places(replace(config, jobs=3, device="auto"), 9)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in auto] == ["3", "5", "3"]
    assert places(replace(config, jobs=5), 1) == [{"OMP_NUM_THREADS": "8"}]
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)  # as the user said
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert places(replace(config, jobs=2, device="auto"), 9) == [{"OMP_NUM_THREADS": "1"}] * 2


def test_dry_run_writes_nothing(config: AblateConfig, begun: Callable[[AblateConfig], Path]) -> None:
    found = ablate(replace(config, dry_run=True, out=config.out / "deep"))
    assert [planned.left for planned in found.runs] == [STAGES] * 4
    assert not config.out.exists()


# --- refused before anything runs ---


def test_another_config_in_a_runs_folder_is_named(
    config: AblateConfig, begun: Callable[[AblateConfig], Path], tmp_path: Path
) -> None:
    path = begun(config)
    with pytest.raises(
        HdovdError, match=r"seed0 began otherwise:\s+recipe\.train\.epochs differs: asked for 2, began with 1"
    ):
        ablate(replace(config, settings=("train.epochs=2",)))
    protocol = tmp_path / "protocol.toml"
    protocol.write_text(Path(config.protocol).read_text().replace('name = "demo-world"', 'name = "other"'))
    with pytest.raises(HdovdError, match=r"protocol\.name differs: asked for \"other\""):
        ablate(replace(config, protocol=str(protocol)))
    (path / "run.json").write_text("{")
    with pytest.raises(HdovdError, match=r"seed0.run\.json is damaged"):
        ablate(config)


def test_a_run_from_before_proposals_were_in_recipes_is_the_same(
    config: AblateConfig, begun: Callable[[AblateConfig], Path]
) -> None:
    path = begun(config)
    text = (path / "config.toml").read_text()
    (path / "config.toml").write_text(text[: text.index("[proposals]")])
    assert plan(config)[0].left == STAGES


def test_runs_of_other_features_are_refused(config: AblateConfig, begun: Callable[[AblateConfig], Path]) -> None:
    path = begun(config)
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(record | {"cache": {"levels": {"instance": {"key": "other"}}}}))
    with pytest.raises(HdovdError, match=r"(?s)cache\.instance differs: asked for .*, began with .other."):
        ablate(config)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"cache": Path("nowhere")}, "no feature cache at nowhere"),
        ({"features": "other"}, "other"),
        ({"validation": DataPaths(Path("nowhere"))}, "nowhere: no such folder"),
        ({"data": DataPaths(Path("nowhere"))}, "nowhere: no such folder"),
    ],
)
def test_data_and_cache_are_checked_once_before_anything_runs(
    config: AblateConfig, change: dict[str, object], expected: str
) -> None:
    with pytest.raises(HdovdError, match=expected):
        ablate(replace(config, **change))  # type: ignore[arg-type]
    assert not list(config.out.rglob("seed*"))


def test_an_oracle_is_refused_where_there_is_nothing_to_train_it_on(config: AblateConfig, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"tar shards shards/\{000000\.\.000002\}\.tar hold none: give the Zarr cache"):
        ablate(replace(config, oracle=True, cache="shards/{000000..000002}.tar"))
    protocol = tmp_path / "protocol.toml"
    protocol.write_text(re.sub(r"novel = \[[^]]*\]", "novel = []", Path(config.protocol).read_text()))
    with pytest.raises(HdovdError, match="has no novel classes"):
        ablate(replace(config, oracle=True, protocol=str(protocol)))
    assert not config.out.exists()


def test_two_ablations_do_not_share_a_folder(config: AblateConfig) -> None:
    config.out.mkdir()
    with (config.out / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(HdovdError, match="at work in"):
            ablate(config)


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": 0},
        {"jobs": 0},
        {"data": DataPaths(None, Path("i"), Path("a"))},
        {"grid": ("pseudo_boxes.reliability_width=0.1,0.2",), "calibration": Path("c.toml")},
    ],
)
def test_config_is_checked(config: AblateConfig, change: dict[str, object]) -> None:
    with pytest.raises(HdovdError, match=r"expected|--val-images|leave one of them out"):
        replace(config, **change)  # type: ignore[arg-type]


def test_recipe_settings_are_the_recipe() -> None:
    settings = flat(load_recipe("demo").model_dump(by_alias=True))
    assert settings["loss.class.enabled"] is True
    assert load_recipe("demo", [f"{key}={json.dumps(value)}" for key, value in settings.items()]) == load_recipe("demo")
