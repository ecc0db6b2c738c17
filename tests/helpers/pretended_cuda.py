"""A GPU that is not there: tensors say that they are on cuda:0, and are computed on the CPU.

It shows, on any machine, what only a GPU would: operations that mix tensors of both devices, and each time that the
host waits for the device, by line. It knows nothing of speed, nor of the kernels of a GPU and their rounding.

    with PretendedCuda() as cuda:
        model.to("cuda")
        sum(model([picture.to("cuda")], [targets.to("cuda")], texts.to("cuda")).values()).backward()
    cuda.mixed, cuda.waits, cuda.uploads, cuda.on_host

`pytest tests/hdovd/test_waits.py -s` prints the waits of a training step of both detectors.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from unittest.mock import patch
from weakref import WeakSet

import torch
import torchvision  # noqa: F401  # its operators
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Operations that hand over a number, or a tensor whose size depends on the data: the host waits for what the device has
# still to do. torchvision's NMS copied its table to the host in earlier versions, and its result has a size of its own
# in all.
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.nonzero_numpy.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten._unique.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
    aten.histc.default,
    aten._linalg_check_errors.default,
    aten.is_nonzero.default,
    torch.ops.torchvision.nms.default,
}
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}  # indices may be the host's
FREE = {
    aten.detach.default,
    aten.alias.default,
    aten._pin_memory.default,
    aten.is_pinned.default,
}  # no computation anywhere
ROOT = Path(__file__).parents[2]  # in which a virtual environment may lie, and which may have any name
OURS = (
    *(f"{ROOT}/{folder}/" for folder in ("hdovd", "pipelines", "cache", "cli")),
    "/torchvision/",
    "/torch/optim/",
    "/torch/nn/utils/",
)
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class OnCuda(torch.Tensor):
    """A tensor of the CPU, `held`, that calls itself cuda:0."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnCuda:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=CUDA,
            requires_grad=False,
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCuda({self.held!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().held.__reduce_ex__(protocol)  # torch.save reads a GPU's memory too

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: OnCuda) -> None:
        torch.Tensor.data.__set__(self, value)
        self.held = value.held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Outside of the mode's thread: the pools of a stage have threads of their own."""
        if PretendedCuda.current is None:
            raise RuntimeError(f"{func}: a pretended tensor outlives its device")
        return PretendedCuda.current.compute(func, args, kwargs)


class PretendedCuda(TorchDispatchMode):
    """`mixed`: operations that a GPU would refuse. `waits`, `uploads`: how often the host waited, or a copy to the
    device, by operation and line. `on_host`: what was computed on the CPU with tensors of floating-point numbers.
    """

    current: PretendedCuda | None = None

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # factories with device="cuda" then ask for no driver
        self.mixed: list[str] = []
        self.waits: Counter[tuple[str, str]] = Counter()
        self.uploads: Counter[tuple[str, str]] = Counter()
        self.on_host: Counter[tuple[str, str]] = Counter()
        self._pinned: WeakSet[torch.UntypedStorage] = WeakSet()
        self._patches = ExitStack()
        self._submitted = ThreadPoolExecutor.submit

    def __enter__(self) -> Self:
        torch._C._ensureCUDADeviceGuardSet()
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        self._patches.enter_context(torch.backends.cudnn.flags(enabled=False))
        for place, value in self._stand_ins().items():
            self._patches.enter_context(patch(place, value))
        PretendedCuda.current = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        PretendedCuda.current = None
        self._patches.close()
        torch._C._set_only_lift_cpu_tensors(self._lifted)

    def forget(self) -> None:
        """What was noted so far."""
        self.mixed.clear()
        for noted in (self.waits, self.uploads, self.on_host):
            noted.clear()

    def _stand_ins(self) -> dict[str, Any]:
        """What a driver would answer."""
        free = 64 * 2**30
        answers: dict[str, Any] = {
            "is_available": True,
            "is_initialized": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_name": "Pretended GPU",
            "is_bf16_supported": True,
            "get_device_capability": (9, 0),
            "max_memory_allocated": 0,
            "memory_allocated": 0,
            "mem_get_info": (free, free),
            "synchronize": None,
            "set_device": None,
            "empty_cache": None,
            "reset_peak_memory_stats": None,
            "set_rng_state": None,
            "manual_seed_all": None,
            "get_device_properties": SimpleNamespace(total_memory=free),
        }
        found: dict[str, Any] = {f"torch.cuda.{name}": _answering(value) for name, value in answers.items()}
        found["torch.cuda.synchronize"] = lambda *_: self.waits.update([("synchronize", _where())])
        found["torch.cuda.get_rng_state"] = lambda *_: torch.zeros(16, dtype=torch.uint8)
        found["torch.Generator"] = _Generator
        found["torch.Tensor.pin_memory"] = lambda tensor, *_: self._pin(tensor)
        found["torch.Tensor.is_pinned"] = lambda tensor, *_: self._is_pinned(tensor)
        whole, as_list = torch.Tensor.backward, torch.Tensor.tolist
        found["torch.Tensor.tolist"] = lambda tensor: as_list(tensor.cpu())  # refused to subclasses
        found["torch.Tensor.backward"] = lambda root, *rest, **more: (_backward if isinstance(root, OnCuda) else whole)(
            root, *rest, **more
        )
        for name in ("untyped_storage", "data_ptr"):  # safetensors reads a GPU's memory too
            found[f"torch.Tensor.{name}"] = _of_held(getattr(torch.Tensor, name))
        found["concurrent.futures.ThreadPoolExecutor.submit"] = lambda pool, *work: self._submit(pool, *work)
        found["torch.accelerator.is_available"] = _answering(True)
        found["torch._C._InferenceMode"] = lambda mode: (
            torch.no_grad() if mode else nullcontext()
        )  # wrappers want a version counter
        found["torch._has_compatible_shallow_copy_type"] = _answering(False)  # Module.to then makes new parameters
        return found

    def _submit(self, pool: Any, function: Callable[..., Any], *args: Any) -> Any:
        def run() -> Any:
            torch._C._set_only_lift_cpu_tensors(True)  # of this thread
            with _OfThread(self):
                return function(*args)

        return self._submitted(pool, run)

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        self._pinned.add(copy.untyped_storage())
        return copy

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, OnCuda) and tensor.untyped_storage() in self._pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.compute(func, args, kwargs)

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Of the held tensors; what it shows is noted."""
        kwargs = dict(kwargs or {})
        tensors = [*_tensors((*args, *kwargs.values()))]
        ours = any(isinstance(x, OnCuda) for x in tensors)
        asked = kwargs.get("device")
        wanted = None if asked is None else torch.device(asked).type
        self._note(func, args, kwargs, tensors, ours, wanted)
        if wanted is not None:
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        out = func(*_changed(args, _held), **{name: _changed(value, _held) for name, value in kwargs.items()})
        if (wanted != "cuda") if wanted is not None else not ours:
            return out
        same = {id(x.held): x for x in tensors if isinstance(x, OnCuda)}  # in place: the same wrapper comes back
        return _changed(out, lambda x: same[id(x)] if id(x) in same else OnCuda(x))

    def _note(
        self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], ours: bool, wanted: str | None
    ) -> None:
        if func in COPIES:
            self._note_copy(func, args, kwargs, wanted)
        elif not ours:
            if (
                func not in FREE
                and wanted != "cuda"
                and not func.is_view
                and any(x.numel() and x.is_floating_point() for x in tensors)
            ):
                self.on_host[str(func), _where()] += 1
        elif func in INDEXING:
            self._note_indexing(func, args)
        else:
            if any(not isinstance(x, OnCuda) and x.ndim for x in tensors):
                self.mixed.append(f"{func} {[(type(x).__name__, tuple(x.shape)) for x in tensors]} at {_where()}")
            if func in WAITS and kwargs.get("output_size") is None:
                self.waits[str(func), _where()] += 1
            if func is aten.where.self and not all(
                isinstance(x, OnCuda) for x in tensors
            ):  # a number as a tensor is copied first
                self.uploads[str(func), _where()] += 1

    def _note_copy(self, func: Any, args: Any, kwargs: Any, wanted: str | None) -> None:
        if func is aten.copy_.default:
            to, source, free = isinstance(args[0], OnCuda), args[1], len(args) > 2 and args[2]
        else:
            to, source, free = (
                isinstance(args[0], OnCuda) if wanted is None else wanted == "cuda",
                args[0],
                kwargs.get("non_blocking"),
            )
        if to and not isinstance(source, OnCuda):
            if not free:  # then the host waits, too, until what the device has still to do is done
                self.uploads[str(func), _where()] += 1
        elif not to and isinstance(source, OnCuda):  # nothing is read before it is there
            self.waits[str(func), _where()] += 1

    def _note_indexing(self, func: Any, args: Any) -> None:
        """A mask is looked through for its rows first; only one that takes a single number is not."""
        rows = [x for x in args[1] if x is not None]
        others = [] if func is aten.index.Tensor else [args[2]]
        if not isinstance(args[0], OnCuda) or any(not isinstance(x, OnCuda) and x.ndim for x in others):
            self.mixed.append(f"{func} of {type(args[0]).__name__} at {_where()}")
        masks = [x for x in rows if x.dtype in (torch.bool, torch.uint8)]
        fills = (
            func is not aten.index.Tensor
            and len(rows) == 1
            and args[2].numel() == 1
            and not (len(args) > 3 and args[3])
        )
        if not fills:
            self.waits[str(func), _where()] += sum(isinstance(x, OnCuda) for x in masks)
        self.uploads[str(func), _where()] += sum(not isinstance(x, OnCuda) for x in rows)
        self.waits += Counter()  # without zeros
        self.uploads += Counter()


@torch.no_grad()
def _backward(root: torch.Tensor) -> None:
    """The engine of autograd, which would ask the driver for its contexts: nodes in an order in which all that a node
    needs is there.
    """
    missing: Counter[Any] = Counter()
    seen, found = {root.grad_fn}, [root.grad_fn]
    for node in found:
        for after, _ in node.next_functions:
            missing[after] += 1
            if after is not None and after not in seen:
                seen.add(after)
                found.append(after)
    gradients: dict[Any, dict[int, torch.Tensor]] = {root.grad_fn: {0: torch.ones_like(root)}}
    ready = [root.grad_fn]
    while ready:
        node = ready.pop()
        for (after, place), gradient in zip(node.next_functions, _through(node, gradients.pop(node, {})), strict=True):
            missing[after] -= 1
            if after is not None and gradient is not None:
                wanted, sums = after._input_metadata[place], gradients.setdefault(after, {})
                gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
                sums[place] = sums[place] + gradient if place in sums else gradient
            if after is not None and not missing[after]:
                ready.append(after)


def _through(node: Any, gradients: dict[int, torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """The gradients of a node's inputs from those of its outputs."""
    if not gradients:
        return (None,) * len(node.next_functions)
    if node.name() == "torch::autograd::AccumulateGrad":
        held = node.variable.grad
        node.variable.grad = gradients[0] if held is None else held + gradients[0]
        return ()
    apply = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
    found = apply(*(gradients.get(place) for place in range(len(node._input_metadata))))
    found = found if isinstance(found, tuple) else (found,)
    return found[: len(node.next_functions)]  # torchvision names its numbers too


class _OfThread(TorchDispatchMode):
    """The pretended device in one more thread."""

    def __init__(self, cuda: PretendedCuda) -> None:
        super().__init__()
        self.cuda, self._mode_key = cuda, cuda._mode_key

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.cuda.compute(func, args, kwargs)


class _Generator(torch.Generator):
    """Numbers of the CPU's, whatever the device."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, device="cpu")


def _answering(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _of_held(ask: Callable[..., Any]) -> Callable[..., Any]:
    return lambda tensor: ask(_held(tensor))


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnCuda) else x


def _tensors(x: Any) -> Iterator[torch.Tensor]:
    """Those in lists and tuples: torch's trees know more, and are ten times as slow."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for one in x:
            yield from _tensors(one)


def _changed(x: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """With each of its tensors changed."""
    if isinstance(x, torch.Tensor):
        return change(x)
    return type(x)([_changed(one, change) for one in x]) if isinstance(x, list | tuple) else x


@cache
def _is_ours(filename: str) -> bool:
    return any(part in filename for part in OURS) and "pretended_cuda" not in filename


def _where() -> str:
    """The innermost line of ours. Called at every operation: no list of all frames."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if _is_ours(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno} {frame.f_code.co_qualname}"
    return "?"
