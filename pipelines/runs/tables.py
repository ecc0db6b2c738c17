"""What `hdovd runs` and `hdovd runs diff` print, line by line, and the same as plain values."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hdovd.core.errors import counted
from hdovd.pipelines.common.settings import SWITCH, different_keys, in_full, short_names, shown, shown_apart
from hdovd.pipelines.runs.listing import GROUPS, Run, RunDifference

OWN_COLUMN = ("train.seed", "train.epochs")
NUMBERS = {"seed", "epochs", *GROUPS, "blind"}
MOST_CLASSES = 10


def run_lines(runs: Sequence[Run], root: Path | None = None) -> list[str]:
    """All runs as a table; names are paths from `root`. Below it, what is wrong with the damaged ones."""
    if not runs:
        return ["no runs here: hdovd train --out RUN makes one"]
    head = ("name", "settings", "levels", "seed", "epochs", *GROUPS, "blind", "cache", "begun", "state")
    apart = _apart(runs)
    rows = [
        (
            _name(run, root),
            settings or "-",
            "+".join(run.distillation) or ("none" if run.settings else "-"),
            shown(run.seed),
            f"{run.epochs_done}/{shown(run.epochs)}",
            *(ap(run.ap50.get(group)) for group in GROUPS),
            ap(run.split_blind.get("novel")),
            run.cache_id or "-",
            f"{run.date:%Y-%m-%d %H:%M}",
            str(run.state),
        )
        for run, settings in zip(runs, apart, strict=True)
    ]
    lines = table_lines(head, rows, NUMBERS)
    lines.append(
        f"{counted(len(runs), 'run')}; AP50 in percent; blind: novel AP50 without the base/novel split at test "
        "time; cache: the same letters, the same features"
    )
    protocols = sorted({str(run.protocol["name"]) for run in runs if "name" in run.protocol})
    if len(protocols) > 1:
        lines.append(f"note: AP of several protocols, which do not compare: {', '.join(protocols)}")
    lines += [f"{_name(run, root)}: {reason}" for run in runs for reason in run.wrong]
    return lines


def run_values(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """All runs as JSON values. `different`: the settings, by dotted key, that not all of these runs share."""
    keys = different_keys([run.settings for run in runs if run.settings]) if runs else []
    return [
        {
            "path": str(run.path),
            "state": str(run.state),
            "wrong": list(run.wrong),
            "date": run.date.isoformat(timespec="seconds"),
            "seed": run.seed,
            "epochs_done": run.epochs_done,
            "epochs": run.epochs,
            "levels": list(run.distillation),
            "different": {key: run.settings.get(key) for key in keys if key in run.settings},
            "ap50": run.ap50,
            "split_blind": run.split_blind,
            "protocol": run.protocol.get("name"),
            "cache": {"path": run.cache, "id": run.cache_id},
            "git": run.git,
            "versions": run.versions,
        }
        for run in runs
    ]


def difference_lines(difference: RunDifference) -> list[str]:
    """What differs, part by part; a part without difference in one line."""
    lines = [f"A {difference.a.path}", f"B {difference.b.path}"]
    for name, entries in difference.parts.items():
        rows = [(key, in_full(a), in_full(b)) for key, a, b in entries]
        lines += ["", *(table_lines((name, "A", "B"), rows) if rows else [f"{name}: the same"])]
    lines += [
        "",
        *(
            _ap_lines("AP50, percent", difference.groups)
            if difference.groups
            else ["AP50: none of the two is evaluated"]
        ),
    ]
    novel = set(difference.a.protocol.get("novel", ()))
    changed = [(name + (" (novel)" if name in novel else ""), x, y) for name, x, y in difference.classes if x != y]
    if changed:
        head = (
            "classes that differ"
            if len(changed) <= MOST_CLASSES
            else f"{MOST_CLASSES} of {len(changed)} classes that differ"
        )
        lines += ["", *_ap_lines(head, changed[:MOST_CLASSES])]
    lines += [f"{run.path}: {reason}" for run in (difference.a, difference.b) for reason in run.wrong]
    return lines


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
    """A table of AP50 of two runs and their difference."""
    rows = [(name, ap(a), ap(b), "-" if a is None or b is None else f"{b - a:+.1f}") for name, a, b in entries]
    return table_lines((head, "A", "B", "B - A"), rows, {"A", "B", "B - A"})


def _name(run: Run, root: Path | None) -> str:
    path, base = run.path.resolve(), (root or Path()).resolve()
    return str(path.relative_to(base)) if path.is_relative_to(base) and path != base else str(run.path)


def _apart(runs: Sequence[Run]) -> list[str]:
    """Of every run the settings in which the runs differ, without those that have a column of their own."""
    known = [run.settings for run in runs if run.settings]
    keys = (
        [
            key
            for key in different_keys(known)
            if key not in OWN_COLUMN and not (key.startswith("loss.") and key.endswith(SWITCH))
        ]
        if known
        else []
    )
    names = short_names(keys, {key for settings in known for key in settings})
    columns = {key: shown_apart([run.settings.get(key) for run in runs]) for key in keys}
    return [
        " ".join(f"{names[key]}={columns[key][row]}" for key in keys if key in run.settings)
        for row, run in enumerate(runs)
    ]
