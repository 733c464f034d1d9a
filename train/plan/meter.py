"""What a step on the meta device would compute and hold: FLOPs, bytes alive, bytes moved. Nothing is allocated.

Floating-point tensors are on the meta device, which knows shapes and no values. Integers and masks are real, so that code
whose shapes depend on them (which tokens have a target, which sample a piece belongs to) runs as it does in training.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

PHASES = ("forward", "recompute", "backward")


@dataclass
class Counts:
    """FLOPs (a multiply-add is two) and bytes read and written, by phase; seconds that a machine would need at least."""

    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    bytes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    seconds: float = 0.0
    launches: int = 0


class Meter(TorchDispatchMode):
    """Counts what is dispatched while it is on.

    flop_rate, byte_rate: of the machine, per second; `counts.seconds` is the sum over operations of the longer of both
    times (0 where no rate is given).
    """

    def __init__(self, flop_rate: float = 0.0, byte_rate: float = 0.0) -> None:
        super().__init__()
        self.counts = Counts()
        self.flop_rate, self.byte_rate = flop_rate, byte_rate
        self.alive = self.peak = 0  # activations: neither weights nor gradients of weights
        self.gradients = self.peak_with_gradients = 0
        self.logits = 0  # bytes of the largest chunk of logits, which lives for a moment
        self._sizes: dict[int, int] = {}
        self._gradient_keys: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors(args) + _tensors(kwargs) if kwargs else _tensors(args)
        if not tensors:
            kwargs = _real_integers(func, args, kwargs)
        on_meta = [x for x in tensors if x.is_meta]
        if len(on_meta) not in (0, len(tensors)) and func._overloadpacket not in COPIES:
            args, kwargs = _moved(_indices(func, args)), _moved(kwargs)
            on_meta = _tensors(args) + _tensors(kwargs)
        view, fresh, in_place = _character(func)
        if not on_meta or view:
            out = func(*args, **kwargs)
            for x in () if view else _tensors(out):
                if x.is_meta:
                    self.hold(x)
            return out
        out = args[0] if in_place else _run(func, args, kwargs) if fresh else func(*args, **kwargs)
        made = _tensors(out)
        for x in made:
            if x.is_meta:
                self.hold(x)
        formula = flop_registry.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        self.count(flops, _bytes(on_meta) + _bytes(made))
        return out

    def hold(self, x: Tensor) -> None:
        """Count the memory of x for as long as it lives."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = self._sizes[key] = storage.nbytes()
        self.alive += size
        weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.alive)
        self.peak_with_gradients = max(self.peak_with_gradients, self.alive + self.gradients)

    def _free(self, key: int) -> None:
        size = self._sizes.pop(key, 0)
        if key in self._gradient_keys:
            self._gradient_keys.discard(key)
            self.gradients -= size
        else:
            self.alive -= size

    def is_gradient(self, parameter: Tensor) -> None:
        """From now on a parameter's gradient is no activation."""
        if parameter.grad is None:
            return
        key = parameter.grad.untyped_storage()._cdata
        if key not in self._gradient_keys and key in self._sizes:
            self._gradient_keys.add(key)
            self.alive -= self._sizes[key]
            self.gradients += self._sizes[key]

    def count(self, flops: float, moved: float, phase: str = "") -> None:
        """Add one operation, to the phase that runs."""
        phase = phase or self.phase()
        self.counts.flops[phase] += flops
        self.counts.bytes[phase] += moved
        self.counts.launches += 1
        if self.flop_rate and self.byte_rate:
            self.counts.seconds += max(flops / self.flop_rate, moved / self.byte_rate)

    @staticmethod
    def phase() -> str:
        """Gradients are off in a backward pass, but for what checkpointing runs again in it."""
        return "backward" if in_backward() and not torch.is_grad_enabled() else forward_phase()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Tell gradients of weights from activations while this is on."""
        handles = [
            p.register_post_accumulate_grad_hook(self.is_gradient)
            for p in model.parameters()
            if p.requires_grad
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def in_backward() -> bool:
    """Whether autograd is running."""
    return torch._C._current_graph_task_id() != -1


def forward_phase() -> str:
    """The phase of what belongs to a forward pass, where gradients may be off (inside of an autograd function)."""
    return "recompute" if in_backward() else "forward"


def _bytes(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


Made = tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]

# What an operation makes of such arguments; shapes alone, so it holds for good. Torch's own answer takes a millisecond.
_SHAPES: dict[Any, tuple[bool, Made]] = {}


def _run(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """func(*args, **kwargs), by its result of the last time where that is known."""
    key = (func, _signature(args), _signature(kwargs) if kwargs else None)
    known = _SHAPES.get(key)
    if known is not None:
        one, shapes = known
        new = [
            torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in shapes
        ]
        return new[0] if one else tuple(new)
    out = func(*args, **kwargs)
    made = [out] if isinstance(out, Tensor) else out
    if isinstance(made, list | tuple) and all(isinstance(x, Tensor) and x.is_meta for x in made):
        shapes = tuple((tuple(x.shape), x.stride(), x.dtype) for x in made)
        _SHAPES[key] = (isinstance(out, Tensor), shapes)
    return out


@cache
def _character(func: Any) -> tuple[bool, bool, bool]:
    """Whether the result is a view of an argument; whether it is all new and no argument changes; whether it is the first
    argument, changed."""
    schema = func._schema
    returns = [r.alias_info for r in schema.returns]
    changed = [x.alias_info is not None for x in schema.arguments]
    view = any(alias is not None and not alias.is_write for alias in returns)
    fresh = not any(changed) and not any(alias is not None for alias in returns)
    name = func._overloadpacket.__name__
    in_place = (
        name.endswith("_")
        and name not in RESHAPING
        and len(returns) == 1
        and sum(changed) == 1
        and changed[0]
    )
    return view, fresh, in_place


RESHAPING = (
    "resize_",
    "set_",
    "resize_as_",
    "t_",
    "transpose_",
    "unsqueeze_",
    "squeeze_",
    "as_strided_",
    "detach_",
)


def _signature(x: Any) -> Any:
    """What the shape of a result depends on."""
    kind = type(x)
    if kind is Tensor or kind is nn.Parameter:
        return x.shape, x.stride(), x.dtype
    if kind is tuple or kind is list:
        return kind is list, tuple(map(_signature, x))
    if kind is dict:
        return tuple((name, _signature(value)) for name, value in x.items())
    return kind, x


def _tensors(x: Any) -> list[Tensor]:
    """Those in nested tuples, lists and dicts."""
    if isinstance(x, Tensor):
        return [x]
    found: list[Tensor] = []
    if type(x) is tuple or type(x) is list:
        for part in x:
            if isinstance(part, Tensor):
                found.append(part)
            elif type(part) is tuple or type(part) is list:
                found += _tensors(part)
    elif type(x) is dict:
        return _tensors(list(x.values()))
    return found


def _real_integers(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a function that makes a tensor on the meta device: integers and masks are made real instead."""
    if func._overloadpacket not in FACTORIES or kwargs.get("device") != META:
        return kwargs
    dtype = kwargs.get("dtype")
    if dtype is None and func._overloadpacket in (aten.full, aten.arange):
        numbers = args[1:] if func._overloadpacket is aten.full else args
        dtype = torch.int64 if all(isinstance(x, int) for x in numbers) else torch.float32
    return kwargs if dtype is None or dtype.is_floating_point else {**kwargs, "device": torch.device("cpu")}


META = torch.device("meta")
aten = torch.ops.aten
FACTORIES = (aten.full, aten.arange, aten.zeros, aten.ones, aten.empty)
COPIES = (aten._to_copy, aten.copy_)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


def _indices(func: Any, args: Any) -> Any:
    """Masks that index become numbers, as long as somebody knows how many they are."""
    return (args[0], _numbers(args[1]), *args[2:]) if func._overloadpacket in INDEXING else args


def _moved(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x if x.is_meta else torch.empty_like(x, device="meta")
    if isinstance(x, tuple | list):
        return type(x)(map(_moved, x))
    if isinstance(x, dict):
        return {name: _moved(value) for name, value in x.items()}
    return x


def _numbers(indices: Any) -> list[Any]:
    found: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) and not index.is_meta:
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found
