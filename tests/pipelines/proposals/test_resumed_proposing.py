"""Proposing that was killed, stopped or shared by processes, against an unbroken call: the same network and the same
file.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from propose_scenes import play
from safetensors.torch import load_file, save_file

from hdovd.config.recipe import Recipe, build_recipe
from hdovd.data import DataPaths
from hdovd.pipelines.common.tensors import tensors_hash
from hdovd.pipelines.proposals.config import Detector, ProposeConfig
from hdovd.pipelines.proposals.networks import KINDS, made_by


@pytest.fixture(scope="module")
def job(world: Path, micro_recipe: Callable[..., Recipe]) -> Callable[..., ProposeConfig]:
    recipe = micro_recipe("train.batch_size=4", "input.flip=0.5")  # 5 steps; parts of two batches
    return lambda out, **changes: ProposeConfig(
        data=DataPaths(world),
        out=out,
        recipe=recipe,
        protocol=str(world / "protocol.toml"),
        device="cpu",
        **({"save_minutes": 0.0, "top": 5} | changes),
    )


@pytest.fixture(scope="module")
def unbroken(job: Callable[..., ProposeConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "p.json"
    code, printed = play(job(out), out.with_name("printed.txt"))
    assert code == 0, printed
    return out


def _same(one: Path, two: Path) -> None:
    for network in ("p.oln.safetensors", "p.rehearsal.oln.safetensors"):
        first, second = (load_file(out.with_name(network)) for out in (one, two))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    kept = ["p.json", "p.json.made_by.json", "p.oln.safetensors", "p.rehearsal.oln.safetensors", "printed.txt"]
    assert sorted(file.name for file in two.parent.iterdir()) == kept  # nothing is left behind
    assert all(one.with_name(name).read_bytes() == two.with_name(name).read_bytes() for name in kept[:2])


def test_auto_goes_on_in_the_precision_of_what_is_there(
    job: Callable[..., ProposeConfig], micro_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Of the checkpoint of a training that was killed, then of the network."""
    auto, printed = micro_recipe("train.batch_size=4", "train.precision=auto"), tmp_path / "printed.txt"
    bf16 = replace(job(tmp_path / "p.json"), recipe=micro_recipe("train.batch_size=4", "train.precision=bf16"))
    assert play(bf16, printed, kill_at=3)[0] == -9
    for said in ("goes on at step 2 of 5", "trained with these settings before"):
        code, text = play(replace(bf16, recipe=auto), printed)
        assert code == 0, text
        assert said in text
    assert made_by(tmp_path / "p.oln.safetensors")["recipe"]["train"]["precision"] == "bf16"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_stopped_in_training_and_called_again(
    job: Callable[..., ProposeConfig], unbroken: Path, tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "p.json"
    found, printed = play(job(out), tmp_path / "printed.txt", kill_at=3, signal=number)
    assert found == code, printed
    assert not out.exists()
    assert not out.with_name("p.oln.safetensors").exists()
    found, printed = play(job(out), tmp_path / "printed.txt")
    assert found == 0, printed
    assert f"goes on at step {2 if number == signal.SIGKILL else 3} of 5" in printed
    _same(unbroken, out)


def test_stopped_in_the_rehearsal_and_called_again(
    job: Callable[..., ProposeConfig], unbroken: Path, tmp_path: Path
) -> None:
    found, printed = play(job(tmp_path / "p.json"), tmp_path / "printed.txt", kill_at=2, rehearsal=1)
    assert found == -9, printed
    assert (tmp_path / "p.rehearsal.oln.training").is_dir()
    found, printed = play(job(tmp_path / "p.json"), tmp_path / "printed.txt")
    assert found == 0, printed
    assert "trained with these settings before" in printed
    assert "goes on at step 1 of" in printed
    _same(unbroken, tmp_path / "p.json")


def test_a_network_of_averaged_weights(job: Callable[..., ProposeConfig], unbroken: Path, tmp_path: Path) -> None:
    """Killed or not; and it is not that of the weights which are trained: those are the same without."""
    out = [tmp_path / name / "p.json" for name in ("whole", "killed")]
    recipe = build_recipe(merged(job(tmp_path).recipe.model_dump(by_alias=True), {"train": {"ema": 0.9}}), "test")
    for file, kill_at, code in ((out[0], -1, 0), (out[1], 3, -9), (out[1], -1, 0)):
        file.parent.mkdir(exist_ok=True)
        found, printed = play(replace(job(file), recipe=recipe), file.with_name("printed.txt"), kill_at=kill_at)
        assert found == code, printed
    _same(*out)
    one, other = (load_file(file.with_name("p.oln.safetensors")) for file in (out[0], unbroken))
    assert not torch.equal(one["head.fc1.weight"], other["head.fc1.weight"])
    assert made_by(out[0].with_name("p.oln.safetensors"))["weights_sha256"] == tensors_hash(one)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_stopped_while_proposing_and_called_again(
    job: Callable[..., ProposeConfig], unbroken: Path, tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "p.json"
    found, printed = play(job(out), tmp_path / "printed.txt", kill_in_part=1, signal=number)
    assert found == code, printed
    assert not out.exists()
    before = len(list((tmp_path / "p.parts").iterdir()))
    found, printed = play(job(out, top=4), tmp_path / "printed.txt", kill_in_part=1)
    assert found == -9, printed
    assert len(list((tmp_path / "p.parts").iterdir())) == before + 1  # parts of other settings are others
    damaged = min((tmp_path / "p.parts").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    damaged.write_bytes(damaged.read_bytes()[:100])
    found, printed = play(job(out), tmp_path / "printed.txt")
    assert found == 0, printed
    assert "trained with these settings before" in printed
    _same(unbroken, out)


def test_processes_share_the_pictures_and_write_one_file(
    job: Callable[..., ProposeConfig], unbroken: Path, tmp_path: Path
) -> None:
    """Three parts for two processes: with the network of one, the proposals of one, to the byte."""
    out = tmp_path / "p.json"
    found, printed = play(
        job(out, checkpoint=(unbroken.with_name("p.oln.safetensors"),)), tmp_path / "printed.txt", processes=2
    )
    assert found == 0, printed
    assert out.read_bytes() == unbroken.read_bytes()
    assert printed.count("wrote") == 1


def test_processes_train_one_network(job: Callable[..., ProposeConfig], unbroken: Path, tmp_path: Path) -> None:
    """Without batch norms, which see each process's pictures alone, it goes where that of one process goes: apart from
    each other they are a fraction of the way, for the size that a process's pictures are padded to.
    """
    body = {
        name.removeprefix("backbone.body."): value
        for name, value in load_file(unbroken.with_name("p.oln.safetensors")).items()
        if name.startswith("backbone.body.") and not name.endswith("num_batches_tracked")
    }
    save_file(body, tmp_path / "body.safetensors")
    recipe = build_recipe(
        merged(
            job(tmp_path).recipe.model_dump(by_alias=True),
            {
                "detector": {"backbone": {"norm": "frozen", "weights": str(tmp_path / "body.safetensors")}},
                "train": {"optimizer": "sgd", "lr": 0.01, "clip_norm": 1.0},
            },
        ),
        "test",
    )
    networks = []
    for processes in (1, 2):
        out = tmp_path / str(processes) / "p.json"
        out.parent.mkdir()
        found, printed = play(replace(job(out), recipe=recipe), tmp_path / "printed.txt", processes=processes)
        assert found == 0, printed
        networks.append(load_file(out.with_name("p.oln.safetensors")))
    torch.manual_seed(recipe.train.seed)
    start = KINDS[Detector.OLN](recipe).state_dict()
    learnt = [name for name, value in start.items() if not torch.equal(value, networks[0][name])]
    assert len(learnt) > 20
    for part in ("backbone.fpn", "rpn", "head"):
        apart, way = (
            torch.cat([(state[name] - networks[0][name]).flatten() for name in learnt if name.startswith(part)]).norm()
            for state in (networks[1], start)
        )
        assert apart < 0.4 * way, part  # which RoIs are drawn follows from the features


def merged(tree: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    return tree | {
        name: merged(tree[name], value) if isinstance(value, dict) else value for name, value in over.items()
    }
