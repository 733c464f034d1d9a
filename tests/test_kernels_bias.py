"""The Triton kernels of the relative position bias; see interpreter.py for where they run."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreter import interpreter as interpreter
from interpreter import on_each_device
from torch import Tensor

from kernels.backend import BackendError
from kernels.window_attention.bias import DTYPES, bias_table_grad, expand_bias_table
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
    """A lookup, one product, one rounding: equal to the bit."""
    for dtype in DTYPES if padded == 64 else DTYPES[:1]:
        check_expansion(device, window, padded, dtype)


def check_expansion(device: str, window: tuple[int, int], padded: int, dtype: torch.dtype) -> None:
    slots = window[0] * window[1]
    heads = 3 if slots < 100 else 1
    table = torch.randn(rows(window), heads, device=device)
    bias = expand_bias_table(table, window, padded=padded, multiplier=LOG2E, dtype=dtype)
    assert bias.shape == (heads, padded, padded) and bias.dtype == dtype
    want = expand_bias(table * LOG2E, window)
    got = bias[:, :slots, :slots]
    if dtype == torch.bfloat16 and device == "cpu":
        torch.testing.assert_close(got, want.to(dtype), rtol=2**-7, atol=0)
    else:
        assert torch.equal(got, want.to(dtype))
    assert (bias[:, :, slots:] == -math.inf).all(), "a padded key has some weight"
    assert (bias[:, slots:, :slots] == 0).all(), "a padded query is not defined"


@on_each_device
def test_takes_any_table(device: str) -> None:
    """Half types, views, many heads; padding and multiplier left out."""
    wide = torch.randn(90, 140, device=device)
    for some in (wide.half()[:45, 1:36], wide[::2, 35:], wide.t()[::3, 1:36][:45]):
        assert not some.is_contiguous()
        assert torch.equal(expand_bias_table(some, (3, 5)), expand_bias(some.float(), (3, 5)))


# ---- the gradient to the table


@by_size
@on_each_device
def test_gradient_is_exact(device: str, window: tuple[int, int], padded: int) -> None:
    """Every pair once and no other, NaN in the padding notwithstanding. Whole numbers leave nothing to rounding."""
    slots = window[0] * window[1]
    heads, groups = (2, 3) if slots < 100 else (1, 2)
    partials = integers(groups, heads, padded, padded, device=device)
    partials[:, :, slots:], partials[..., slots:] = math.nan, math.nan
    got = bias_table_grad(partials, window, multiplier=0.5)
    assert got.dtype == torch.float32
    assert torch.equal(got.double(), exact_gradient(partials.double(), window, heads, 0.5))


@on_each_device
def test_gradient_error_and_determinism(device: str) -> None:
    """At most 3 x the error of autograd in float32, and the same bits each time."""
    window, heads = (7, 6), 2
    partials = torch.randn(37, heads, 48, 48, device=device)
    exact = exact_gradient(partials.double(), window, heads, LOG2E)
    plain = exact_gradient(partials, window, heads, LOG2E).double()
    got = bias_table_grad(partials, window, multiplier=LOG2E)
    single = exact.float()
    rounding = 2 * (single + 0.3 - 0.3 - single).abs().max()
    assert (got - exact).abs().max() <= 3 * (plain - exact).abs().max() + rounding
    assert torch.equal(got, bias_table_grad(partials.clone(), window, multiplier=LOG2E))


@on_each_device
def test_gradient_of_views(device: str) -> None:
    """Partial gradients that are not contiguous, and ones that start at an odd address."""
    whole = integers(2, 3, 17, 17, device=device)
    odd = whole.flatten()[1 : 1 + 2 * 2 * 16 * 16].view(2, 2, 16, 16)
    assert odd.data_ptr() % 16
    for partials in (whole[:, ::2, 1:, :16], whole.transpose(2, 3), odd):
        got = bias_table_grad(partials, (4, 4))
        assert torch.equal(got, exact_gradient(partials, (4, 4), partials.shape[1], 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@on_each_device
def test_autograd(device: str, dtype: torch.dtype) -> None:
    """Through a softmax over padded keys, into a table of the result's dtype; the padding's share is none."""
    window, slots, padded = (3, 4), 12, 16
    table = torch.randn(rows(window), 2, device=device).to(dtype).requires_grad_()
    values = torch.randn(2, padded, 5, device=device)

    def attend(bias: Tensor) -> Tensor:
        keys = bias.shape[-1]
        return (torch.softmax(bias.double(), -1) @ values[:, :keys].double())[:, :slots].square().sum()

    (got,) = torch.autograd.grad(
        attend(expand_bias_table(table, window, padded=padded, multiplier=1.5, dtype=dtype)), table
    )
    reference = table.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(attend(1.5 * expand_bias(reference, window)), reference)
    assert got.dtype == dtype and got.isfinite().all()
    torch.testing.assert_close(got.double(), want, rtol=1e-5 if dtype == torch.float32 else 5e-3, atol=2e-3)


@on_each_device
def test_gradcheck(device: str) -> None:
    """The function is linear: with whole numbers and a step of 1, even float32 differences are exact."""
    table = integers(rows((1, 3)), 1, device=device).requires_grad_()

    def expand(table: Tensor) -> Tensor:
        return expand_bias_table(table, (1, 3), padded=4, multiplier=0.25)[..., :3]

    torch.autograd.gradcheck(expand, table, eps=1.0, atol=0, rtol=0)


@on_each_device
def test_operators_are_well_behaved(device: str) -> None:
    """Schemas, fake tensors, autograd registration, tracing with dynamic shapes."""
    from kernels.window_attention import bias

    table = torch.randn(rows((2, 3)), 2, device=device, requires_grad=True)
    torch.library.opcheck(bias._expand, (table, 2, 3, 6, 1.5, torch.float16))
    torch.library.opcheck(bias._table_grad, (torch.randn(2, 2, 6, 6, device=device), 2, 3, 1.5))


# ---- edges


@on_each_device
def test_empty(device: str) -> None:
    none = torch.zeros(rows((7, 7)), 0, device=device, requires_grad=True)
    bias = expand_bias_table(none, (7, 7), padded=64, dtype=torch.float16)
    assert bias.shape == (0, 64, 64) and bias.dtype == torch.float16
    (grad,) = torch.autograd.grad(bias.sum(), none)
    assert grad.shape == none.shape
    no_batch = bias_table_grad(torch.zeros(0, 3, 4, 4, device=device), (2, 2))
    assert torch.equal(no_batch, torch.zeros(9, 3, device=device))


def test_errors_say_what_came() -> None:
    table = torch.zeros(13 * 13, 3)
    for wrong in (torch.zeros(13 * 12, 3), torch.zeros(13 * 13)):
        with pytest.raises(ValueError, match=r"table for window 7 x 7 must be \[169, heads\], got \[1"):
            expand_bias_table(wrong, (7, 7))
    with pytest.raises(ValueError, match=r"each at least 1, got \(0, 7\)"):
        expand_bias_table(table, (0, 7))
    with pytest.raises(ValueError, match="padded must be at least the window's 49 slots, got 48"):
        expand_bias_table(table, (7, 7), padded=48)
    with pytest.raises(TypeError, match=r"table must be float32, float16 or bfloat16, got torch\.float64"):
        expand_bias_table(table.double(), (7, 7))
    with pytest.raises(TypeError, match=r"dtype must be float32, float16 or bfloat16, got torch\.int32"):
        expand_bias_table(table, (7, 7), dtype=torch.int32)
    for shape in ((3, 49, 49), (1, 3, 49, 64), (1, 3, 48, 48)):
        with pytest.raises(ValueError, match=r"\[G, heads, Np, Np\] with Np >= 49, got \[.*4"):
            bias_table_grad(torch.zeros(shape), (7, 7))
    with pytest.raises(TypeError, match=r"partials must be float32, got torch\.float16"):
        bias_table_grad(torch.zeros(1, 3, 49, 49).half(), (7, 7))


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without the interpreter, and no Triton at all."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET is set: unset it")
    with pytest.raises(BackendError, match="run on a GPU, got a tensor on cpu.*TRITON_INTERPRET=1"):
        expand_bias_table(torch.zeros(9, 1), (2, 2))
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendError, match="need Triton"):
        bias_table_grad(torch.zeros(1, 1, 4, 4), (2, 2))


def test_importing_needs_no_triton() -> None:
    code = "import sys, kernels.aot, kernels.window_attention.bias; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
