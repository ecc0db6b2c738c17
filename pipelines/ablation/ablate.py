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
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from hdovd.cache.catalog import is_tar_form
from hdovd.cache.identity import require_same
from hdovd.config.recipe import PRESETS, Recipe, load_recipe
from hdovd.core.errors import HdovdError, counted
from hdovd.core.log import log, quiet
from hdovd.data.coco import DataPaths
from hdovd.data.forms.base import AUTO
from hdovd.data.protocol import METRICS, load_protocol, shown_groups
from hdovd.pipelines.ablation.config import AblateConfig
from hdovd.pipelines.ablation.grid import (
    AblationTable,
    Cell,
    Row,
    cells_of,
    note,
    recipe_settings,
    scores_of,
    with_arms,
    with_gap,
    write_tables,
)
from hdovd.pipelines.calibration.values import with_reliability
from hdovd.pipelines.common.process import Job, StopSignal, log_end, run_jobs, usable_cores
from hdovd.pipelines.common.settings import SWITCH, lasting_values
from hdovd.pipelines.runs.folder import RunFolder, init_hash
from hdovd.pipelines.runs.listing import ORACLE, read_run
from hdovd.pipelines.training.config import TrainConfig

LOCK = ".ablate.lock"


class RunState(StrEnum):
    """What is left to do for a run."""

    DONE = "done"
    EVALUATE = "to evaluate"
    GO_ON = "to go on with"
    TRAIN = "to do"


@dataclass(slots=True)
class Planned:
    """One run of an ablation. `init`: hash of the weights that it begins with. `failed`: why it did."""

    cell: Cell
    seed: int
    recipe: Recipe
    path: Path
    init: str | None = None
    state: RunState = RunState.TRAIN
    failed: str = ""

    @property
    def name(self) -> str:
        return f"{self.cell.name}/seed{self.seed}"

    @property
    def log(self) -> Path:
        return self.path.with_name(f"{self.path.name}.log")


@dataclass(slots=True)
class Ablation:
    """What came of it. `stopped`: the signal that ended it before all was done, or 0."""

    table: AblationTable
    runs: list[Planned]
    files: list[Path] = field(default_factory=list)
    stopped: int = 0

    @property
    def left(self) -> int:
        return sum(run.state is not RunState.DONE for run in self.runs)


def ablate(config: AblateConfig) -> Ablation:
    """Run what is not done yet and write the tables. A run that fails is told, and the others go on.

    Raises HdovdError, before anything runs, for a wrong grid, data that do not fit the cache, and runs of another
    config in OUT.
    """
    plans = plan(config)
    found = Ablation(_table(config, plans), plans)
    if config.dry_run:
        return found
    if found.left:
        config.check()
    config.out.mkdir(parents=True, exist_ok=True)
    with _locked(config.out) as lock:
        for planned in plans:
            planned.state = standing(planned, config)  # once more: another ablation may have been at work
        to_do = [planned for planned in plans if planned.state is not RunState.DONE]
        log(
            f"{counted(len(plans) // config.seeds, 'cell')} x {counted(config.seeds, 'seed')}: "
            f"{len(plans) - len(to_do)} of {len(plans)} runs done"
        )
        _check_features(plans, _features(config, plans) if to_do else None)
        if to_do:
            found.stopped = _run(config, plans, to_do, lock)
        found.table = _table(config, plans)
        found.files = write_tables(found.table, config.out)
    return found


def plan(config: AblateConfig) -> list[Planned]:
    """All runs, cell by cell, and how far each is. Raises HdovdError for a wrong recipe or grid, and as `standing`."""
    cells = cells_of(config.recipe, config.settings, config.grid, PRESETS[config.preset] if config.preset else ())
    if config.oracle:
        cells = with_arms(cells, config.recipe, config.all_settings)
    init = None if config.init is None else init_hash(config.init)
    plans = [
        Planned(
            cell,
            seed,
            cell.recipe(config.recipe, config.all_settings, seed),
            config.out / cell.name / f"seed{seed}",
            init,
        )
        for cell in cells
        for seed in range(config.seeds)
    ]
    for planned in plans:
        planned.state = standing(planned, config)
    return plans


def standing(planned: Planned, config: AblateConfig) -> RunState:
    """How far a run is. Raises HdovdError if its folder holds a run of another config or protocol, naming what
    differs."""
    if not (planned.path / "run.json").exists():
        return RunState.TRAIN
    run = read_run(planned.path)
    if not run.settings or not run.protocol:
        raise HdovdError(
            f"{planned.path}: {'; '.join(run.wrong) or 'run.json names no protocol'}: delete this folder, and it is "
            f"made anew"
        )
    folder = RunFolder(planned.path)
    there = {
        "protocol": run.protocol,
        "weights of --init": (folder.record().get("init") or {}).get("sha256"),
        ORACLE: run.oracle,
        **lasting_values(folder.written_recipe()),
    }
    asked = {
        "protocol": load_protocol(config.protocol).to_dict(),
        "weights of --init": planned.init,
        ORACLE: planned.cell.arm == ORACLE,
        **lasting_values(planned.recipe.with_precision(str(run.settings.get("train.precision")))),
    }
    require_same(
        asked,
        there,
        f"{planned.path} holds a run of another config",
        "Ask for that, give another --out, or delete that folder",
        sides=("asked for", "there"),
    )
    if run.ap and run.epochs_done == run.epochs:
        return RunState.DONE
    trained = (
        run.epochs_done == run.epochs and not (planned.path / "checkpoint.pt").exists()
    )  # where one is, training knows how far it is
    return RunState.EVALUATE if trained else RunState.GO_ON


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
    train = (
        *(*hdovd, "train", "--val-every", "0", *device, *_words(options)),
        *(() if is_tar_form(config.cache) else _data_words(config.data)),
        *(word for setting in settings for word in ("--set", setting)),
        *(("--oracle",) if planned.cell.arm == ORACLE else ()),
        *(("--resume",) if planned.state is RunState.GO_ON else ()),
    )
    evaluate = (*hdovd, "eval", str(planned.path), *_data_words(config.validation or config.data), *device)
    return {RunState.DONE: (), RunState.EVALUATE: (evaluate,)}.get(planned.state, (train, evaluate))


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
    import torch

    jobs = min(config.jobs, runs)
    share, own = max(1, usable_cores() // jobs), os.environ.get("OMP_NUM_THREADS", "")
    threads = {"OMP_NUM_THREADS": str(share)} if jobs > 1 and not (own.isdigit() and int(own) <= share) else {}
    gpus: list[str] = []
    if config.device in ("auto", "cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = (
            [str(i) for i in range(torch.cuda.device_count())]
            if visible is None
            else [gpu for gpu in visible.split(",") if gpu]
        )
    return [threads | ({"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} if len(gpus) > 1 else {}) for job in range(jobs)]


def _run(config: AblateConfig, plans: list[Planned], to_do: list[Planned], lock: int) -> int:
    """Returns the signal that ended it before all was done, or 0."""
    by_name, ended = {planned.name: planned for planned in to_do}, set[str]()
    jobs = [Job(planned.name, commands(planned, config), planned.log) for planned in to_do]

    def on_end(job: Job, command: tuple[str, ...], code: int, seconds: float) -> None:
        ended.add(job.name)
        planned = by_name[job.name]
        planned.failed = _failure(command, code, planned, config)
        count = f"[{len(ended)}/{len(jobs)}] {planned.name}"
        if planned.failed:
            log(f"{count}: FAILED: {planned.failed}; {log_end(planned.log)}")
        else:
            run = read_run(planned.path)
            novel = run.ap.get("novel")
            log(f"{count}: {seconds:.0f} s" + ("" if novel is None else f", novel {METRICS[run.metric]} {novel:.1f}"))
        write_tables(_table(config, plans), config.out)

    with StopSignal() as stop:
        at = places(config, len(jobs))
        log(f"{len(jobs)} to do, {len(at)} at a time; what each prints is in {config.out}/CELL/seedK.log")
        run_jobs(jobs, at, on_end, stop, [lock])
    for planned in to_do:
        if not planned.failed:
            planned.state = standing(planned, config)
    return stop.signals[0] if stop.signals and len(ended) < len(jobs) else 0


def _failure(command: tuple[str, ...], code: int, planned: Planned, config: AblateConfig) -> str:
    """Why a job failed; nothing, and the run is done, if it did not."""
    if code:
        return f"hdovd {command[3]}, " + (f"exit code {code}" if code > 0 else f"killed by signal {-code}")
    try:
        planned.state = standing(planned, config)
    except HdovdError as error:  # a recipe file that was edited meanwhile
        return str(error)
    return "" if planned.state is RunState.DONE else "hdovd eval left no metrics.json"


@quiet()  # what is skipped is in the log of every run
def _features(config: AblateConfig, plans: list[Planned]) -> dict[str, str]:
    """The keys of the cache's levels. Raises HdovdError if the data of training or evaluation are not there or do not
    fit the cache.
    """
    from hdovd.pipelines.training.train import training_data

    flags = {
        key
        for p in plans
        for key, on in recipe_settings(p.recipe).items()
        if key.startswith("loss.") and key.endswith(SWITCH) and on
    }
    everything = load_recipe(
        config.recipe, [*config.all_settings, *plans[0].cell.settings, *(f"{key}=true" for key in sorted(flags))]
    )
    protocol = load_protocol(config.protocol)
    (config.validation or config.data).load("val2017", protocol, base_only=False)
    job = TrainConfig(
        data=config.data if not is_tar_form(config.cache) else DataPaths(),
        cache=config.cache,
        out=config.out,
        recipe=everything,
        protocol=config.protocol,
        device=config.device,
        features=config.features,
    )
    found = training_data(job, protocol)
    found.class_embeddings(protocol.names)
    for planned in plans:  # a weight that is not known is said now, not by each run
        with_reliability(planned.recipe, found.label_origin, config.calibration, protocol.base)
    return {level: entry["key"] for level, entry in found.record()["cache"]["levels"].items()}


def _check_features(plans: list[Planned], levels: dict[str, str] | None) -> None:
    """All runs that are there must have read the same features, those of the cache as it is. Raises HdovdError."""
    there = {
        p.path: {level: entry.get("key", "") for level, entry in read_run(p.path).levels.items()}
        for p in plans
        if (p.path / "run.json").exists()
    }
    expected = next(iter(there.values()), {}) if levels is None else levels
    whose = f"{next(iter(there), '')} was trained with" if levels is None else "the cache holds now"
    for path, mine in there.items():
        require_same(
            mine,
            expected,
            f"{path} was trained with other features than {whose}",
            "An ablation is of one cache: give another --out, or the --cache and --features of that run",
            sides=("there", "expected"),
        )


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
    done = {p.name: read_run(p.path) for p in plans if p.state is RunState.DONE and not p.failed}
    rows = [
        Row(
            cell.name,
            tuple(cell.values.values()),
            scores_of({p.seed: done[p.name] for p in plans if p.cell is cell and p.name in done}),
            config.seeds,
            sum(p.cell is cell and bool(p.failed) for p in plans),
            cell.arm,
        )
        for cell in {p.cell.name: p.cell for p in plans}.values()
    ]
    recipe = [config.recipe, *([f"with {config.preset}"] if config.preset else []), *config.settings]
    made_of = {
        "data": str(config.data.root or config.data.annotations or config.cache),
        "protocol": config.protocol,
        "cache": str(config.cache),
        "features": config.features,
        "recipe": " ".join([*recipe, *([f"from the weights of {config.init}"] if config.init else [])]),
    }
    protocol = load_protocol(config.protocol)
    return AblationTable(
        tuple(plans[0].cell.values),
        with_gap(rows),
        note(list(done.values()), config.seeds, made_of),
        protocol.metric,
        shown_groups(protocol),
    )
