"""Ablations: the cells of a grid, each with several seeds, trained and evaluated over one cache; then a table.

Every run is a run folder of its own, OUT/CELL/seedK, made by `hdovd train` and `hdovd eval` in
processes of their own; what they printed is in OUT/CELL/seedK.log. The same call skips what is done and goes on with
the rest.
"""

import fcntl
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hdovd.cache import is_tar_form, require_same
from hdovd.cache.reader import FeatureCache
from hdovd.cache.tar_shards import TarShards
from hdovd.config.recipe import PRESETS, Recipe
from hdovd.core import HdovdError, counted, log
from hdovd.data import METRICS, DataPaths, load_protocol, shown_groups
from hdovd.data.forms.base import AUTO
from hdovd.pipelines.ablation.config import AblateConfig
from hdovd.pipelines.ablation.grid import (
    AblationTable,
    Cell,
    Row,
    cells_of,
    note,
    scores_of,
    with_arms,
    with_gap,
    write_tables,
)
from hdovd.pipelines.common.process import Job, StopSignal, log_end, run_jobs, usable_cores
from hdovd.pipelines.common.settings import value_at
from hdovd.pipelines.runs import ORACLE, RunFolder, init_hash, read_run

LOCK = ".ablate.lock"
STAGES = ("train", "eval")


@dataclass(slots=True)
class Planned:
    """One run of an ablation. `left`: the commands that are left to do. `failed`: why it did."""

    cell: Cell
    seed: int
    recipe: Recipe
    path: Path
    left: tuple[str, ...] = STAGES
    failed: str = ""

    @property
    def name(self) -> str:
        return f"{self.cell.name}/seed{self.seed}"


@dataclass(slots=True)
class Ablation:
    """What came of it. `stopped`: the signal that ended it before all was done, or 0."""

    table: AblationTable
    runs: list[Planned]
    stopped: int = 0

    @property
    def left(self) -> int:
        return sum(bool(run.left) for run in self.runs)


def ablate(config: AblateConfig) -> Ablation:
    """Run what is not done yet and write the tables. A run that fails is told, and the others go on.

    Raises HdovdError, before anything runs, for a wrong grid, data or a cache that are not there, and runs of another
    config, or another cache, in OUT. What else is wrong with the data is told by each run.
    """
    config.check()
    plans = plan(config)
    found = Ablation(_table(config, plans), plans)
    if config.dry_run:
        return found
    config.out.mkdir(parents=True, exist_ok=True)
    with _locked(config.out) as lock:
        to_do = [planned for planned in plans if planned.left]
        log(
            f"{counted(len(plans) // config.seeds, 'cell')} x {counted(config.seeds, 'seed')}: "
            f"{len(plans) - len(to_do)} of {len(plans)} runs done"
        )
        if to_do:
            found.stopped = _run(config, plans, to_do, lock)
        found.table = _table(config, plans)
        write_tables(found.table, config.out)
    return found


def plan(config: AblateConfig) -> list[Planned]:
    """All runs, cell by cell, and what is left of each. Raises HdovdError for a wrong recipe or grid, and as
    `stages_left`.
    """
    cells = cells_of(config.recipe, config.settings, config.grid, PRESETS[config.preset] if config.preset else ())
    if config.oracle:
        cells = with_arms(cells, config.recipe, config.all_settings)
    plans = [
        Planned(
            cell, seed, cell.recipe(config.recipe, config.all_settings, seed), config.out / cell.name / f"seed{seed}"
        )
        for cell in cells
        for seed in range(config.seeds)
    ]
    keys = level_keys(config)
    for planned in plans:
        planned.left = stages_left(planned, config, keys)
    return plans


def level_keys(config: AblateConfig) -> dict[str, Any]:
    """The keys of the levels that all runs read, as the record of a run has them. Raises HdovdError."""
    tar = is_tar_form(config.cache)
    features = TarShards(str(config.cache)).meta.features if tar else FeatureCache(config.cache, config.features).set
    return {str(level): {"key": key} for level, key in features.levels.items()}


def stages_left(planned: Planned, config: AblateConfig, keys: dict[str, Any]) -> tuple[str, ...]:
    """The commands that are left for a run. Raises HdovdError if its folder holds a run of another config, protocol or
    cache, naming what differs.
    """
    if not (planned.path / "run.json").exists():
        return STAGES
    folder, asked = RunFolder(planned.path), {"cache": {"levels": keys}, ORACLE: planned.cell.arm == ORACLE}
    recipe = planned.recipe.with_precision(folder.written_recipe().train.precision)
    folder.check_same(recipe, load_protocol(config.protocol), asked)
    require_same(
        {"weights": config.init and init_hash(config.init)},
        {"weights": value_at(folder.record(), "init.sha256")},
        f"{planned.path} began with other weights than those of --init {config.init}",
        "Give another --out, or delete that folder",
        sides=("asked for", "began with"),
    )
    run = read_run(planned.path)
    if run.epochs_done != run.epochs:
        return STAGES
    if run.ap:
        return ()
    return STAGES if (planned.path / "checkpoint.pt").exists() else STAGES[1:]  # with one, training knows where it is


def commands(planned: Planned, config: AblateConfig) -> tuple[tuple[str, ...], ...]:
    """The command lines that are left for a run."""
    hdovd, device = (sys.executable, "-m", "hdovd"), ("--device", config.device)
    options = {
        "--cache": config.cache,
        "--out": planned.path,
        "--recipe": config.recipe,
        "--preset": config.preset,
        "--protocol": config.protocol,
        "--features": config.features,
        "--calibration": config.calibration,
        "--init": config.init,
    }
    settings = (*config.settings, *planned.cell.settings, f"train.seed={planned.seed}")
    lines = {
        "train": (
            *(*hdovd, "train", "--resume", "--val-every", "0", *device, *_words(options)),
            *(() if is_tar_form(config.cache) else _data_words(config.data)),
            *(word for setting in settings for word in ("--set", setting)),
            *(("--oracle",) if planned.cell.arm == ORACLE else ()),
        ),
        "eval": (*hdovd, "eval", str(planned.path), *_data_words(config.validation or config.data), *device),
    }
    return tuple(lines[stage] for stage in planned.left)


def _data_words(data: DataPaths) -> list[str]:
    options = {"--data": data.root, "--images": data.images, "--annotations": data.annotations}
    return _words(options | {"--form": None if data.form == AUTO else data.form})


def _words(options: Mapping[str, object]) -> list[str]:
    """Of a command line: those that are given."""
    return [word for option, value in options.items() if value is not None for word in (option, str(value))]


def places(config: AblateConfig, runs: int) -> list[dict[str, str]]:
    """Environment variables for each of the runs at a time: the GPUs in turn, where there are several, and its share of
    the cores.
    """
    jobs = min(config.jobs, runs)
    threads = min(torch.get_num_threads(), max(1, usable_cores() // jobs))
    gpus = range(torch.cuda.device_count() if config.device in ("auto", "cuda") else 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, gpus))).split(",")
    return [
        {"OMP_NUM_THREADS": str(threads)}
        | ({"CUDA_VISIBLE_DEVICES": visible[job % len(gpus)]} if len(gpus) > 1 else {})
        for job in range(jobs)
    ]


def _run(config: AblateConfig, plans: list[Planned], to_do: list[Planned], lock: int) -> int:
    """Returns the signal that ended it before all was done, or 0."""
    by_name, ended, keys = {planned.name: planned for planned in to_do}, set[str](), level_keys(config)
    jobs = [Job(planned.name, commands(planned, config), planned.path.with_suffix(".log")) for planned in to_do]

    def on_end(job: Job, command: tuple[str, ...], code: int, seconds: float) -> None:
        planned = by_name[job.name]
        ended.add(job.name)
        count = f"[{len(ended)}/{len(jobs)}] {planned.name}"
        if code:
            planned.failed = f"hdovd {command[3]}, {f'exit code {code}' if code > 0 else f'killed by signal {-code}'}"
        else:
            try:
                planned.left = stages_left(planned, config, keys)
                planned.failed = "hdovd eval left no metrics.json" if planned.left else ""
            except HdovdError as error:  # a recipe file that was edited meanwhile
                planned.failed = str(error)
        if planned.failed:
            log(f"{count}: FAILED: {planned.failed}; {log_end(job.log)}")
        else:
            run = read_run(planned.path)
            novel = run.ap.get("novel")
            log(f"{count}: {seconds:.0f} s" + ("" if novel is None else f", novel {METRICS[run.metric]} {novel:.1f}"))
        write_tables(_table(config, plans), config.out)

    with StopSignal() as stop:
        at = places(config, len(jobs))
        log(f"{len(jobs)} to do, {len(at)} at a time; what each prints is in {config.out}/CELL/seedK.log")
        run_jobs(jobs, at, on_end, stop, [lock])
    return stop.signals[0] if stop.signals and len(ended) < len(jobs) else 0


@contextmanager
def _locked(out: Path) -> Iterator[int]:
    """Alone in OUT. The runs hold the lock too, so that those which outlive a killed ablation are not trained twice."""
    with (out / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HdovdError(
                f"another ablation, or a run that one left behind, is at work in {out}: wait for it, or end it"
            ) from None
        yield file.fileno()


def _table(config: AblateConfig, plans: list[Planned]) -> AblationTable:
    """Of the runs that are done."""
    done = {p.name: read_run(p.path) for p in plans if not p.left}
    rows = [
        Row(
            cell.name,
            tuple(cell.values.values()),
            scores_of({p.seed: done[p.name] for p in plans if p.cell is cell and p.name in done}),
            config.seeds,
            sum(p.cell is cell and bool(p.failed) for p in plans),
            cell.arm,
        )
        for cell in [planned.cell for planned in plans[:: config.seeds]]
    ]
    protocol = load_protocol(config.protocol)
    return AblationTable(
        tuple(plans[0].cell.values),
        with_gap(rows),
        note(list(done.values()), config),
        protocol.metric,
        shown_groups(protocol),
    )
