"""Calls of latent attention, and the rule that a backend's results are held to, shared by the tests of the backends for GPUs.

The rule is the benchmark's (bench/numerics.py): against the reference in float64, an output may be off by twice what
plain PyTorch is in the same dtype, a gradient by three times that.
"""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import torch
from interpreter import is_rounding
from torch import Tensor

from bench.numerics import FEW, RELATIVE, judge
from kernels import latent_attention
from kernels.latent_attention import reference

HALF, SINGLE = torch.float16, torch.float32


def some(
    queries: int,
    keys: int,
    heads: int = 1,
    kv_heads: int = 1,
    dqk: int = 16,
    dv: int = 16,
    *,
    batch: int = 1,
    lengths: tuple[int, ...] = (),
    offsets: tuple[int, ...] = (),
    masked: bool = False,
    dropout_p: float = 0.0,
    dtype: torch.dtype = SINGLE,
    device: str = "cpu",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors with a gradient, and the rest of one call."""
    batch = len(lengths) or len(offsets) - 1 if lengths or offsets else batch
    rows = (keys,) if offsets else (batch, keys)
    tensors = {
        "q": torch.randn(batch, queries, heads, dqk),
        "k": torch.randn(*rows, kv_heads, dqk),
        "v": torch.randn(*rows, kv_heads, dv),
    }
    # Not the default scale: a forgotten one would show.
    more: dict[str, Any] = {"scale": 0.7 / math.sqrt(dqk), "dropout_p": dropout_p}
    if lengths:
        more["key_lengths"] = torch.tensor(lengths, device=device)
    if offsets:
        more["cu_seqlens_k"] = torch.tensor(offsets, dtype=torch.int32, device=device)
    if masked:
        more["key_mask"] = (torch.rand(batch, keys) > 0.4).to(device)
    if dropout_p:
        more["seed"] = 1234567890123
    return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}, more


def run(tensors: dict[str, Tensor], more: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """Output, log-sum-exp, and gradients through both."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    out, lse = latent_attention(**leaves, **more, return_lse=True, backend=backend)
    generator = torch.Generator().manual_seed(7)
    grads = (torch.randn(t.shape, generator=generator).to(t) for t in (out, lse))
    # A row that sees nothing has the lse -inf, which is no number to differentiate.
    seen = torch.where(lse == float("-inf"), 0.0, lse)
    found = torch.autograd.grad((out, seen), list(leaves.values()), tuple(grads))
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(leaves, found, strict=True))


def check(tensors: dict[str, Tensor], more: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """Hold the backend to the rule; its results."""
    dtype = tensors["q"].dtype
    mine = run(tensors, more, backend)
    exact = run({name: tensor.double() for name, tensor in tensors.items()}, more, "reference")
    with mock.patch.object(reference, "compute_dtype", lambda tensor: tensor.dtype):  # half types stay half
        plain = run(tensors, more, "reference")
    nothing = exact["lse"] == float("-inf")
    for results in (mine, exact, plain):
        assert torch.equal(results["lse"] == float("-inf"), nothing)
        results["lse"] = (
            results["lse"].masked_fill(nothing, 0).to(torch.float64 if results is exact else SINGLE)
        )
    bad = []
    for verdict in judge(mine, [plain], exact, dtype):
        few = (
            exact[verdict.name].numel() < FEW and verdict.relative <= 1.5 * RELATIVE[dtype]
        )  # the rest is luck
        if not (verdict.good or few or is_rounding(verdict.relative, tensors["q"])):
            bad.append(str(verdict))
    assert not bad, "\n".join(bad)
    return mine
