"""Several processes train as one does: losses, gradients, weights and queues (METHOD section 10)."""

from pathlib import Path
from typing import Any

import data_parallel_scenes
import pytest
import torch
from forked_group import played
from torch import Tensor

from hdovd.modeling.distributed import counts_of_ranks, divisor, gather_rows, mean_count, rank, world_size


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (one,) = played(data_parallel_scenes, tmp_path_factory.mktemp("alone") / "out", [5])
    assert all(loss > 0 for loss in one["steps"][1]["losses"].values())
    for level in ("instance", "image"):  # full: the order of rows and what falls out are tested too
        assert (one["state"][f"{level}_level.student_queue.rows"] != 0).any(dim=1).sum() > 10
    return one


@pytest.mark.parametrize("shares", [[3, 2], [1, 3, 1]])
def test_processes_together_train_as_one(tmp_path: Path, alone: dict[str, Any], shares: list[int]) -> None:
    """With [1, 3, 1] one process has no pseudo box, one no box at all, and one has all pairs of step 2.

    In float64; what is left is the rounding of the counts, which are float32: 1e-6 of the largest value of a tensor.
    """
    together = played(data_parallel_scenes, tmp_path / "out", shares)

    def check(name: str, found: Tensor, expected: Tensor) -> None:
        assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max()), name

    for step, expected in enumerate(alone["steps"]):
        for name, loss in expected["losses"].items():
            check(name, torch.stack([one["steps"][step]["losses"][name] for one in together]).mean(), loss)
        for one in together:
            for name, gradient in expected["gradients"].items():
                check(name, one["steps"][step]["gradients"][name], gradient)
    for one in together:
        for name, value in alone["state"].items():
            check(name, one["state"][name], value)


def test_one_process_needs_no_group() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert (world_size(), rank()) == (1, 0)
    assert gather_rows(rows) is rows
    assert counts_of_ranks(4, torch.device("cpu")) == [4]
    assert mean_count(torch.tensor(7)).item() == 7.0
    assert divisor(torch.tensor(0)).item() == 1.0
