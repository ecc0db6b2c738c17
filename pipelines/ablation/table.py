"""The table of an ablation: a row a cell, mean and standard deviation over seeds; as Markdown, CSV and LaTeX."""

import csv
import io
import re
import statistics
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdovd.evaluation.coco import GROUPS
from hdovd.pipelines.ablation.cells import Cell
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.settings import SWITCH, short_names, shown_apart
from hdovd.pipelines.runs.listing import Run

METRICS = (*GROUPS, "novel, split-blind")
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
    """A cell. `scores`: AP50 in percent by metric and seed, None without ground truth; only of seeds that are done."""

    name: str
    values: tuple[Any, ...]
    scores: dict[str, dict[int, float | None]]
    seeds: int
    failed: int = 0

    @property
    def done(self) -> int:
        return len(self.scores[METRICS[0]])

    @property
    def state(self) -> str:
        """How many seeds are done; of how many, if not all."""
        if self.done == self.seeds:
            return str(self.done)
        return f"{self.done} of {self.seeds}" + (f", {self.failed} failed" if self.failed else "")

    def numbers(self, metric: str) -> list[float]:
        return [value for value in self.scores[metric].values() if value is not None]

    def mean(self, metric: str) -> float | None:
        numbers = self.numbers(metric)
        return statistics.mean(numbers) if numbers else None

    def deviation(self, metric: str) -> float | None:
        """The sample standard deviation; None for a single value."""
        numbers = self.numbers(metric)
        return statistics.stdev(numbers) if len(numbers) > 1 else None

    def text(self, metric: str) -> str:
        """Mean (deviation), with one decimal."""
        mean, deviation = self.mean(metric), self.deviation(metric)
        if mean is None:
            return "-" if self.done else NONE
        return f"{mean:.1f}" + ("" if deviation is None else f" ({deviation:.1f})")


@dataclass(frozen=True, slots=True)
class AblationTable:
    """`keys`: what varies, by dotted key. `note`: what the numbers were made of."""

    keys: tuple[str, ...]
    rows: list[Row]
    note: str

    @property
    def complete(self) -> bool:
        return all(row.done == row.seeds for row in self.rows)


def ablation_table(
    cells: Sequence[Cell],
    seeds: int,
    done: Mapping[str, Mapping[int, Run]],
    failed: Mapping[str, Set[int]],
    made_of: Mapping[str, str],
) -> AblationTable:
    """The table of the runs that are done, by cell name and seed."""
    rows = []
    for cell in cells:
        runs = dict(sorted(done[cell.name].items()))
        scores = {group: {seed: run.ap50.get(group) for seed, run in runs.items()} for group in GROUPS}
        scores[METRICS[-1]] = {seed: run.split_blind.get("novel") for seed, run in runs.items()}
        rows.append(Row(cell.name, tuple(cell.values.values()), scores, seeds, len(failed[cell.name])))
    runs_done = [run for by_seed in done.values() for run in by_seed.values()]
    return AblationTable(tuple(cells[0].values), rows, _note(runs_done, seeds, made_of))


def _note(runs: Sequence[Run], seeds: int, made_of: Mapping[str, str]) -> str:
    """Of the runs, not of the moment: the same runs have the same note."""
    over = f"seeds 0 to {seeds - 1}" if seeds > 1 else "seed 0"
    parts = [
        f"AP50 in percent, mean (sample standard deviation) over {over}",
        f"data {made_of['data']}",
        f"protocol {made_of['protocol']}",
        f"cache {made_of['cache']}, set {made_of['features']}",
        f"recipe {made_of['recipe']}",
    ]
    if runs:
        parts[3] += f", features {', '.join(sorted({str(run.cache_id) for run in runs}))}"
        begun = sorted(run.date for run in runs)
        first, last = f"{begun[0]:%Y-%m-%d}", f"{begun[-1]:%Y-%m-%d}"
        parts.append(first if first == last else f"{first} to {last}")
        parts += [
            f"{name} {', '.join(sorted({run.versions.get(name, '?') for run in runs}))}" for name in ("hdovd", "torch")
        ]
        commits = sorted(
            {
                str(run.git["commit"])[:10] + (" with changes" if run.git.get("dirty") else "")
                for run in runs
                if run.git and "commit" in run.git
            }
        )
        parts += [f"commit {', '.join(commits)}"] if commits else []
    return "; ".join(parts) + "."


def markdown(table: AblationTable) -> str:
    """Readable as it is, in a terminal too."""
    head, rows = _texts(table)
    rows = [[text.replace("|", "\\|") for text in row] for row in rows]
    widths = [max(3, *(len(row[column]) for row in [head, *rows])) for column in range(len(head))]
    values = len(table.keys) or 1
    lines = [
        "| "
        + " | ".join(
            text.ljust(width) if column < values else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in [head, *rows]
    ]
    rule = (
        "|"
        + "|".join(
            "-" * (width + 2) if column < values else "-" * (width + 1) + ":" for column, width in enumerate(widths)
        )
        + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:], "", table.note, *_marks(table)]) + "\n"


def latex(table: AblationTable) -> str:
    """A booktabs table."""
    head, rows = _texts(table)
    values = len(table.keys) or 1
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
    seeds = range(max(row.seeds for row in table.rows))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = {metric: "ap50_" + re.sub(r"[^a-z]+", "_", metric) for metric in METRICS}
    writer.writerow(
        [
            "cell",
            *table.keys,
            "seeds",
            "done",
            "failed",
            *(
                f"{names[metric]}_{what}"
                for metric in METRICS
                for what in ("mean", "sd", *(f"seed{seed}" for seed in seeds))
            ),
        ]
    )
    for row in table.rows:
        numbers = [
            value
            for metric in METRICS
            for value in (row.mean(metric), row.deviation(metric), *(row.scores[metric].get(seed) for seed in seeds))
        ]
        values = [str(value).lower() if isinstance(value, bool) else value for value in row.values]
        writer.writerow(
            [
                row.name,
                *values,
                row.seeds,
                row.done,
                row.failed,
                *("" if number is None else number for number in numbers),
            ]
        )
    return out.getvalue()


def write_tables(table: AblationTable, out: Path) -> list[Path]:
    """table.md, table.csv and table.tex in `out`, each whole or as it was."""
    texts = {
        out / "table.md": markdown(table),
        out / "table.csv": comma_separated(table),
        out / "table.tex": latex(table),
    }
    for file, text in texts.items():
        write_text(file, text)
    return list(texts)


def tex(text: str) -> str:
    """A cell of a LaTeX table."""
    return TEX[text] if text in TEX else "".join(TEX.get(letter, letter) for letter in text)


def _texts(table: AblationTable) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the values of the grid, the metrics, how many seeds."""
    short = short_names(table.keys, table.keys)
    columns = []
    for column in range(len(table.keys)):
        values = [row.values[column] for row in table.rows]
        switch = all(isinstance(value, bool) for value in values)
        columns.append([YES if value else NO for value in values] if switch else shown_apart(values))
    if not columns:
        columns = [[row.name for row in table.rows]]
    head = [*(short[key] if key.endswith(SWITCH) else key for key in table.keys), *METRICS, "seeds"]
    rows = [
        [*(column[number] for column in columns), *(row.text(metric) for metric in METRICS), row.state]
        for number, row in enumerate(table.rows)
    ]
    return (head if table.keys else ["", *head]), rows


def _marks(table: AblationTable) -> list[str]:
    """What the marks of rows mean that are not finished."""
    return [] if table.complete else [f"Not finished: {NONE} no seed is done yet; 1 of 3 seeds: the mean of that one."]
