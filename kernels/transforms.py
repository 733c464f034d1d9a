"""What is no tensor, torch.func's transforms, and forward-mode derivatives: refused at the entrance of each public function."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_gradtrackingtensor,
    peek_interpreter_stack,
)
from torch.autograd import forward_ad


def require_tensors(function: str, optional: tuple[str, ...] = (), **given: object) -> None:
    """Raise TypeError for an argument that is no tensor; those in `optional` may be None."""
    for name, value in given.items():
        if not isinstance(value, Tensor) and (value is not None or name not in optional):
            raise TypeError(f"{function}: {name} must be a torch.Tensor, got {type(value).__name__}")


def refuse_transforms(function: str, backend: str, *tensors: Tensor | None) -> None:
    """Raise for tensors of a transform that the backends do not know: without this, torch's errors are obscure, or a
    tangent is silently lost. Only "reference" can be differentiated by torch.func and in forward mode."""
    if torch.compiler.is_compiling() or (peek_interpreter_stack() is None and forward_ad._current_level < 0):
        return  # nobody transforms anything, so each tensor need not be asked
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            continue
        if backend != "reference" and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{function}: forward-mode derivatives are supported by backend 'reference' only, got {backend!r}"
            )
        while is_functorch_wrapped_tensor(tensor):
            if is_batchedtensor(tensor):
                raise NotImplementedError(
                    f"{function}: torch.func.vmap is not supported. Every tensor has a batch dimension of its own: fold "
                    "the mapped dimension into it"
                )
            if backend != "reference" and is_gradtrackingtensor(tensor):
                raise NotImplementedError(
                    f"{function}: torch.func's derivatives are supported by backend 'reference' only, got {backend!r}: "
                    "use torch.autograd"
                )
            tensor = get_unwrapped(tensor)
