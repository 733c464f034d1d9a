"""The Triton kernels of the relative position bias; see interpreter.py for where they run."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreter import interpreter as interpreter
from interpreter import on_each_device
from torch import Tensor

from kernels.window_attention.reference import expand_bias

pytest.importorskip("triton", reason="needs Triton, which is for Linux: pip install 'triton>=3.6'")
pytestmark = pytest.mark.usefixtures("interpreter")

ROOT = Path(__file__).resolve().parent.parent
LOG2E = math.log2(math.e)
# (window, padded): what Swin has, rectangles, lines, and a single slot
SIZES = [
    ((1, 1), 1),
    ((1, 1), 5),
    ((7, 7), 49),
    ((7, 7), 64),
    ((8, 8), 64),
    ((7, 9), 63),
    ((12, 12), 144),
    ((14, 14), 208),
    ((1, 20), 32),
    ((20, 1), 21),
]
by_size = pytest.mark.parametrize(
    ("window", "padded"), SIZES, ids=lambda value: str(value).strip("()").replace(", ", "x")
)


def integers(*shape: int, device: str) -> Tensor:
    """Whole numbers from -8 to 8 in float32: their sums are exact in any order."""
    return torch.randint(-8, 9, shape, device=device).float()


def rows(window: tuple[int, int]) -> int:
    return (2 * window[0] - 1) * (2 * window[1] - 1)


def exact_gradient(partials: Tensor, window: tuple[int, int], heads: int, multiplier: float) -> Tensor:
    """By autograd through the reference, in the dtype of `partials` [G, h, Np, Np]."""
    slots = window[0] * window[1]
    table = torch.zeros(rows(window), heads, dtype=partials.dtype, device=partials.device, requires_grad=True)
    bias = multiplier * expand_bias(table, window)
    return torch.autograd.grad(bias, table, partials[..., :slots, :slots].sum(0))[0]


# ---- the table expanded


@by_size
@on_each_device
def test_expands_like_the_reference(device: str, window: tuple[int, int], padded: int) -> None:
    """A lookup and one product: equal to the bit."""
    from kernels.window_attention.bias import expand

    slots = window[0] * window[1]
    heads = 3 if slots < 100 else 1
    table = torch.randn(rows(window), heads, device=device)
    bias = expand(table, *window, padded, LOG2E)
    assert bias.shape == (heads, padded, padded) and bias.dtype == torch.float32
    assert torch.equal(bias[:, :slots, :slots], expand_bias(table * LOG2E, window))
    assert (bias[:, :, slots:] == -math.inf).all(), "a padded key has some weight"
    assert (bias[:, slots:, :slots] == 0).all(), "a padded query is not defined"


@on_each_device
def test_takes_any_table(device: str) -> None:
    """Views, many heads."""
    from kernels.window_attention.bias import expand

    wide = torch.randn(90, 140, device=device)
    for some in (wide[:45, 1:36], wide[::2, 35:], wide.t()[::3, 1:36][:45]):
        assert not some.is_contiguous()
        assert torch.equal(expand(some, 3, 5, 15, 1.0), expand_bias(some, (3, 5)))


# ---- the gradient to the table


@by_size
@on_each_device
def test_gradient_is_exact(device: str, window: tuple[int, int], padded: int) -> None:
    """Every pair once and no other, NaN in the padding notwithstanding. Whole numbers leave nothing to rounding."""
    from kernels.window_attention.bias import table_grad

    slots = window[0] * window[1]
    heads, groups = (2, 3) if slots < 100 else (1, 2)
    partials = integers(groups, heads, padded, padded, device=device)
    partials[:, :, slots:], partials[..., slots:] = math.nan, math.nan
    got = table_grad(partials, *window, 0.5)
    assert got.dtype == torch.float32
    assert torch.equal(got.double(), exact_gradient(partials.double(), window, heads, 0.5))


@on_each_device
def test_gradient_error_and_determinism(device: str) -> None:
    """At most 3 x the error of autograd in float32, and the same bits each time."""
    from kernels.window_attention.bias import table_grad

    window, heads = (7, 6), 2
    partials = torch.randn(37, heads, 48, 48, device=device)
    exact = exact_gradient(partials.double(), window, heads, LOG2E)
    plain = exact_gradient(partials, window, heads, LOG2E).double()
    got = table_grad(partials, *window, LOG2E)
    single = exact.float()
    rounding = 2 * (single + 0.3 - 0.3 - single).abs().max()
    assert (got - exact).abs().max() <= 3 * (plain - exact).abs().max() + rounding
    assert torch.equal(got, table_grad(partials.clone(), *window, LOG2E))


@on_each_device
def test_gradient_of_views(device: str) -> None:
    """Partial gradients that are not contiguous, and ones that start at an odd address."""
    from kernels.window_attention.bias import table_grad

    whole = integers(2, 3, 17, 17, device=device)
    odd = whole.flatten()[1 : 1 + 2 * 2 * 16 * 16].view(2, 2, 16, 16)
    assert odd.data_ptr() % 16
    for partials in (whole[:, ::2, 1:, :16], whole.transpose(2, 3), odd):
        got = table_grad(partials, 4, 4, 1.0)
        assert torch.equal(got, exact_gradient(partials, (4, 4), partials.shape[1], 1.0))


def test_importing_needs_no_triton() -> None:
    code = "import sys, kernels.aot, kernels.window_attention.triton_ops; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
