"""The memories of the alignment losses: order, overflow, checkpoint."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hdovd.modeling.distributed import FeatureQueue


def numbered(first: int, count: int, dim: int = 2) -> Tensor:
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(count, dim).contiguous()


def held(queue: FeatureQueue) -> list[float]:
    return queue.read()[:, 0].tolist()


def test_a_new_queue_is_empty() -> None:
    assert FeatureQueue(3, 2).read().shape == (0, 2)


def test_newest_come_first_and_oldest_fall_out() -> None:
    queue = FeatureQueue(5, 2)
    queue.push(numbered(1, 2))
    assert held(queue) == [1, 2]
    queue.push(numbered(3, 2))
    assert held(queue) == [3, 4, 1, 2]
    queue.push(numbered(5, 2))
    assert held(queue) == [5, 6, 3, 4, 1]
    queue.push(numbered(7, 1))
    assert held(queue) == [7, 5, 6, 3, 4]


@pytest.mark.parametrize("filled", [0, 1, 3])
def test_more_rows_than_length(filled: int) -> None:
    queue = FeatureQueue(3, 2)
    queue.push(numbered(50, filled))
    queue.push(numbered(1, 5))
    assert held(queue) == [1, 2, 3]


def test_no_rows_change_nothing() -> None:
    queue = FeatureQueue(3, 2)
    queue.push(numbered(1, 2))
    queue.push(numbered(9, 0))
    assert held(queue) == [1, 2]


def test_length_zero_holds_nothing() -> None:
    queue = FeatureQueue(0, 2)
    queue.push(numbered(1, 2))
    assert queue.read().shape == (0, 2)


def test_rows_are_cut_from_their_graph_and_copied() -> None:
    queue, rows = FeatureQueue(4, 2), numbered(1, 2).requires_grad_()
    queue.push(rows * 1.0)
    assert not queue.read().requires_grad
    before = queue.read()
    queue.push(numbered(7, 2))
    assert before[:, 0].tolist() == [1, 2]  # a loss still in flight keeps what it read


class _Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queue = FeatureQueue(4, 3)


@pytest.mark.parametrize("pushed", [0, 2, 4, 6])
def test_a_checkpoint_restores_the_rows_held(tmp_path: Path, pushed: int) -> None:
    before, after = _Holder(), _Holder()
    before.queue.push(torch.nn.functional.normalize(torch.randn(pushed, 3), dim=1))
    save_file(before.state_dict(), tmp_path / "model.safetensors")
    after.queue.push(torch.ones(4, 3))  # must be forgotten
    after.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert len(after.queue.read()) == min(pushed, 4)
    torch.testing.assert_close(after.queue.read(), before.queue.read(), atol=0, rtol=0)
    for holder in (before, after):
        holder.queue.push(torch.full((1, 3), 0.5))
    torch.testing.assert_close(after.queue.read(), before.queue.read(), atol=0, rtol=0)
