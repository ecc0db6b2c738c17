"""Run folders as values: what a run was made from, how far it came, what it reached; and what tells two of them apart.

Reads text files alone, so that a table of many runs is there at once; what is
missing or damaged is said of the run, and never stops the others. `hdovd runs` and `hdovd runs diff`
print it line by line, or as plain values.
"""

import hashlib
import json
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from hdovd.cache import local_run, require_seal
from hdovd.core import HdovdError, counted
from hdovd.data import GROUPS, METRICS
from hdovd.pipelines.common.settings import (
    SWITCH,
    Settings,
    differences,
    different_keys,
    flat,
    in_full,
    short_names,
    shown,
    shown_apart,
)
from hdovd.pipelines.runs.folder import UPPER_BOUND, RunFolder

ORACLE = "oracle"


class State(StrEnum):
    """How far a run is. A run that is under way looks like one that was stopped."""

    FINISHED = "finished"
    NOT_EVALUATED = "not evaluated"
    STOPPED = "stopped"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder. `wrong`: what could not be read of it, and why. `ap`, `split_blind`, `per_class`: of the
    protocol's metric, in percent by group or class, None without ground truth. `oracle`: whether it was trained on
    boxes of novel classes too.
    """

    path: Path
    date: datetime
    settings: Settings = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    levels: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the cache: {level: {"key", "inputs"}}
    cache: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] | None = None
    epochs_done: int = 0
    ap: dict[str, float | None] = field(default_factory=dict)
    split_blind: dict[str, float | None] = field(default_factory=dict)
    per_class: dict[str, float | None] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()
    oracle: bool = False

    @property
    def state(self) -> State:
        if self.wrong:
            return State.DAMAGED
        if not self.epochs_done or self.epochs_done != self.settings.get("train.epochs"):
            return State.STOPPED
        return State.FINISHED if self.ap else State.NOT_EVALUATED

    @property
    def epochs(self) -> int | None:
        """How many the recipe wants."""
        epochs = self.settings.get("train.epochs")
        return epochs if isinstance(epochs, int) else None

    @property
    def metric(self) -> str:
        """ "ap50", or "ap"."""
        metric = self.protocol.get("metric")
        return metric if metric in [*METRICS] else next(iter(METRICS))  # a damaged one may be a list

    @property
    def seed(self) -> int | None:
        return self.settings.get("train.seed")

    @property
    def distillation(self) -> tuple[str, ...]:
        """The levels of distillation that are on, and the losses that the recipe adds."""
        levels = [
            *(
                key.split(".")[1]
                for key, value in self.settings.items()
                if key.startswith("loss.") and key.endswith(SWITCH) and value is True
            ),
            *(key.split(".")[2] for key in self.settings if key.startswith("loss.extra.") and key.endswith(".use")),
        ]
        return tuple(dict.fromkeys(levels))

    @property
    def cache_id(self) -> str | None:
        """Eight characters, the same for runs that read the same features, wherever these lie."""
        text = "\n".join(f"{level} {entry.get('key')}" for level, entry in sorted(self.levels.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:8] if self.levels else None


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """All run folders in these folders, at any depth, each once. Links to folders, pictures and caches are not looked
    into.

    Raises HdovdError for a folder that is not there.
    """
    found: dict[Path, Path] = {}
    for folder in map(local_run, folders):
        if not folder.is_dir():
            raise HdovdError(f"{folder}: no such folder; give folders that hold runs, or run folders")
        for root, names, files in os.walk(folder):
            names[:] = sorted(name for name in names if name != "pictures" and not name.startswith("."))
            if "zarr.json" in files:  # a cache: thousands of folders, and no run
                names.clear()
            elif "run.json" in files or {"config.toml", "log.jsonl"} <= set(files):
                found.setdefault(Path(root).resolve(), Path(root))
    return sorted(found.values())


def read_run(path: Path) -> Run:
    """One run; what cannot be read is in `wrong`. Raises HdovdError if it is no run folder."""
    path = local_run(path)
    if not path.is_dir() or not any((path / name).exists() for name in ("run.json", "config.toml")):
        raise HdovdError(f"{path} is no run: expected the folder that hdovd train --out wrote")
    wrong: list[str] = []
    record = _read(path / "run.json", json.loads, wrong)
    try:
        require_seal(record)
    except ValueError as error:
        wrong.append(f"run.json: {error}")
    tree = _read(path / "config.toml", tomllib.loads, wrong)  # as it is written: other versions have other keys
    settings = flat({name: value for name, value in tree.items() if name != "proposals"})  # those are of another stage
    cache = _tree(record.get("cache"))
    metrics = _read(path / "metrics.json", json.loads, wrong) if (path / "metrics.json").exists() else {}
    run = Run(path, _date(path, record), settings, _tree(record.get("protocol")))
    per_class = {
        name: _number(_tree(values).get(run.metric)) for name, values in _tree(metrics.get("per_class")).items()
    }
    of_groups, blind = (
        {group: _number(value) for group, value in _tree(tree.get(run.metric)).items()}
        for tree in (metrics, _tree(metrics.get("split_blind")))
    )
    if metrics and not of_groups:
        wrong.append(f"metrics.json has no {METRICS[run.metric]}: run hdovd eval again")
    return replace(
        run,
        levels={level: _tree(entry) for level, entry in _tree(cache.get("levels")).items()},
        cache=cache.get("path"),
        versions=_tree(record.get("versions")),
        git=_tree(record.get("git")) or None,
        epochs_done=run.epochs if "imported" in record and run.epochs else _epochs_done(path, run.epochs, wrong),
        ap=of_groups,
        split_blind=blind,
        per_class=per_class,
        wrong=tuple(wrong),
        oracle=record.get("oracle") is True,
    )


def _features(run: Run, other: Run) -> Settings:
    """Where its cache lies, and of every level the key and, if the other has the level too, what made it."""
    levels = {
        level: {"key": entry.get("key"), **(_tree(entry.get("inputs")) if level in other.levels else {})}
        for level, entry in run.levels.items()
    }
    return flat({"path": run.cache, **levels})


# --- reading ---


def _read(file: Path, parse: Callable[[str], Any], wrong: list[str]) -> dict[str, Any]:
    """The object in a file; empty, with a word in `wrong`, if there is none."""
    try:
        tree = parse(file.read_text())
        if isinstance(tree, dict):
            return tree
        wrong.append(f"{file.name} holds no object")
    except FileNotFoundError:
        wrong.append(f"no {file.name}")
    except (OSError, ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        wrong.append(f"{file.name}: {error}")
    return {}


def _epochs_done(path: Path, epochs: int | None, wrong: list[str]) -> int:
    """Epochs whose end is logged. The log tells the steps of an epoch from the first one on; the weights that it ended
    at all.
    """
    try:
        told = RunFolder(path).entries(wrong)
    except (HdovdError, OSError) as error:
        wrong.append(str(error))
        return 0
    entries: list[tuple[int, int]] = [
        (entry["epoch"], entry["step"])
        for entry in told
        if isinstance(entry.get("step"), int) and isinstance(entry.get("epoch"), int)
    ]
    if not entries or not (path / "model.safetensors").is_file():
        return 0
    last_epoch, last_step = max(entries)
    steps = max((step for epoch, step in entries if epoch == 1), default=last_step)  # of an epoch, as far as is known
    done = last_epoch - (last_step < last_epoch * steps)
    return done if epochs is None else min(done, epochs)


def _date(path: Path, record: Mapping[str, Any]) -> datetime:
    """When the run was begun."""
    try:
        return datetime.fromisoformat(record["time"]).astimezone()
    except (KeyError, TypeError, ValueError):
        file = path / "run.json"
        return datetime.fromtimestamp((file if file.exists() else path).stat().st_mtime).astimezone()


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _tree(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


OWN_COLUMN = ("train.seed", "train.epochs")
WORDS = {"name", "settings", "levels", "cache", "begun", "state"}
MOST_CLASSES = 10


def table_groups(runs: Sequence[Run]) -> tuple[str, ...]:
    """The groups of classes that a table of runs shows: those of their protocols if they share them, and all; or novel,
    base and all.
    """
    own = {tuple(_tree(run.protocol.get("groups"))) for run in runs if run.protocol}
    return (*own.pop(), "all") if len(own) == 1 and own != {()} else GROUPS


def metric_of(runs: Iterable[Run]) -> str:
    """What the numbers of runs are: AP50, AP, or both."""
    return " or ".join(dict.fromkeys(METRICS[run.metric] for run in runs))


def run_lines(runs: Sequence[Run]) -> list[str]:
    """All runs as a table; names are paths from the current folder. Below it, what is wrong with the damaged ones."""
    if not runs:
        return ["no runs here: hdovd train --out RUN makes one"]
    groups = table_groups(runs)
    head = ("name", "settings", "levels", "seed", "epochs", *groups, "blind", "cache", "begun", "state")
    rows = [
        (
            _name(run),
            settings or "-",
            ORACLE if run.oracle else "+".join(run.distillation) or ("none" if run.settings else "-"),
            shown(run.settings.get("train.seed")),
            f"{run.epochs_done}/{shown(run.epochs)}",
            *(ap(run.ap.get(group)) for group in groups),
            ap(run.split_blind.get("novel")),
            run.cache_id or "-",
            f"{run.date:%Y-%m-%d %H:%M}",
            str(run.state),
        )
        for run, settings in zip(runs, _apart(runs), strict=True)
    ]
    metric = metric_of(runs)
    lines = [
        *table_lines(head, rows, set(head) - WORDS),
        f"{counted(len(runs), 'run')}; {metric} in percent; blind: novel {metric} without the base/novel split at test "
        "time; cache: the same letters, the same features",
    ]
    if any(run.oracle for run in runs):
        lines.append(f"{ORACLE}: trained on boxes of novel classes too; its AP is {UPPER_BOUND}")
    return lines + [f"{_name(run)}: {reason}" for run in runs for reason in run.wrong]


def run_values(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """All runs as JSON values. `different`: the settings, by dotted key, that not all of these runs share."""
    keys = different_keys([run.settings for run in runs if run.settings])
    return [
        {
            "path": str(run.path),
            "state": str(run.state),
            "wrong": list(run.wrong),
            "date": run.date.isoformat(timespec="seconds"),
            "seed": run.settings.get("train.seed"),
            "epochs_done": run.epochs_done,
            "epochs": run.epochs,
            "levels": list(run.distillation),
            "oracle": run.oracle,
            "different": {key: run.settings.get(key) for key in keys if key in run.settings},
            run.metric: run.ap,
            "split_blind": run.split_blind,
            "protocol": run.protocol.get("name"),
            "cache": {"path": run.cache, "id": run.cache_id},
            "git": run.git,
            "versions": run.versions,
        }
        for run in runs
    ]


def difference_lines(a: Path, b: Path) -> list[str]:
    """What differs between two runs, part by part; a part without difference in one line, and of classes those with the
    largest differences. Raises HdovdError if one is no run; what is damaged in one is left out.
    """
    first, second = read_run(a), read_run(b)
    parts = {
        "config": differences(*(run.settings | {ORACLE: run.oracle} for run in (first, second))),
        "cache": differences(_features(first, second), _features(second, first)),
        "versions": differences(first.versions, second.versions),
        "git": differences(first.git or {}, second.git or {}),
        "protocol": differences(first.protocol, second.protocol),
    }
    lines = [f"A {a}", f"B {b}"]
    for name, entries in parts.items():
        rows = [(key, in_full(x), in_full(y)) for key, x, y in entries]
        lines += ["", *(table_lines((name, "A", "B"), rows) if rows else [f"{name}: the same"])]
    groups = [
        (group + suffix, of_a.get(group), of_b.get(group))
        for suffix, of_a, of_b in (("", first.ap, second.ap), (" split-blind", first.split_blind, second.split_blind))
        for group in dict.fromkeys([*GROUPS, *of_a, *of_b])
        if group in of_a or group in of_b
    ]
    lines += [
        "",
        *(
            _ap_lines(f"{metric_of([first, second])}, percent", groups)
            if groups
            else ["AP: none of the two is evaluated"]
        ),
    ]
    if classes := [
        (name + (" (novel)" if name in first.protocol.get("novel", ()) else ""), x, y)
        for name, x in first.per_class.items()
        if x is not None and (y := second.per_class.get(name)) is not None and x != y
    ]:
        classes.sort(key=lambda entry: (-abs(entry[2] - entry[1]), entry[0]))
        most = f"{MOST_CLASSES} of {len(classes)} " if len(classes) > MOST_CLASSES else ""
        lines += ["", *_ap_lines(f"{most}classes that differ", classes[:MOST_CLASSES])]
    return lines + [f"{run.path}: {reason}" for run in (first, second) for reason in run.wrong]


def table_lines(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: set[str] | frozenset[str] = frozenset()
) -> list[str]:
    """Columns of text, those named in `numbers` to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        "  ".join(
            text.rjust(width) if name in numbers else text.ljust(width)
            for name, text, width in zip(head, row, widths, strict=True)
        ).rstrip()
        for row in [head, *rows]
    ]


def ap(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _ap_lines(head: str, entries: Sequence[tuple[str, float | None, float | None]]) -> list[str]:
    """A table of AP of two runs and their difference."""
    rows = [(name, ap(a), ap(b), "-" if a is None or b is None else f"{b - a:+.1f}") for name, a, b in entries]
    return table_lines((head, "A", "B", "B - A"), rows, {"A", "B", "B - A"})


def _name(run: Run) -> str:
    path, base = run.path.resolve(), Path().resolve()
    return str(path.relative_to(base)) if path.is_relative_to(base) and path != base else str(run.path)


def _apart(runs: Sequence[Run]) -> list[str]:
    """Of every run the settings in which the runs differ, without those that have a column of their own."""
    known = [run.settings for run in runs if run.settings]
    keys = [
        key
        for key in different_keys(known)
        if key not in OWN_COLUMN and not (key.startswith("loss.") and key.endswith(SWITCH))
    ]
    names = short_names(keys, {key for settings in known for key in settings})
    columns = {key: shown_apart([run.settings.get(key) for run in runs]) for key in keys}
    return [
        " ".join(f"{names[key]}={columns[key][row]}" for key in keys if key in run.settings)
        for row, run in enumerate(runs)
    ]
