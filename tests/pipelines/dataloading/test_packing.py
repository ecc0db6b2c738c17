"""Batches in one buffer: any nesting comes back equal, and its views do not touch each other."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from hdovd.core import HdovdError
from hdovd.data.targets import Targets
from hdovd.pipelines.dataloading.loader import ALIGNMENT, pack

TORCH_DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]
NUMPY_DTYPES = ["?", "u1", "i8", ">i4", "f2", "f4", "c16", "U3", "S2", "M8[s]", "i4,f8", "O"]


@dataclass(frozen=True, slots=True)
class Strict:
    """Its check holds for whole values, not for a stand-in of one."""

    rows: Any
    note: Any

    def __post_init__(self) -> None:
        if isinstance(self.rows, int):
            raise TypeError("a number in place of a tensor")


class Pair(NamedTuple):
    first: Any
    second: Any


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        # numpy's pickles of views have the values in the machine's byte order
        assert (a.dtype.newbyteorder("="), a.shape) == (b.dtype.newbyteorder("="), b.shape)
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert_same(list(a.values()), list(b.values()))
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif is_dataclass(a):
        for field in fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, HdovdError):
        assert a.args == b.args
    else:
        assert a == b


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tensor = torch.randint(0, 100, shape, generator=generator).to(draw(st.sampled_from(TORCH_DTYPES)))
    layout = draw(st.sampled_from(["contiguous", "transposed", "stepped", "expanded"])) if shape else "contiguous"
    if layout == "transposed":
        return tensor.transpose(0, -1)
    if layout == "stepped":
        return tensor[::2]
    return tensor.expand(3, *tensor.shape) if layout == "expanded" else tensor


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    array = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 100, shape)
    array = np.asarray(array).astype(draw(st.sampled_from(NUMPY_DTYPES)))
    return draw(st.sampled_from([array, array.T, array[::-1] if shape else array]))


PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.builds(HdovdError, st.text(max_size=3)),
)
NESTED = st.recursive(
    st.one_of(tensors(), arrays(), PLAIN),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.builds(Strict, st.lists(inner, max_size=2), inner),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(NESTED)
@example(np.array([63, 85], ">i4")[::-1])
def test_any_nesting_comes_back_equal_from_places_apart(batch: Any) -> None:
    packed = pack(batch)
    assert_same(packed.unpack(), batch)
    end = 0
    for offset, shape, dtype in packed.places:
        assert offset % ALIGNMENT == 0
        assert offset >= end
        end = offset + int(np.prod(shape, dtype=int)) * dtype.itemsize
    assert end <= len(packed.buffer) < end + ALIGNMENT
    assert_same(pickle.loads(pickle.dumps(packed)).unpack(), batch)


def test_all_tensors_of_a_sample_lie_in_the_buffer() -> None:
    targets = Targets(*(torch.rand(2, 4) for _ in fields(Targets)))
    batch: Any = [
        (torch.rand(3, 5, 5), targets, 1),
        {"a": torch.ones(3)},
        OrderedDict(b=torch.ones(3)),
        Strict(torch.ones(1), None),
    ]
    packed = pack(batch)
    assert packed.buffer.dtype == torch.uint8
    assert len(packed.places) == 1 + len(fields(Targets)) + 3
    first = packed.unpack()
    storages = {tensor.untyped_storage().data_ptr() for tensor in (first[0][0], first[0][1].pseudo_texts)}
    assert storages == {packed.buffer.untyped_storage().data_ptr()}  # by which torch waits for copies to a GPU
    packed.buffer.zero_()
    assert not first[0][0].any()
    assert not first[0][1].image_embedding.any()
    assert not first[1]["a"].any()
    assert_same(first, packed.unpack())


def test_writing_to_one_view_changes_no_other_and_not_the_source() -> None:
    row = torch.arange(3.0)
    source: list[Any] = [row, row, row.expand(2, 3), np.arange(3)]
    views = pack(source).unpack()
    for view in views:
        before = [np.array(v) for v in views]
        view[...] = 7
        for other, old in zip(views, before, strict=True):
            assert other is view or np.array_equal(other, old)
    views = pack(source).unpack()
    views[2][0] = 7
    assert views[2][1].tolist() == row.tolist() == [0, 1, 2]


def test_autograd_does_not_take_a_change_of_one_tensor_for_one_of_another() -> None:
    """Slices of one buffer share a version counter."""
    saved, changed = pack([torch.ones(3), torch.ones(3)]).unpack()
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * saved).sum()
    changed.add_(1)
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert torch.equal(weight.grad, saved)


@pytest.mark.filterwarnings("ignore")  # torch will give up quantized tensors
def test_tensors_that_are_not_plain_come_back_too() -> None:
    packed = pack(
        [
            torch.eye(3).to_sparse(),
            torch.nn.Parameter(torch.ones(2)),
            torch.ones(2, requires_grad=True),
            torch.tensor([1 + 2j]).conj(),
            torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.quint8),
        ]
    )
    sparse, parameter, row, conjugate, quantized = packed.unpack()
    assert torch.equal(sparse.to_dense(), torch.eye(3))
    assert type(parameter) is torch.nn.Parameter
    assert row.tolist() == [1, 1]
    assert conjugate.tolist() == [1 - 2j]
    assert quantized.dequantize().tolist() == [1, 1]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_through_a_worker(start: str) -> None:
    data: Any = [
        (torch.rand(3, 4, 5).to(torch.bfloat16), Targets(*(torch.rand(i, 4) for i in range(len(fields(Targets))))), i)
        for i in range(6)
    ]
    data[4] = HdovdError("bad picture")
    loader: DataLoader[Any] = DataLoader(
        data, 4, collate_fn=pack, num_workers=1, multiprocessing_context=start, timeout=60
    )
    first, second = loader
    assert first.buffer.is_shared()
    assert_same(first.unpack() + second.unpack(), data)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_pinned_through_the_loader() -> None:
    data: Any = [(torch.rand(3, 4), Targets(*(torch.rand(2, 4) for _ in fields(Targets))), i) for i in range(4)]
    (packed,) = DataLoader(data, 4, collate_fn=pack, num_workers=1, pin_memory=True, timeout=60)
    assert packed.buffer.is_pinned()
    batch = packed.unpack()
    assert batch[0][1].pseudo_texts.is_pinned()
    assert_same(batch, data)
