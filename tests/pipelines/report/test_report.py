"""The report: one page that says what the run folders say, whatever they are called and whatever they lack."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from hdovd.cache import Source
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths, Protocol
from hdovd.pipelines.demo.world import BASE, NOVEL
from hdovd.pipelines.evaluation.evaluate import EvalConfig, evaluate
from hdovd.pipelines.report.figures import OneRun, ablation, charted
from hdovd.pipelines.report.report import ReportConfig, names_of, report
from hdovd.pipelines.runs import Run, RunFolder

HOSTILE = 'a<img src=x onerror=alert(1)>&"b'


class _Page(HTMLParser):
    """Tags with their attributes, and the text of every cell of the tables by their id."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.cells, self._cell = "", list[str](), False
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self.cells.append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.cells[-1] += data.strip()

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if name in (attributes.get("class") or "").split()]


def _copies(runs: dict[str, RunFolder], folder: Path) -> list[Path]:
    return [Path(shutil.copytree(run.path, folder / name)) for name, run in runs.items()]


def _report(runs: list[Path], data: Path | None, out: Path, **changes: Any) -> tuple[_Page, list[str]]:
    said: list[str] = []
    values: dict[str, Any] = {
        "data": DataPaths(data),
        "gallery": 3,
        "pseudo": 2,
        "relation_images": 3,
        "threshold": 0.05,
        "device": "cpu",
    }
    values |= changes
    with lines_to(said.append):
        return _Page(report(ReportConfig(runs=tuple(runs), out=out, **values))), said


@pytest.fixture(scope="module")
def two(
    distilled: RunFolder, base_only: RunFolder, world: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[_Page, list[str], list[Path]]:
    folder = tmp_path_factory.mktemp("report")
    runs = _copies({HOSTILE: distilled, "base only": base_only}, folder / "runs")
    return *_report(runs, world, folder / "out"), runs


def test_runs_are_evaluated_if_they_are_not(two: tuple[_Page, list[str], list[Path]]) -> None:
    _, said, runs = two
    assert sum("is not evaluated yet" in line for line in said) == 2
    assert all((run / "metrics.json").is_file() for run in runs)


def test_the_page_needs_nothing_else(two: tuple[_Page, list[str], list[Path]]) -> None:
    page = two[0]
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/"))
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page.source)


def test_names_are_shown_and_never_markup(two: tuple[_Page, list[str], list[Path]]) -> None:
    page = two[0]
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert page.text.count(HOSTILE) > 5


def test_tables_say_what_the_metrics_say(two: tuple[_Page, list[str], list[Path]]) -> None:
    page, _, runs = two
    for run in runs:
        metrics = json.loads((run / "metrics.json").read_text())
        at = page.cells.index(run.name)
        expected = [
            *(metrics["ap50"][g] for g in ("novel", "base", "all")),
            metrics["split_blind"]["ap50"]["novel"],
            *(metrics["ap"][g] for g in ("novel", "base", "all")),
        ]
        assert page.cells[at + 1 : at + 8] == [f"{value:.1f}" for value in expected]
    of_both = [json.loads((run / "metrics.json").read_text())["per_class"] for run in runs]
    for name in (*BASE, *NOVEL):
        at = next(k for k, cell in enumerate(page.cells) if cell == name and page.cells[k + 1] in ("base", "novel"))
        assert page.cells[at + 1] == ("novel" if name in NOVEL else "base")
        expected = [metrics[name][kind] for kind in ("ap50", "ap") for metrics in of_both]
        assert page.cells[at + 3 : at + 7] == ["\N{EN DASH}" if value is None else f"{value:.1f}" for value in expected]


def test_the_gallery_shows_truth_and_each_run_with_novel_objects_first(
    two: tuple[_Page, list[str], list[Path]], world: Path
) -> None:
    page, _, _ = two
    cards = [a for a in page.with_class("card") if (a.get("aria-label") or "").startswith("image ")]
    tree = json.loads((world / "annotations" / "instances_val2017.json").read_text())
    novel = {c["id"] for c in tree["categories"] if c["name"] in NOVEL}
    counts = {image["id"]: 0 for image in tree["images"]}
    for a in tree["annotations"]:
        counts[a["image_id"]] += a["category_id"] in novel
    shown = [int(str(a["aria-label"]).removeprefix("image ")) for a in cards]
    assert [counts[i] for i in shown] == sorted(counts.values(), reverse=True)[:3]
    names = {c["id"]: c["name"] for c in tree["categories"]}
    for image, card in zip(shown, cards, strict=True):
        truth = {names[a["category_id"]] for a in tree["annotations"] if a["image_id"] == image}
        assert truth <= set(json.loads(str(card["data-classes"])))
    assert len(page.with_class("scene")) == 3 * 3 + 2  # truth and two runs of each image; two training images


def test_what_a_run_lacks_is_said(two: tuple[_Page, list[str], list[Path]]) -> None:
    text = two[0].text
    assert "base only: this run has no instance level" in text
    assert "base only: it was trained without pseudo boxes" in text
    assert "CLIP, the teacher" in text


def test_a_run_whose_cache_is_gone_still_has_a_report(distilled: RunFolder, world: Path, tmp_path: Path) -> None:
    (run,) = _copies({"run": distilled}, tmp_path)
    record = json.loads((run / "run.json").read_text())
    record["cache"]["path"] = str(tmp_path / "moved away")
    (run / "run.json").write_text(json.dumps(record))
    page, _ = _report([run], world, tmp_path / "out", trust=True)
    assert page.text.count("no feature cache at") == 2  # of pseudo boxes, and of relations
    with pytest.raises(HdovdError, match=r"where are the pictures.*moved away"):
        report(ReportConfig(runs=(run,), out=tmp_path / "out", trust=True))


def test_without_data_the_pictures_are_where_the_cache_was_made(distilled: RunFolder, tmp_path: Path) -> None:
    (run,) = _copies({"run": distilled}, tmp_path)
    page, _ = _report([run], None, tmp_path / "out", gallery=0, pseudo=0, relation_images=0)
    assert "the gallery was left out" in page.text
    assert "The matrices were left out" in page.text


def test_what_scores_less_is_hidden_without_scripts_too(
    two: tuple[_Page, list[str], list[Path]], world: Path, tmp_path: Path
) -> None:
    def scored(threshold: float) -> list[dict[str, str | None]]:
        page, _ = _report(two[2], world, tmp_path / str(threshold), threshold=threshold, pseudo=0, relation_images=0)
        return [attributes for tag, attributes in page.tags if tag == "g" and "data-score" in attributes]

    scores = sorted({float(str(attributes["data-score"])) for attributes in scored(0.0)})
    threshold = scores[len(scores) // 2]
    found = scored(threshold)
    hidden = ["hidden" in attributes for attributes in found]
    assert hidden == [float(str(attributes["data-score"])) < threshold for attributes in found]
    assert set(hidden) == {True, False}


def test_pseudo_boxes_are_of_images_from_first_to_last(
    distilled: RunFolder, world: Path, training_cache: Path, tmp_path: Path
) -> None:
    page, _ = _report(
        _copies({"run": distilled}, tmp_path), world, tmp_path / "out", gallery=0, pseudo=3, relation_images=0
    )
    shown = [int(number) for number in re.findall(r"training image (\d+)", page.text)]
    with_some = [image for image, count in FeatureCache(training_cache).counts(Source.PROPOSAL).items() if count]
    assert shown == [with_some[0], with_some[round((len(with_some) - 1) / 2)], with_some[-1]]


@pytest.mark.parametrize("line", ["{nonsense", "null", "[" * 20_000], ids=["no JSON", "no object", "deep"])
def test_a_damaged_log_leaves_out_the_losses_and_a_torn_end_nothing(
    line: str, distilled: RunFolder, world: Path, tmp_path: Path
) -> None:
    runs = _copies({"torn": distilled, "damaged": distilled}, tmp_path)
    whole = (runs[0] / "log.jsonl").read_text()
    (runs[0] / "log.jsonl").write_text(whole + '{"step": 9, "epo')
    (runs[1] / "log.jsonl").write_text(line + "\n" + whole)
    page, _ = _report(runs, world, tmp_path / "out", gallery=0, pseudo=0, relation_images=0)
    assert "its losses are left out" in page.text
    assert "torn: log.jsonl" not in page.text
    assert "Instance level" in page.text


def test_a_recipe_of_another_version_leaves_out_what_needs_the_model(
    distilled: RunFolder, world: Path, tmp_path: Path
) -> None:
    runs = _copies({"run": distilled}, tmp_path)
    evaluate(EvalConfig(run=runs[0], data=DataPaths(world), device="cpu"))
    (runs[0] / "config.toml").write_text("some_old_key = 1\n" + (runs[0] / "config.toml").read_text())
    page, _ = _report(runs, world, tmp_path / "out", trust=True)
    assert "run: recipe" in page.text
    assert "some_old_key" in page.text


def test_an_unfinished_run_is_called_that(distilled: RunFolder, world: Path, tmp_path: Path) -> None:
    (run,) = _copies({"run": distilled}, tmp_path)
    (run / "config.toml").write_text((run / "config.toml").read_text().replace("epochs = 3", "epochs = 9"))
    page, _ = _report([run], world, tmp_path / "out", gallery=0, pseudo=0, relation_images=0, trust=True)
    assert "run has done 3 of its 9 epochs" in page.text


@pytest.mark.parametrize(
    ("runs", "why"), [((), "needs a run"), (("run", "run"), "given twice"), (("nothing",), "is no run")]
)
def test_refusals(runs: tuple[str, ...], why: str, distilled: RunFolder, world: Path, tmp_path: Path) -> None:
    _copies({"run": distilled}, tmp_path)
    with pytest.raises(HdovdError, match=why):
        report(ReportConfig(runs=tuple(tmp_path / name for name in runs), out=tmp_path / "out", data=DataPaths(world)))
    assert not (tmp_path / "out").exists()


def test_out_that_is_something_else_is_refused(distilled: RunFolder, world: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    (tmp_path / "site" / "index.html").mkdir(parents=True)
    for out, why in (
        ("out", "is a file: give a folder"),
        ("page.html", "give a folder"),
        ("photos", "other things .cat.jpg"),
        ("site", "other things .index.html"),
    ):
        with pytest.raises(HdovdError, match=why):
            report(ReportConfig(runs=(distilled.path,), out=tmp_path / out, data=DataPaths(world)))


def test_names_are_what_paths_do_not_share() -> None:
    assert names_of([Path("/a/b/c")]) == ["c"]
    assert names_of([Path("/a/b/c/seed0"), Path("/a/b/d/seed0")]) == ["c/seed0", "d/seed0"]
    assert names_of([Path("/a/b"), Path("/a/b/c")]) == ["b", "c"]


def _run(ap50: float, **settings: Any) -> Run:
    values = {"train.seed": 0, "loss.class.enabled": True, "pseudo_boxes.reliability_centre": 0.3, **settings}
    return Run(
        Path("r"),
        datetime(2026, 1, 1),
        values,
        ap={"novel": ap50, "base": 50.0, "all": 40.0},
        split_blind={"novel": ap50 - 1},
    )


def test_runs_that_differ_in_the_seed_alone_are_one_row() -> None:
    without = {"loss.class.enabled": False, "pseudo_boxes.reliability_centre": 9}
    table = ablation([_run(10.0), _run(20.0, **{"train.seed": 1}), _run(5.0, **without)], ["last"] * 3)
    assert table is not None
    assert table["columns"] == ["class"]  # what weighs pseudo boxes is of no interest to a run without them
    assert [row["texts"] for row in table["rows"]] == [["\N{CHECK MARK}"], ["\N{EN DASH}"]]
    first, second = (row["row"] for row in table["rows"])
    assert first.text("novel") == "15.0 (7.1)"
    assert second.text("novel") == "5.0"
    assert [row["best"]["novel"] for row in table["rows"]] == [True, False]


def test_a_run_that_is_not_evaluated_has_no_mean() -> None:
    table = ablation(
        [_run(10.0, **{"train.lr": 0.2}), replace(_run(0.0, **{"train.lr": 0.1}), ap={}, split_blind={})], ["last"] * 2
    )
    assert table is not None
    assert [row["row"].text("novel") for row in table["rows"]] == ["10.0", "-"]


def test_runs_of_other_features_or_weights_are_rows_of_their_own() -> None:
    levels: dict[str, dict[str, Any]] = {"instance": {"key": "a"}}
    runs = [
        replace(_run(10.0), levels=levels),
        replace(_run(20.0), levels={"instance": {"key": "b"}}),
        replace(_run(30.0), levels=levels),
    ]
    table = ablation(runs, ["last", "last", "best"])
    assert table is not None
    assert table["columns"] == ["features", "weights"]
    assert [(row["row"].text("novel"), row["texts"][1]) for row in table["rows"]] == [
        ("10.0", "last"),
        ("20.0", "last"),
        ("30.0", "best"),
    ]


def test_all_rows_of_zero_are_best() -> None:
    table = ablation([_run(0.0), _run(0.0, **{"loss.class.enabled": False})], ["last", "last"])
    assert table is not None
    assert [row["best"]["novel"] for row in table["rows"]] == [True, True]


def test_an_oracle_is_a_row_of_its_own() -> None:
    base_only = {f"loss.{level}.enabled": False for level in ("instance", "class", "image")}
    table = ablation([_run(10.0, **base_only), replace(_run(60.0, **base_only), oracle=True)], ["last"] * 2)
    assert table is not None
    assert table["columns"] == ["oracle"]
    assert [row["row"].moments("novel")[0] for row in table["rows"]] == [10.0, 60.0]


@pytest.mark.parametrize(("base", "novel"), [(3, 2), (150, 80), (150, 10), (20, 200), (100, 0)])
def test_charts_by_class_show_few_of_many(base: int, novel: int) -> None:
    """Those with the most objects, half of them novel where there are as many, novel ones first."""
    names = [f"class {k}" for k in range(base + novel)]
    protocol = Protocol("many", tuple(names[:base]), tuple(names[base:]))
    labels = np.repeat(np.arange(base + novel), np.arange(base + novel) % base + 1)
    objects = SimpleNamespace(labels=labels, crowd=np.zeros(len(labels), bool))
    run = SimpleNamespace(analysis=SimpleNamespace(protocol=protocol, objects=objects))
    shown = charted(cast(OneRun, run))
    of_novel = [label for label in shown if label >= base]
    assert len(shown) == min(100, base + novel)
    assert shown == [*of_novel, *(label for label in shown if label < base)]
    assert len(of_novel) == (novel if base + novel <= 100 else min(novel, max(50, 100 - base)))
    counts = np.bincount(labels)
    for own in (range(base), range(base, base + novel)):
        left = [counts[label] for label in own if label not in shown]
        assert max(left, default=0) <= min((counts[label] for label in own if label in shown), default=0)
