"""Norms, gates and rotary positions: Liger-Kernel's kernels on CUDA devices, torch elsewhere. Nothing is written anew here.

Compiled code always takes torch's, which the compiler fuses by itself. Liger's gradients are computed in place of what they
are made from; here that is memory of our own, except for the gates (see `swiglu`). Not yet run on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import BackendError
from kernels.once import once_differentiable

HAS_LIGER = find_spec("liger_kernel") is not None  # asked once, as for Triton
HALF_OR_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
NAMES = ("torch", "liger")


def choose(x: Tensor, backend: str = "auto") -> tuple[str, str]:
    """Which of the two runs for x, and why. Raises ValueError for an unknown name, BackendError where Liger was asked for
    by name and cannot run."""
    why = refusal(x)
    if backend == "auto":
        return ("torch", why) if why or not x.is_cuda else ("liger", "Liger-Kernel is installed")
    if backend not in NAMES:
        raise ValueError(f"kernels.fused: unknown backend {backend!r}; supported: 'auto', 'torch', 'liger'")
    if backend == "liger" and why:
        raise BackendError(f"kernels.fused: backend 'liger' cannot run this call: {why}. This can: torch")
    return backend, "asked for by name"


def refusal(x: Tensor) -> str:
    """Why Liger cannot run for x; empty where it can. Liger is not imported."""
    if not HAS_LIGER:
        return "it needs Liger-Kernel: pip install 'auroraio[liger]'"
    if x.dtype not in HALF_OR_SINGLE:
        return f"it computes float16, bfloat16 and float32, got {x.dtype}"
    if not x.is_cuda and not (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"it runs on CUDA devices, got {x.device}"
    if torch.compiler.is_compiling():
        return "compiled code has torch's, which the compiler fuses"
    return "" if x.numel() else "there is nothing to compute"


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467), x [..., D], weight [D]. Computed in
    float32; the result has x's dtype (torch's on GPUs that of x and weight together)."""
    if choose(x, backend)[0] == "torch":
        if (
            x.device.type == "cpu" and x.dtype != weight.dtype
        ):  # the same numbers, without torch's warning of a slow path
            wide = torch.promote_types(x.dtype, weight.dtype)
            return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, eps)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    out: Tensor = LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)
    return out


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up (arXiv:2002.05202), both [..., D].

    Liger's gradients overwrite gate and up (unless the graph is kept): no other operation may have kept these two for its
    own gradient. The outputs of linear layers are safe.
    """
    if choose(gate, backend)[0] == "torch":
        return F.silu(gate) * up
    from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward

    return _gated(gate, up, swiglu_forward, swiglu_backward)


def geglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """gelu(gate) * up (arXiv:2002.05202) with the tanh form of GELU, both [..., D]; as for `swiglu`."""
    if choose(gate, backend)[0] == "torch":
        return F.gelu(gate, approximate="tanh") * up
    from liger_kernel.ops.geglu import geglu_backward, geglu_forward

    return _gated(gate, up, geglu_forward, geglu_backward)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """q, k [B, N, h, d] turned by the angles of their positions (RoFormer, arXiv:2104.09864), cos, sin [N, d/2]; the
    halves of d form the pairs."""
    if choose(q, backend)[0] == "torch":
        return _turn(q, cos, sin), _turn(k, cos, sin)
    out: tuple[Tensor, Tensor] = _Rotary.apply(q, k, cos, sin)
    return out


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (part[:, None].to(x.dtype) for part in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _gated(gate: Tensor, up: Tensor, forward: Callable[..., Any], backward: Callable[..., Any]) -> Tensor:
    out: Tensor = _Gated.apply(gate, up, forward, backward)
    return out


class _Gated(torch.autograd.Function):
    """A gate of Liger's, whose backward overwrites its two inputs."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, forward: Callable[..., Any], backward: Callable[..., Any]
    ) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.gradients = backward
        out: Tensor = forward(gate, up)[2]
        return out

    @staticmethod
    @once_differentiable("kernels.fused")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate, up = ctx.saved_tensors
        if torch._C._autograd._get_current_graph_task_keep_graph():
            gate, up = gate.clone(), up.clone()
        return (*ctx.gradients(gate, up, grad.contiguous()), None, None)


class _Rotary(torch.autograd.Function):
    """Liger's rotary positions, which turn q and k (backward: their gradients) where they lie: here, copies."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.rope import rope_forward

        cos, sin = (torch.cat((part, part), dim=-1) for part in (cos, sin))
        ctx.save_for_backward(cos, sin)
        q, k = (x.clone(memory_format=torch.contiguous_format).transpose(1, 2) for x in (q, k))
        turned = rope_forward(q, k, cos, sin)[:2]
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2)

    @staticmethod
    @once_differentiable("kernels.fused")
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        from liger_kernel.ops.rope import rope_backward

        d_q, d_k = (x.clone(memory_format=torch.contiguous_format).transpose(1, 2) for x in (d_q, d_k))
        turned = rope_backward(d_q, d_k, *ctx.saved_tensors)
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2), None, None
