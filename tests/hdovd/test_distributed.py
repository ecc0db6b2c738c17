"""Several processes train as one does: losses, gradients, weights and queues (METHOD section 10)."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hdovd.distributed import counts_of_ranks, divisor, gather_rows, mean_count, rank, world_size

SCENES = Path(__file__).with_name("data_parallel_scenes.py")
Python = Callable[..., subprocess.CompletedProcess[str]]


def results(python: Python, out: Path, shares: list[int]) -> list[dict[str, Any]]:
    done = python([SCENES, out, *shares], out.parent)
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"{r}.pt", weights_only=True) for r in range(len(shares))]


@pytest.fixture(scope="module")
def alone(python: Python, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    one, = results(python, tmp_path_factory.mktemp("alone") / "out", [5])
    assert all(loss > 0 for loss in one["steps"][1]["losses"].values())
    for level in ("instance", "image"):  # full: the order of rows and what falls out are tested too
        assert (one["state"][f"{level}_level.student_queue.rows"] != 0).any(dim=1).sum() > 10
    return one


@pytest.mark.parametrize("shares", [[3, 2], [1, 3, 1]])
def test_processes_together_train_as_one(python: Python, tmp_path: Path, alone: dict[str, Any], shares: list[int]) -> None:
    """With [1, 3, 1] one process has no pseudo box, one no box at all, and one has all pairs of step 2.

    Tolerance: losses 1e-5; gradients and weights 5e-5 of the largest of a tensor, which is float32's rounding of
    convolutions over batches of other sizes.
    """
    together = results(python, tmp_path / "out", shares)
    for step, expected in enumerate(alone["steps"]):
        for name, loss in expected["losses"].items():
            mean = torch.stack([one["steps"][step]["losses"][name] for one in together]).mean()
            torch.testing.assert_close(mean, loss, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
        for one in together:
            for name, gradient in expected["gradients"].items():
                torch.testing.assert_close(one["steps"][step]["gradients"][name], gradient, rtol=1e-5,
                                           atol=5e-5 * float(gradient.abs().max()), msg=lambda text, name=name: f"{name}: {text}")
    for one in together:
        for name, value in alone["state"].items():
            torch.testing.assert_close(one["state"][name], value, rtol=1e-5,
                                       atol=5e-5 * max(float(value.abs().max()), 1e-3), msg=lambda text, name=name: f"{name}: {text}")


def test_one_process_needs_no_group() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert (world_size(), rank()) == (1, 0)
    assert gather_rows(rows) is rows
    assert counts_of_ranks(4, torch.device("cpu")) == [4]
    assert mean_count(torch.tensor(7)).item() == 7.0
    assert divisor(torch.tensor(0)).item() == 1.0
