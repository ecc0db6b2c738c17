"""The numbers of an ablation's table against values computed by hand, in all three forms."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from hdovd.config.recipe import PRESETS, load_recipe
from hdovd.data import DataPaths
from hdovd.pipelines.ablation.config import AblateConfig
from hdovd.pipelines.ablation.grid import (
    GAP,
    AblationTable,
    Cell,
    Row,
    cells_of,
    comma_separated,
    latex,
    markdown,
    note,
    scores_of,
    tex,
    with_arms,
    with_gap,
    write_tables,
)
from hdovd.pipelines.runs import Run

CONFIG = AblateConfig(
    data=DataPaths(Path("coco")),
    cache="my_cache",
    out=Path("out"),
    grid=(),
    recipe="demo",
    settings=("train.epochs=2",),
)


def _run(novel: float | None, base: float) -> Run:
    return Run(
        Path("r"),
        datetime(2026, 3, 4).astimezone(),
        levels={"instance": {"key": "k"}},
        versions={"hdovd": "1.2", "torch": "2.6"},
        git={"commit": "0123456789abcdef", "dirty": False},
        ap={"novel": novel, "base": base, "all": 1.0},
        split_blind={"novel": novel},
    )


@pytest.fixture
def table() -> AblationTable:
    """Three cells of three seeds: done; one seed done and one failed; none done."""
    cells = [
        Cell(f"image-{on}_lr-{lr}", {"loss.image.enabled": on, "train.lr": lr}, ())
        for on, lr in ((True, 0.1), (False, 0.1), (False, 1))
    ]
    done = {
        cells[0].name: {0: _run(10.0, 50.0), 2: _run(13.0, 50.0), 1: _run(16.0, 50.5)},
        cells[1].name: {1: _run(None, 3.0)},
        cells[2].name: {},
    }
    rows = [
        Row(cell.name, tuple(cell.values.values()), scores_of(done[cell.name]), 3, failed)
        for cell, failed in zip(cells, (0, 1, 0), strict=True)
    ]
    runs = [run for by_seed in done.values() for run in by_seed.values()]
    return AblationTable(tuple(cells[0].values), rows, note(runs, CONFIG))


def test_mean_and_sample_deviation(table: AblationTable) -> None:
    first, second, third = table.rows
    assert first.moments("novel")[0] == pytest.approx(13.0)
    assert first.moments("novel")[1] == pytest.approx(3.0)  # sqrt((9 + 0 + 9) / 2)
    assert first.moments("base")[1] == pytest.approx((0.5**2 / 3) ** 0.5)  # squares 1/36 + 1/36 + 4/36, over 2
    assert (second.moments("novel")[0], second.moments("base")[0], second.moments("base")[1]) == (None, 3.0, None)
    assert (third.moments("novel")[0], third.done) == (None, 0)
    assert "Not finished" in markdown(table)


def test_markdown(table: AblationTable) -> None:
    lines = markdown(table).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:5]]
    assert cells[0] == ["image", "train.lr", "novel", "base", "all", "novel, split-blind", "seeds"]
    assert cells[2] == ["✓", "0.1", "13.0 (3.0)", "50.2 (0.3)", "1.0 (0.0)", "13.0 (3.0)", "3"]
    assert cells[3] == ["\u2013", "0.1", "-", "3.0", "1.0", "-", "1 of 3, 1 failed"]
    assert cells[4] == ["\u2013", "1", "...", "...", "...", "...", "0 of 3"]
    assert len({len(line) for line in lines[:5]}) == 1
    for part in ("my_cache", "set default", "demo train.epochs=2", "seeds 0 to 2", "hdovd 1.2", "commit 0123456789."):
        assert part in lines[6]
    assert lines[7].startswith("Not finished")


def test_csv_has_the_plain_numbers(table: AblationTable) -> None:
    rows = list(csv.DictReader(io.StringIO(comma_separated(table))))
    assert [row["cell"] for row in rows] == [row.name for row in table.rows]
    assert [row["loss.image.enabled"] for row in rows] == ["true", "false", "false"]
    novel = [rows[0][f"ap50_novel_{what}"] for what in ("seed0", "seed1", "seed2", "mean", "sd")]
    assert novel == ["10.0", "16.0", "13.0", "13.0", "3.0"]
    assert float(rows[0]["ap50_base_sd"]) == pytest.approx(0.288675134594813)
    second = [rows[1][name] for name in ("ap50_novel_seed1", "ap50_base_seed0", "ap50_base_seed1", "done", "failed")]
    assert second == ["", "", "3.0", "1", "1"]
    assert rows[0]["ap50_novel_split_blind_mean"] == "13.0"


def test_latex_is_escaped(table: AblationTable) -> None:
    text = latex(table)
    assert text.count(r"\\") == 4
    assert r"\checkmark & 0.1 & 13.0 (3.0)" in text
    assert r"\ldots" in text
    assert all(f"\\{rule}rule" in text for rule in ("top", "mid", "bottom"))
    assert text.index("% AP50 in percent") < text.index(r"\begin{tabular}{llrrrrr}")
    assert tex("a_b & 50% {x} ~^#$\\") == r"a\_b \& 50\% \{x\} \textasciitilde{}\textasciicircum{}\#\$\textbackslash{}"


def test_one_cell_without_a_grid_and_files(tmp_path: Path) -> None:
    run = _run(1.0, 2.0)
    table = AblationTable((), [Row("recipe", (), scores_of({0: run}), 1)], note([run], replace(CONFIG, seeds=1)))
    write_tables(table, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"table.md", "table.csv", "table.tex"}
    assert "| recipe |   1.0 |" in (tmp_path / "table.md").read_text()
    assert "seed 0;" in (tmp_path / "table.md").read_text()


# --- the novel gap ---


def _gap_table(
    cell: dict[int, float], base_only: dict[int, float], oracle: dict[int, float], keys: tuple[str, ...] = ("train.lr",)
) -> AblationTable:
    """A cell of novel AP50 by seed and the two arms, of three seeds."""
    rows = [
        Row(name, (0.1,) * len(keys), scores_of({seed: _run(ap, 50.0) for seed, ap in novel.items()}), 3, 0, arm)
        for name, arm, novel in (
            ("lr-0.1" if keys else "recipe", "", cell),
            ("base-only", "base-only", base_only),
            ("oracle", "oracle", oracle),
        )
    ]
    return AblationTable(keys, with_gap(rows), "note.")


def test_the_gap_is_closed_seed_by_seed() -> None:
    table = _gap_table({0: 40.0, 1: 55.0, 2: 25.0}, {0: 10.0, 1: 15.0, 2: 15.0}, {0: 70.0, 1: 65.0, 2: 55.0})
    cell, base_only, _ = table.rows
    assert cell.scores[GAP] == pytest.approx({0: 50.0, 1: 80.0, 2: 25.0})  # 30 / 60, 40 / 50, 10 / 40
    assert cell.moments(GAP)[0] == pytest.approx(155 / 3)
    assert cell.moments(GAP)[1] == pytest.approx(758.3333333**0.5)  # squares 25/9, 7225/9 and 6400/9, over 2
    assert GAP not in base_only.scores
    lines = markdown(table).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:5]]
    assert cells[0][:2] == ["", "train.lr"]
    assert cells[0][-2:] == ["novel gap closed, %", "seeds"]
    assert [row[0] for row in cells[2:]] == ["", "base-only", "oracle"]
    assert [row[-2] for row in cells[2:]] == ["51.7 (27.5)", "", ""]
    assert "(cell - base-only) / (oracle - base-only) of novel AP, for each seed" in lines[7]
    assert "no open-vocabulary result" in lines[7]
    assert "novel gap closed, \\%" in latex(table)
    assert r"\begin{tabular}{llrrrrrr}" in latex(table)


def test_csv_of_the_gap() -> None:
    table = _gap_table({0: 40.0, 1: 55.0}, {0: 10.0, 1: 15.0}, {0: 70.0})
    rows = list(csv.DictReader(io.StringIO(comma_separated(table))))
    assert [(row["cell"], row["arm"]) for row in rows] == [
        ("lr-0.1", ""),
        ("base-only", "base-only"),
        ("oracle", "oracle"),
    ]
    names = [f"novel_gap_closed_{part}" for part in ("mean", "sd", "seed0", "seed1", "seed2")]
    assert [rows[0][name] for name in names] == ["50.0", "", "50.0", "", ""]
    assert [rows[2][name] for name in names] == [""] * 5


def test_no_percentage_without_a_gap() -> None:
    """Not even of the other seeds: which seeds count would depend on what came out."""
    for worse in (15.0, 14.0):
        table = _gap_table({0: 40.0, 1: 55.0}, {0: 10.0, 1: 15.0}, {0: 70.0, 1: worse})
        assert table.rows[0].text(GAP) == "-"
        assert table.rows[0].scores[GAP] == {0: 50.0, 1: None}
    below = _gap_table({0: 5.0}, {0: 10.0}, {0: 60.0}).rows[0]
    assert below.text(GAP) == "-10.0"  # a cell that is worse than base-only has a percentage


def test_a_gap_waits_for_its_arms() -> None:
    table = _gap_table({0: 40.0, 1: 55.0}, {0: 10.0}, {}, keys=())
    assert table.rows[0].text(GAP) == "..."
    assert "| recipe " in markdown(table)
    assert "Not finished" in markdown(table)


def test_the_arms_are_the_recipe_without_distillation_and_base_only_may_be_in_the_grid() -> None:
    grid = ["loss.instance.enabled=true,false", "train.lr=0.1,0.002"]
    cells = with_arms(cells_of("demo", ("train.epochs=3",), grid), "demo", ("train.epochs=3",))
    assert [cell.name for cell in cells[-2:]] == ["base-only", "oracle"]
    assert [cell.arm for cell in cells] == [""] * 4 + ["base-only", "oracle"]
    lr = load_recipe("demo").train.lr
    assert cells[-1].values == {"loss.instance.enabled": False, "train.lr": lr}
    assert cells[-1].recipe("demo", ("train.epochs=3",), 1) == load_recipe(
        "demo", ["train.epochs=3", *PRESETS["base-only"], "train.seed=1"]
    )
    levels = [f"loss.{level}.enabled=true,false" for level in ("instance", "class", "image")]
    cells = with_arms(cells_of("demo", (), levels), "demo", ())
    assert [(cell.name, cell.arm) for cell in cells[-2:]] == [
        ("instance-off_class-off_image-off", "base-only"),
        ("oracle", "oracle"),
    ]


def test_csv_columns_of_groups_with_digits_and_capitals_are_told_apart() -> None:
    groups = ("top10", "top20", "R", "all")
    scores: dict[str, dict[int, float | None]] = {name: {0: 1.0} for name in (*groups, "novel", "novel, split-blind")}
    table = AblationTable((), [Row("recipe", (), scores, 1)], "note.", "ap", groups)
    head = comma_separated(table).splitlines()[0].split(",")
    assert len(set(head)) == len(head)
    assert {"ap_top10_mean", "ap_top20_mean", "ap_R_mean", "ap_all_mean", "ap_novel_split_blind_mean"} <= set(head)
