"""The grid of an ablation: which settings vary, and the cells that follow; and its table: a row a cell, mean and
standard deviation over seeds, as Markdown, CSV and LaTeX.
"""

import csv
import hashlib
import io
import itertools
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hdovd.config.recipe import PRESETS, Recipe, load_recipe
from hdovd.core import HdovdError
from hdovd.data import GROUPS
from hdovd.pipelines.ablation.config import AblateConfig
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.settings import SWITCH, Settings, flat, in_full, short_names, shown_apart, value_at
from hdovd.pipelines.runs import ORACLE, UPPER_BOUND, Run, table_groups
from hdovd.pipelines.runs.listing import metric_of

SEED = "train.seed"
BASE_ONLY = "base-only"
LONGEST = 40  # characters of a value in a folder's name
OPEN, CLOSE = "[{(", "]})"


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of the grid: a name that is a folder's, the values by dotted key, and the settings that make
    them. `arm`: `BASE_ONLY` or `ORACLE` for the two that the gap lies between.
    """

    name: str
    values: Settings
    settings: tuple[str, ...]
    arm: str = ""

    def recipe(self, recipe: str, settings: Sequence[str], seed: int) -> Recipe:
        return load_recipe(recipe, [*settings, *self.settings, f"{SEED}={seed}"])


def cells_of(recipe: str, settings: Sequence[str], grid: Sequence[str], preset: Sequence[str] = ()) -> list[Cell]:
    """All combinations of the grid, the first key varying slowest; one cell, `recipe`, without a grid.

    `settings` and, beneath them, `preset` hold for all cells; the grid may turn on again what the preset turned off.

    Raises HdovdError for an unknown key (naming the nearest), a wrong value, a key given twice, and cells that are the
    same.
    """
    keys = dict(_key_and_values(item) for item in grid)
    if len(keys) < len(grid):
        raise HdovdError(f"--grid has a key twice: {' '.join(grid)}; give all its values at once, KEY=A,B,C")
    for setting in settings:
        key = setting.partition("=")[0].strip()
        if key in keys or key == SEED:
            raise HdovdError(f"--set {setting}: {'--seeds' if key == SEED else '--grid'} says what {key} is")
    base = [*preset, *settings]
    short, seen = short_names(keys, flat(load_recipe(recipe, base).model_dump(by_alias=True))), dict[str, Cell]()
    for combination in itertools.product(*keys.values()):
        mine = tuple(f"{key}={value}" for key, value in zip(keys, combination, strict=True))
        made = load_recipe(recipe, [*base, *mine])
        values = {key: value_at(made.model_dump(by_alias=True), key) for key in keys}
        name = "_".join(f"{short[key]}-{_as_name(in_full(value))}" for key, value in values.items()) or "recipe"
        cell = Cell(name, values, mine)
        same = seen.setdefault(made.to_toml(), cell)
        if same is not cell:
            raise HdovdError(f"--grid: {' '.join(mine)} and {' '.join(same.settings)} are the same cell: leave one out")
    if len({cell.name for cell in seen.values()}) < len(seen):  # 1 and "1", where a recipe takes both
        names = ", ".join(cell.name for cell in seen.values())
        raise HdovdError(f"--grid {' '.join(grid)}: two cells have the same name: {names}")
    return list(seen.values())


def with_arms(cells: Sequence[Cell], recipe: str, settings: Sequence[str]) -> list[Cell]:
    """The cells and the two arms of the novel gap, which are the recipe without distillation, beside the grid.

    `settings` hold for all cells. A cell that is base-only already is that arm, and not run twice.
    """
    made = load_recipe(recipe, [*settings, *PRESETS[BASE_ONLY]])
    cells = [
        replace(cell, arm=BASE_ONLY) if load_recipe(recipe, [*settings, *cell.settings]) == made else cell
        for cell in cells
    ]
    arms = (ORACLE,) if any(cell.arm for cell in cells) else (BASE_ONLY, ORACLE)
    values = {key: value_at(made.model_dump(by_alias=True), key) for key in cells[0].values}
    return [*cells, *(Cell(arm, values, PRESETS[BASE_ONLY], arm) for arm in arms)]


def _key_and_values(item: str) -> tuple[str, list[str]]:
    key, equals, text = item.partition("=")
    key, values = key.strip(), [value.strip() for value in _split(text)]
    if not equals or not key or not all(values):
        raise HdovdError(f"--grid takes KEY=VALUE,VALUE,..., such as loss.image.enabled=true,false; got {item!r}")
    if key == SEED:
        raise HdovdError(f"--grid {item}: seeds are no cells; give --seeds N")
    return key, values


def _split(text: str) -> list[str]:
    """At commas, but not at those within brackets or quotes."""
    parts = [""]
    for piece in text.split(","):
        bare = re.sub(r"\"[^\"]*\"|'[^']*'", "", parts[-1])
        if re.search("[\"']", bare) or sum(map(bare.count, OPEN)) > sum(map(bare.count, CLOSE)):  # one is not closed
            parts[-1] += f",{piece}"
        else:
            parts.append(piece)
    return parts[1:]


def _as_name(text: str) -> str:
    """A value in a folder's name, of a path its end; with a few letters of its hash where not all of it can stand
    there.
    """
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", text.rstrip("/").rpartition("/")[2])[-LONGEST:].strip("-.")
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}".lstrip("-")


BLIND = "novel, split-blind"
GAP = "novel gap closed, %"
GAP_TOLD = (
    "Novel gap closed: (cell - base-only) / (oracle - base-only) of novel AP, for each seed from its own three runs, "
    "then mean (sample standard deviation) over the seeds that have all three, so that the spread holds that of the "
    "arms too; -: in one of these seeds the oracle is not above base-only. Both arms are the recipe without "
    "distillation, with its own values and not the grid's. The oracle was trained on boxes of novel classes too: it is "
    f"{UPPER_BOUND}."
)
YES, NO, NONE = "\N{CHECK MARK}", "\N{EN DASH}", "..."
TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    YES: r"\checkmark",
    NO: "--",
    NONE: r"\ldots",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A cell. `scores`: AP in percent by group, `BLIND` or `GAP`, and seed, None without ground truth; only of seeds
    that are done. `arm`: as `Cell`'s.
    """

    name: str
    values: tuple[Any, ...]
    scores: dict[str, dict[int, float | None]]
    seeds: int
    failed: int = 0
    arm: str = ""

    @property
    def done(self) -> int:
        return len(self.scores["novel"])

    @property
    def state(self) -> str:
        """How many seeds are done; of how many, if not all."""
        if self.done == self.seeds:
            return str(self.done)
        return f"{self.done} of {self.seeds}" + (f", {self.failed} failed" if self.failed else "")

    def moments(self, metric: str) -> tuple[float | None, float | None]:
        """Mean and sample standard deviation over the seeds that have a value, as far as there are any: none of the gap
        where one seed has none.
        """
        values = list(self.scores.get(metric, {}).values())
        numbers = [] if metric == GAP and None in values else [value for value in values if value is not None]
        return statistics.mean(numbers) if numbers else None, statistics.stdev(numbers) if len(numbers) > 1 else None

    def text(self, metric: str) -> str:
        """Mean (deviation), with one decimal; nothing for a metric that the row does not have."""
        mean, deviation = self.moments(metric)
        if mean is None:
            return "" if metric not in self.scores else "-" if self.scores[metric] else NONE
        return f"{mean:.1f}" + ("" if deviation is None else f" ({deviation:.1f})")


@dataclass(frozen=True, slots=True)
class AblationTable:
    """`keys`: what varies, by dotted key. `note`: what the numbers were made of. `metric`: "ap50" or "ap"; `groups`: of
    classes, a column each.
    """

    keys: tuple[str, ...]
    rows: list[Row]
    note: str
    metric: str = "ap50"
    groups: tuple[str, ...] = GROUPS

    @property
    def metrics(self) -> tuple[str, ...]:
        """The columns of numbers; the gap, where there are its two arms."""
        return (*self.groups, BLIND, *([GAP] if any(row.arm for row in self.rows) else []))


def scores_of(runs: Mapping[int, Run]) -> dict[str, dict[int, float | None]]:
    """`Row.scores` of runs by seed."""
    return {
        metric: {
            seed: run.split_blind.get("novel") if metric == BLIND else run.ap.get(metric)
            for seed, run in sorted(runs.items())
        }
        for metric in dict.fromkeys([*GROUPS, *table_groups(list(runs.values())), BLIND])
    }


def with_gap(rows: list[Row]) -> list[Row]:
    """Rows with a score more, `GAP`, where there are the two arms: of each other cell, seed by seed."""
    novel = {row.arm: row.scores["novel"] for row in rows if row.arm}
    if not novel:
        return rows
    base_only, oracle = novel[BASE_ONLY], novel[ORACLE]
    gaps = [
        {
            seed: gap_closed(value, base_only[seed], oracle[seed])
            for seed, value in row.scores["novel"].items()
            if seed in base_only and seed in oracle
        }
        for row in rows
    ]
    return [
        row if row.arm else replace(row, scores={**row.scores, GAP: gap}) for row, gap in zip(rows, gaps, strict=True)
    ]


def gap_closed(value: float | None, base_only: float | None, oracle: float | None) -> float | None:
    """Percentage of the way from base-only to the oracle; None where the oracle is not above base-only."""
    if value is None or base_only is None or oracle is None or oracle <= base_only:
        return None
    return 100 * (value - base_only) / (oracle - base_only)


def column_texts(values: Sequence[Any]) -> list[str]:
    """Of one column: ticks for switches."""
    if all(isinstance(value, bool) for value in values):
        return [YES if value else NO for value in values]
    return shown_apart(values)


def note(runs: Sequence[Run], config: AblateConfig) -> str:
    """What the numbers were made of. Of the runs, not of the moment: the same runs have the same note."""
    seeds = f"seeds 0 to {config.seeds - 1}" if config.seeds > 1 else "seed 0"
    commits = {
        str(run.git["commit"])[:10] + (" with changes" if run.git.get("dirty") else "")
        for run in runs
        if run.git and "commit" in run.git
    }
    parts = [
        f"{metric_of(runs)} in percent, mean (sample standard deviation) over {seeds}",
        f"data {config.data.root or config.data.annotations or config.cache}",
        f"protocol {config.protocol}",
        f"cache {config.cache}, set {config.features}",
        " ".join(["recipe", config.recipe, *config.all_settings]),
        *([f"from the weights of {config.init}"] if config.init else []),
        *(
            f"{name} {version}"
            for name in ("hdovd", "torch")
            for version in sorted({run.versions.get(name, "?") for run in runs})
        ),
        *(f"commit {commit}" for commit in sorted(commits)),
    ]
    return "; ".join(parts) + "."


def markdown(table: AblationTable) -> str:
    """Readable as it is, in a terminal too."""
    head, rows = _texts(table)
    rows = [[text.replace("|", "\\|") for text in row] for row in rows]
    widths = [max(3, *(len(row[column]) for row in [head, *rows])) for column in range(len(head))]
    words = len(head) - len(table.metrics) - 1  # columns to the left; after them, numbers to the right
    lines = [
        " | ".join(
            text.ljust(width) if column < words else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]
    rule = "|".join("-" * (w + 2) if column < words else "-" * (w + 1) + ":" for column, w in enumerate(widths))
    body = [f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]
    return "\n".join([*body, "", table.note, *_marks(table)]) + "\n"


def latex(table: AblationTable) -> str:
    """A booktabs table."""
    head, rows = _texts(table)
    values = len(head) - len(table.metrics) - 1
    lines = [
        "% \\usepackage{booktabs, amssymb}",
        *(f"% {line}" for line in (table.note, *_marks(table))),
        f"\\begin{{tabular}}{{{'l' * values}{'r' * (len(head) - values)}}}",
        "\\toprule",
        " & ".join(map(tex, head)) + r" \\",
        "\\midrule",
        *(" & ".join(map(tex, row)) + r" \\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def comma_separated(table: AblationTable) -> str:
    """The plain numbers: of each metric the mean, the deviation and the value of every seed; empty where there is
    none."""
    out, seeds = io.StringIO(), range(max(row.seeds for row in table.rows))
    parts = ["mean", "sd", *(f"seed{seed}" for seed in seeds)]
    slugs = [
        ("" if metric == GAP else f"{table.metric}_") + re.sub(r"[^A-Za-z0-9]+", "_", metric).strip("_")
        for metric in table.metrics
    ]
    names = [f"{slug}_{part}" for slug in slugs for part in parts]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["cell", *(["arm"] if GAP in table.metrics else []), *table.keys, "seeds", "done", "failed", *names]
    )
    for row in table.rows:
        numbers = [
            value
            for metric in table.metrics
            for value in (*row.moments(metric), *(row.scores.get(metric, {}).get(seed) for seed in seeds))
        ]  # csv writes None as nothing
        values = [str(value).lower() if isinstance(value, bool) else value for value in row.values]
        writer.writerow(
            [row.name, *([row.arm] if GAP in table.metrics else []), *values, row.seeds, row.done, row.failed, *numbers]
        )
    return out.getvalue()


def write_tables(table: AblationTable, out: Path) -> None:
    """table.md, table.csv and table.tex in `out`, each whole or as it was."""
    for name, form in {"table.md": markdown, "table.csv": comma_separated, "table.tex": latex}.items():
        write_text(out / name, form(table))


def tex(text: str) -> str:
    """A cell of a LaTeX table."""
    return TEX[text] if text in TEX else "".join(TEX.get(letter, letter) for letter in text)


def _texts(table: AblationTable) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the values of the grid, the metrics, how many seeds."""
    short = short_names(table.keys, table.keys)
    head = [*(short[key] if key.endswith(SWITCH) else key for key in table.keys), *table.metrics, "seeds"]
    columns = [column_texts([row.values[column] for row in table.rows]) for column in range(len(table.keys))]
    if not columns or GAP in table.metrics:
        names = [row.arm or ("" if columns else row.name) for row in table.rows]
        head, columns = ["", *head], [names, *columns]
    numbers = [[*(row.text(metric) for metric in table.metrics), row.state] for row in table.rows]
    return head, [[*values, *own] for *values, own in zip(*columns, numbers, strict=True)]


def _marks(table: AblationTable) -> list[str]:
    """What the marks of rows mean that are not finished, and what the gap is."""
    unfinished = f"Not finished: {NONE} no seed is done yet; 1 of 3 seeds: the mean of that one."
    marks = [] if all(row.done == row.seeds for row in table.rows) else [unfinished]
    return marks + ([GAP_TOLD] if GAP in table.metrics else [])
