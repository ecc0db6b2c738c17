"""Run folders that were damaged, changed or sent by a stranger: found or refused in one line, and good ones never."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError
from hdovd.data import DataPaths
from hdovd.modeling.base import build_detector
from hdovd.pipelines.detection.config import DetectConfig
from hdovd.pipelines.detection.detector import Detector
from hdovd.pipelines.evaluation.config import EvalConfig
from hdovd.pipelines.evaluation.evaluate import evaluate
from hdovd.pipelines.export.config import ExportModelConfig
from hdovd.pipelines.extraction.source import data_of_cache
from hdovd.pipelines.report.config import ReportConfig
from hdovd.pipelines.report.report import report
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.training.hooks import load_checkpoint
from hdovd.pipelines.training.train import STATE, TrainConfig, train

Edit = Callable[..., Path]
CODE = "stranger_code"


@pytest.fixture
def run(distilled: RunFolder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(distilled.path, tmp_path / "run"))


def load(run: Path, *, trusted: bool = False) -> None:
    """Read all that a run is read by."""
    folder = RunFolder.open(run, trusted=trusted)
    recipe, texts = folder.recipe(), folder.class_embeddings()
    folder.load_model(build_detector(recipe, texts.shape[1], initialise=False))
    assert load_checkpoint(run, STATE) is not None


def edit(file: Path, change: Callable[[dict[str, Any]], object], *, old: bool = True) -> None:
    """Change a JSON file; `old`: take its checksum away, as an older version wrote it."""
    tree = json.loads(file.read_text())
    change(tree)
    if old:
        tree.pop("sha256", None)
    file.write_text(json.dumps(tree))


# --- damage ---


@pytest.mark.parametrize(
    "name", ["config.toml", "run.json", "class_embeddings.safetensors", "model.safetensors", "checkpoint.pt"]
)
@pytest.mark.parametrize("at", [0.2, 0.5, 0.8])
def test_a_flipped_bit_is_refused_by_the_name_of_its_file(run: Path, name: str, at: float) -> None:
    data = bytearray((run / name).read_bytes())
    data[int(at * len(data))] ^= 1
    (run / name).write_bytes(data)
    with pytest.raises(HdovdError, match=name.replace(".", r"\.")):
        load(run)


def test_a_run_of_before_there_were_checksums_opens(run: Path) -> None:
    edit(run / "run.json", lambda record: record.pop("files"))
    for name in ("model.safetensors", "class_embeddings.safetensors"):
        save_file(load_file(run / name), run / name)
    load(run)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(run: Path, world: Path, value: float) -> None:
    state = load_file(run / "model.safetensors")
    name = next(name for name, tensor in state.items() if tensor.is_floating_point())
    state[name].flatten()[0] = value
    save_file(state, run / "model.safetensors")
    with pytest.raises(HdovdError, match=r"model\.safetensors: values that are not finite in 1 of \d+ tensors"):
        evaluate(EvalConfig(run=run, data=DataPaths(world), device="cpu"))
    with pytest.raises(HdovdError, match="not finite"):
        Detector.from_run(run, device="cpu")


def test_infinities_that_a_model_begins_with_are_its_own(tmp_path: Path, run: Path) -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    folder = RunFolder(run)
    folder.save_model(Masked())
    folder.load_model(Masked())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"protocol": {}}', '{"protocol": 3, "cache": {"levels": {}}}', "[" * 100_000]
)
def test_a_record_that_is_none_is_a_line(run: Path, text: str) -> None:
    (run / "run.json").write_text(text)
    with pytest.raises(HdovdError, match=r"run\.json is damaged"):
        load(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("protocol"),
        lambda r: r.pop("cache"),
        lambda r: r["cache"].pop("levels"),
        lambda r: r["cache"].update(levels=[]),
        lambda r: r["cache"].update(levels={"class": 3}),
        lambda r: r["cache"].update(levels={"class": {"key": 3}}),
        lambda r: r["cache"].update(path=7),
        lambda r: r.update(init={"run": "x"}),
        lambda r: r.update(resumed=3),
        lambda r: r.update(files=[]),
        lambda r: r.update(reliability={"centre": "x"}),
        lambda r: r["protocol"].update(base=3),
        lambda r: r["protocol"].update(more=1),
    ],
)
def test_a_record_of_other_keys_or_types_is_a_line(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(run / "run.json", change)
    with pytest.raises(HdovdError, match=r"run\.json is damaged"):
        RunFolder.open(run).protocol()


def test_checkpoints_that_lack_something_or_are_of_another_run(
    run: Path, world: Path, training_cache: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    job = TrainConfig(
        data=DataPaths(world),
        cache=training_cache,
        out=run,
        recipe=micro_recipe("train.epochs=3"),
        protocol=str(world / "protocol.toml"),
        device="cpu",
        resume=True,
    )
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    for name in STATE:
        torch.save({key: value for key, value in state.items() if key != name}, run / "checkpoint.pt")
        with pytest.raises(HdovdError, match=rf"checkpoint\.pt cannot be read \(it has no {name}\)"):
            train(job)
    torch.save([1], run / "checkpoint.pt")
    with pytest.raises(HdovdError, match=r"checkpoint\.pt cannot be read"):
        train(job)
    for wrong in (
        {"model": {}},
        {"optimizer": {}},
        {"step": "x"},
        {"window": 3},
        {"layout": 3},
        {"best": None},
        {"log_bytes": "x"},
    ):
        torch.save(state | wrong, run / "checkpoint.pt")
        with pytest.raises(HdovdError, match=r"checkpoint\.pt does not fit this training"):
            train(job)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (torch.zeros(3), "found torch.float32 \\(3,\\)"),
        (torch.ones(2, 24), "a row for each"),
        (torch.ones(8, 24), "norm 1"),
        (torch.ones(8, 24, dtype=torch.int64), "torch.int64"),
        (torch.full((8, 24), torch.nan), "norm 1"),
    ],
)
def test_class_embeddings_of_another_shape_or_norm(run: Path, rows: torch.Tensor, said: str) -> None:
    names = RunFolder(run).protocol().names
    rows = (
        torch.nn.functional.pad(rows, (0, 0, 0, len(names) - 8), value=1) if rows.ndim == 2 and len(rows) == 8 else rows
    )
    edit(run / "run.json", lambda record: record.pop("files"))
    save_file({"embeddings": rows}, run / "class_embeddings.safetensors")
    with pytest.raises(HdovdError, match=rf"class_embeddings\.safetensors.*{said}"):
        RunFolder(run).class_embeddings()


# --- kills: at every moment there is a run, or none ---


def test_a_kill_between_any_two_writes_leaves_a_run_that_opens(run: Path, distilled: RunFolder) -> None:
    """Weights of one epoch beside the checkpoint and the record of another: what a kill between the writes leaves."""
    folder = RunFolder.open(run)
    model = build_detector(folder.recipe(), folder.class_embeddings().shape[1], initialise=False)
    folder.save_model(model)
    load(run)
    folder.save_model(model, "best.safetensors")
    (run / ".run.json.partial").write_text("{")  # killed while it wrote this
    load(run)
    folder.go_on(0, {"time": "now"})
    load(run)
    assert folder.record()["resumed"] == [{"time": "now"}]


# --- what a stranger's run names ---


@pytest.fixture
def strange(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, sent with a module that says so if it is imported, in the current folder."""
    (tmp_path / f"{CODE}.py").write_text("from pathlib import Path\nPath('imported').touch()\nclass Loss: ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, CODE, raising=False)
    edit(run / "run.json", lambda record: record.pop("files"))
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config + f'\n[loss.extra.mine]\nuse = "{CODE}:Loss"\nweight = 1.0\n')
    return run


@pytest.mark.parametrize(
    "job",
    [
        lambda run, world, out: EvalConfig(run=run, data=DataPaths(world)),
        lambda run, world, out: DetectConfig(run=run, images=("x.jpg",), out=out),
        lambda run, world, out: ExportModelConfig(run=run, form="onnx", out=out / "x.onnx"),
    ],
)
def test_code_of_a_run_from_elsewhere_is_not_imported(
    strange: Path, world: Path, tmp_path: Path, job: Callable[..., Any]
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(
        HdovdError, match=rf"names code outside of hdovd.*loss\.extra\.mine\.use = '{CODE}:Loss'.*--trust"
    ):
        job(strange, world, tmp_path / "out").check()
    with pytest.raises(HdovdError, match="--trust"):
        Detector.from_run(strange, device="cpu")
    assert not (tmp_path / "imported").exists()
    with pytest.raises(HdovdError, match="expected a class of torch"):  # it was built then
        Detector.from_run(strange, device="cpu", trust=True)
    assert (tmp_path / "imported").exists()


def test_code_of_init_needs_the_same_in_the_recipe(
    strange: Path, world: Path, training_cache: Path, tmp_path: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    job = TrainConfig(
        data=DataPaths(world),
        cache=training_cache,
        out=tmp_path / "new",
        recipe=micro_recipe(),
        protocol=str(world / "protocol.toml"),
        device="cpu",
        init=strange,
    )
    with pytest.raises(HdovdError, match=CODE):
        train(job)
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("url", ["s3://bucket/cache", "http://127.0.0.1:9/cache", "simplecache::s3://bucket/cache"])
def test_an_address_of_a_run_from_elsewhere_is_not_asked(
    run: Path, world: Path, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr("hdovd.cache.store._file_system", asked)
    edit(run / "run.json", lambda record: record["cache"].update(path=url))
    with pytest.raises(HdovdError, match=r"names the cache .*your credentials.*--trust"):
        data_of_cache(RunFolder.open(run))
    with pytest.raises(HdovdError, match=r"where are the pictures.*--trust"):
        report(ReportConfig(runs=(run,), out=tmp_path / "out"))
    detector = Detector.from_run(run, device="cpu")  # which needs no cache
    with pytest.raises(HdovdError, match=r"cannot be asked .*--trust"):
        detector.set_classes(["zebra crossing"])
    with pytest.raises(HdovdError, match="AssertionError: asked"):
        data_of_cache(RunFolder.open(run, trusted=True))


def test_a_run_with_the_users_own_code_is_known_where_it_was_trained(
    world: Path,
    training_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    micro_recipe: Callable[..., Recipe],
) -> None:
    (tmp_path / "own_loss.py").write_text(
        "import torch\nclass Zero(torch.nn.Module):\n    def __init__(self, dim, channels):\n"
        "        super().__init__()\n    def forward(self, view):\n        return torch.zeros(())\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = micro_recipe("loss.extra.zero.use=own_loss:Zero", "loss.extra.zero.weight=1.0")
    train(
        TrainConfig(
            data=DataPaths(world),
            cache=training_cache,
            out=tmp_path / "own",
            recipe=recipe,
            protocol=str(world / "protocol.toml"),
            device="cpu",
        )
    )
    load(tmp_path / "own")
    shutil.copytree(tmp_path / "own", tmp_path / "sent")
    with pytest.raises(HdovdError, match="--trust"):
        load(tmp_path / "sent")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another user"))
    with pytest.raises(HdovdError, match="--trust"):
        load(tmp_path / "own")
    load(tmp_path / "own", trusted=True)
