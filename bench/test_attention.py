"""Window attention: what each backend computes is checked, then forward and forward + backward are timed.

Shapes are stages of the Aurora encoder. A time without a right result is worth nothing, so one file has both.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from kernels import window_attention

BACKENDS = ("reference", "eager", "sdpa")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """One call: a map of height x width, as one stage of one model size sees it."""

    name: str
    batch: int
    height: int
    width: int
    heads: int
    head_dim: int
    window: int
    shift: int

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """qkv [B, H, W, 3, heads, head_dim] and the bias table [(2 window - 1)^2, heads], the same at every
        call.
        """
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.height, self.width, 3, self.heads, self.head_dim)
        qkv = torch.randn(shape, generator=generator)
        bias = torch.randn((2 * self.window - 1) ** 2, self.heads, generator=generator)
        return qkv.to(DEVICE, dtype), bias.to(DEVICE, dtype)


CASES = (
    Case("tiny-64px-stage1", 16, 16, 16, 1, 32, 8, 4),
    Case("small-224px-stage1", 1, 56, 56, 2, 64, 7, 3),
    Case("base-224px-stage3", 4, 14, 14, 12, 64, 14, 0),
    Case("odd-map-29x23", 1, 29, 23, 4, 32, 7, 3),
)
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_backend = pytest.mark.parametrize("backend", BACKENDS)


def attend(case: Case, qkv: Tensor, bias: Tensor, backend: str) -> Tensor:
    """The call under test; waits for the device, so that a clock around it means something."""
    out = window_attention(qkv, bias, window=case.window, shift=case.shift, backend=backend)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return out


@by_backend
@by_case
def test_numerics(case: Case, backend: str) -> None:
    """Error against the reference in fp64: at most twice that of the reference in fp32, plus rounding."""
    qkv, bias = case.inputs(torch.float64)
    exact = attend(case, qkv, bias, "reference")
    qkv, bias = qkv.float(), bias.float()
    plain = (attend(case, qkv, bias, "reference").double() - exact).abs().max()
    error = (attend(case, qkv, bias, backend).double() - exact).abs().max()
    single = exact.float()
    rounding = 2 * (single + 0.3 - 0.3 - single).abs().max()
    assert error <= 2 * plain + rounding, (
        f"{backend}: error {error:.2e}, the reference's in fp32 is {plain:.2e}"
    )


@by_backend
@by_case
def bench_forward(benchmark: BenchmarkFixture, case: Case, backend: str) -> None:
    qkv, bias = case.inputs()
    benchmark.group = f"forward {case.name}"
    benchmark.pedantic(attend, (case, qkv, bias, backend), rounds=7, warmup_rounds=2)


@by_backend
@by_case
def bench_forward_backward(benchmark: BenchmarkFixture, case: Case, backend: str) -> None:
    qkv, bias = (tensor.requires_grad_() for tensor in case.inputs())
    benchmark.group = f"forward + backward {case.name}"

    def step() -> None:
        qkv.grad = bias.grad = None
        attend(case, qkv, bias, backend).sum().backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=7, warmup_rounds=2)
