"""`train.compile`: a compiled backbone learns as one that is not, under the same names; where it cannot be compiled, it
is said.

Most of it is with `aot_eager`, which takes torch's whole way but the last: code for the machine takes minutes of a CPU.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_backbone import SETTINGS as PLAIN
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._inductor import config as inductor

from hdovd.config.recipe import Recipe, load_recipe
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths
from hdovd.modeling.backbones.pyramid import build_backbone
from hdovd.pipelines.proposals.config import ProposeConfig
from hdovd.pipelines.proposals.propose import propose
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.training import train
from hdovd.pipelines.training.train import compile_backbone, told_shortly

CPU = torch.device("cpu")
TrainMicro = Callable[..., RunFolder]


@pytest.fixture(autouse=True)
def _anew() -> None:
    torch.compiler.reset()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The backbones that training compiles, by aot_eager."""
    found: list[nn.Module] = []

    def note(backbone: nn.Module, device: torch.device) -> None:
        found.append(backbone)
        compile_backbone(backbone, device, "aot_eager")

    monkeypatch.setattr(train, "compile_backbone", note)
    return found


def _pictures(count: int, height: int, width: int) -> Tensor:
    return torch.randn(count, 3, height, width).contiguous(memory_format=torch.channels_last)


def test_one_graph_serves_all_sizes_of_a_batch() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    backbone = build_backbone(load_recipe("demo", PLAIN).detector.backbone).train()
    names = list(backbone.state_dict())
    compile_backbone(backbone, CPU, backend)
    assert len(graphs) == 1  # of the trial
    for shape in ((2, 64, 96), (3, 128, 64), (4, 96, 96)):
        backbone(_pictures(*shape))
    assert len(graphs) == 2
    assert list(backbone.state_dict()) == names


def test_a_run_goes_the_way_of_one_that_is_not_compiled(
    world: Path, training_cache: Path, micro_recipe: Callable[..., Recipe], tmp_path: Path, compiled: list[nn.Module]
) -> None:
    """Its first steps, to float32's rounding, which grows from step to step; with averaged weights, validated."""
    runs = []
    for name, wanted in (("plain", "false"), ("compiled", "true")):
        recipe = micro_recipe(
            *PLAIN, f"train.compile={wanted}", "train.ema=0.9", "train.optimizer=sgd", "train.lr=1e-3"
        )
        job = train.TrainConfig(
            data=DataPaths(world),
            cache=training_cache,
            out=tmp_path / name,
            recipe=recipe,
            protocol=str(world / "protocol.toml"),
            device="cpu",
            validation=DataPaths(world),
        )
        runs.append(train.train(job))
    assert len(compiled) == 1
    plain, other = (run.entries()[0] for run in runs)
    for name in plain.keys() - {"images_per_s", "data_wait", "memory_gb"}:
        assert other[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-5), name
    weights, others = (load_file(run.path / "model.safetensors") for run in runs)
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        if name.startswith("backbone."):
            torch.testing.assert_close(others[name], value, rtol=1e-3, atol=1e-4)


def test_a_run_may_be_compiled_from_some_step_on(
    train_micro: TrainMicro,
    world: Path,
    training_cache: Path,
    tmp_path: Path,
    micro_recipe: Callable[..., Recipe],
    compiled: list[nn.Module],
) -> None:
    """It is no other run: a machine to resume it on may have no compiler, or one."""
    run = train_micro(tmp_path / "run", "train.epochs=1")
    recipe = micro_recipe("train.compile=true")
    job = train.TrainConfig(
        data=DataPaths(world),
        cache=training_cache,
        out=run.path,
        recipe=recipe,
        protocol=str(world / "protocol.toml"),
        device="cpu",
        resume=True,
    )
    lines: list[str] = []
    with lines_to(lines.append):
        train.train(job)
    assert lines[-1].endswith("is finished already")


def test_a_compiled_network_proposes(
    world: Path, micro_recipe: Callable[..., Recipe], tmp_path: Path, compiled: list[nn.Module]
) -> None:
    """And is the one that a call without takes."""
    job = ProposeConfig(
        data=DataPaths(world),
        out=tmp_path / "p.json",
        recipe=micro_recipe(*PLAIN, "train.compile=true"),
        protocol=str(world / "protocol.toml"),
        device="cpu",
    )
    propose(job)
    assert len(compiled) == 2  # the rehearsal, too
    said: list[str] = []
    with lines_to(said.append):
        propose(
            ProposeConfig(data=job.data, out=job.out, recipe=micro_recipe(*PLAIN), protocol=job.protocol, device="cpu")
        )
    assert any("trained with these settings before" in line for line in said)


class _Pyramid(nn.Module):
    """Small enough for a real compiler, and a batch norm whose statistics move."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"2": self.norm(self.conv(pixels)).relu()}


class _Branching(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels * 2 if pixels.sum() > 0 else pixels


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")
def test_code_for_this_machine_calculates_the_same() -> None:
    pixels, found = _pictures(2, 32, 32), []
    for wanted in (False, True):
        torch.manual_seed(0)
        network = _Pyramid()
        if wanted:
            compile_backbone(network, CPU)
        loss = network(pixels)["2"].square().mean()
        loss.backward()
        found.append([loss.detach(), *(value.grad for value in network.parameters()), *network.state_dict().values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_compiled_whole_is_told_in_a_line() -> None:
    network = _Branching()
    compile_backbone(network, CPU, "eager")
    told = r"torch cannot compile the backbone \(.*\); train with train\.compile=false"
    with pytest.raises(HdovdError, match=told) as error, told_shortly():
        network(_pictures(1, 8, 8))
    assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="another's"), told_shortly():
        raise RuntimeError("another's")


def test_between_synced_norms_it_is_compiled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They talk to other processes on the way, which no graph may."""
    whole: list[bool] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *, fullgraph, **_: whole.append(fullgraph))
    for network in (nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.SyncBatchNorm(3))):
        compile_backbone(network, CPU, "eager")
    assert whole == [True, False]


def test_without_a_compiler_nothing_is_begun(
    world: Path,
    training_cache: Path,
    tmp_path: Path,
    micro_settings: list[str],
    forked: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inductor.cpp, "cxx", ("/no/compiler",))  # as CXX=/no/compiler has it
    found = forked(
        [
            "train",
            "--data",
            world,
            "--cache",
            training_cache,
            "--out",
            tmp_path / "run",
            "--device",
            "cpu",
            "--protocol",
            world / "protocol.toml",
            *micro_settings,
            "--set",
            "train.compile=true",
        ],
        tmp_path,
    ).wait()
    assert found.returncode == 1
    assert [line for line in found.stderr.splitlines() if line.startswith("error:")] == [
        line
        for line in found.stderr.splitlines()
        if "torch cannot compile for cpu here" in line and "apt-get install g++" in line
    ]
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "run").exists()
