"""window_attention's backends against the reference in float64: the error of each by the numerics rule."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import products, window_attention
from kernels.window_attention import eager

BACKENDS = ("reference", "eager", "sdpa")
FAST = ("eager", "sdpa")

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# batch, map, window, shift, heads, head_dim
SHAPES = [
    (2, (14, 14), 7, 3, 3, 32),
    (1, (24, 13), 12, (5, 0), 2, 64),
    (1, (13, 13), 13, 0, 1, 128),
    (1, (15, 29), 14, 7, 1, 96),
    (1, (28, 28), 28, 0, 1, 32),
    (2, (9, 5), (4, 3), (0, 2), 2, 59),
    (3, (1, 1), 1, 0, 2, 16),
    (0, (8, 8), 4, 2, 2, 32),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("pads", ["masked", "pad_kv"])
@pytest.mark.parametrize("backend", FAST)
def test_float32_by_the_rule(shape: tuple, cosine: bool, pads: str, backend: str) -> None:
    check_by_the_rule(shape, cosine, pads, backend, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types_by_the_rule(dtype: torch.dtype, cosine: bool, backend: str) -> None:
    check_by_the_rule((2, (7, 9), 4, (2, 1), 2, 32), cosine, "pad_kv", backend, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pads", ["masked", "pad_kv"])
def test_bfloat16_products_by_the_rule(shape: tuple, pads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_bfloat16(monkeypatch)
    check_by_the_rule(shape, False, pads, "eager", torch.bfloat16)


def multiply_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with instructions for it, whatever the size: slow but right on others."""
    monkeypatch.setattr(products, "CPU_HAS_BFLOAT16", True)
    monkeypatch.setattr(eager, "FEWEST_BFLOAT16", 0)


@pytest.mark.parametrize("side", [14, 10])  # which the window does not divide
@pytest.mark.parametrize(
    ("able", "bound", "shared"), [(True, 0.005, None), (False, 0.002, None), (True, 0.005, 1000.0)]
)
def test_what_all_keys_share_costs_half_types_nothing(
    able: bool, bound: float, shared: float | None, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bias of the layer before, ten times as large as what differs, or a thousand times. And a table's gradient is no sum of
    rounded sums."""
    multiply_bfloat16(monkeypatch)
    monkeypatch.setattr(products, "CPU_HAS_BFLOAT16", able)
    qkv = torch.randn(4, side, side, 3, 3, 32)
    qkv[:, :, :, 1:] += 10 * torch.randn(2, 3, 32) if shared is None else shared
    inputs = qkv.bfloat16(), torch.randn(13 * 13, 3).bfloat16()
    direction = torch.randn(4, side, side, 96).bfloat16()

    def gradients(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        out = window_attention(*leaves, window=7, shift=3, scale=0.1, backend=backend)
        d_qkv, d_bias = torch.autograd.grad(out, leaves, direction.to(dtype))
        return [*d_qkv.unbind(3), d_bias]

    truths = gradients(torch.float64, "reference")
    for name, got, truth in zip(
        "q k v bias".split(), gradients(torch.bfloat16, "eager"), truths, strict=True
    ):
        error, size = ((t.square().mean().sqrt().item()) for t in (got.double() - truth, truth))
        assert error < bound * size, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-46, -0.3, float("nan"), 1e300])
def test_any_scale(scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero, and what is zero or too much in float32: as the reference has it, not a number where that has none."""
    multiply_bfloat16(monkeypatch)
    qkv = torch.randn(2, 6, 6, 3, 2, 16).to(dtype).requires_grad_()

    def run(backend: str) -> tuple[Tensor, Tensor]:
        out = window_attention(qkv, window=3, scale=scale, backend=backend)
        return out, *torch.autograd.grad(out, qkv, torch.ones_like(out))

    for got, want in zip(run("eager"), run("reference"), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True, rtol=2e-2, atol=1e-2)


def test_bfloat16_products_where_the_cpu_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = torch.randn(1, 6, 6, 3, 2, 16, dtype=torch.bfloat16, requires_grad=True)

    def kept(**options: Tensor) -> set[torch.dtype]:
        """The dtypes of the weights and of q, k, v that wait for the backward."""
        out = window_attention(qkv, window=3, shift=1, backend="eager", **options)
        return {t.dtype for t in out.grad_fn.saved_tensors if t is not None and t.dim() > 3}

    work = 4 * 2 * 9**2 * 16  # windows, heads, slots, head_dim
    few, many = work, work + 1
    for able, least, dtype in (
        (True, few, torch.bfloat16),
        (True, many, torch.float32),
        (False, few, torch.float32),
    ):
        monkeypatch.setattr(products, "CPU_HAS_BFLOAT16", able)
        monkeypatch.setattr(eager, "FEWEST_BFLOAT16", least)
        assert kept() == {dtype}
        # the gradient of a logit scale is a small difference of large sums
        assert kept(logit_scale=torch.ones(2)) == {torch.float32}


def check_by_the_rule(shape: tuple, cosine: bool, pads: str, backend: str, dtype: torch.dtype) -> None:
    """Error at most 2x (gradients 3x) that of plain PyTorch in the same dtype, measured against float64."""
    batch, (height, width), window, shift, heads, dim = shape
    wy, wx = (window, window) if isinstance(window, int) else window
    # Permuted, so not contiguous.
    qkv = torch.randn(3, batch, heads, height, width, dim).permute(1, 3, 4, 0, 2, 5).to(dtype)
    table = torch.randn((2 * wy - 1) * (2 * wx - 1), heads).to(dtype)
    options = {"logit_scale": torch.linspace(0.5, 3.0, heads).to(dtype)} if cosine else {}
    if pads == "pad_kv":
        options["pad_kv"] = torch.randn(2, heads, dim).to(dtype)
    inputs = {"qkv": qkv, "bias": table, **options}
    scale = None if cosine else 0.31
    direction = torch.randn(batch, height, width, heads * dim).to(dtype)

    def run(function, kind: torch.dtype, **fixed: object) -> list[Tensor]:  # type: ignore[no-untyped-def]
        leaves = {name: t.detach().to(kind).requires_grad_() for name, t in inputs.items()}
        out = function(**leaves, window=(wy, wx), shift=shift, scale=scale, **fixed)
        grads = torch.autograd.grad(out, list(leaves.values()), direction.to(kind), allow_unused=True)
        return [
            out,
            *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves.values(), strict=True)),
        ]

    exact = run(window_attention, torch.float64, backend="reference")
    plain = run(plain_window_attention, dtype)
    got = run(window_attention, dtype, backend=backend)
    assert [t.dtype for t in got] == [dtype] * len(got)
    # Gradients of a few numbers, each a sum over the whole map, cannot do better than such a sum in float32.
    of_sums = 3 * 1.2e-7 * exact[1].square().sum().sqrt().item()
    for name, ours, theirs, truth in zip(["out", *inputs], got, plain, exact, strict=True):
        floor = of_sums if name in ("logit_scale", "pad_kv") else 0.0
        assert within_the_rule(ours, theirs, truth, 2 if name == "out" else 3, floor), name


def within_the_rule(ours: Tensor, plain: Tensor, truth: Tensor, factor: float, floor: float) -> bool:
    if truth.numel() == 0:
        return ours.shape == truth.shape
    rounded = truth.to(ours.dtype)
    atol = 2 * ((rounded + 0.3 - 0.3) - rounded).abs().max().item()
    error, allowed = ((t.double() - truth).abs().max().item() for t in (ours, plain))
    close = error <= factor * allowed + atol + floor
    if ours.dtype == torch.bfloat16:
        rms_error, rms = (t.square().mean().sqrt() for t in (ours.double() - truth, truth))
        close &= bool(rms_error <= 0.005 * rms)
    return close


def plain_window_attention(
    qkv: Tensor,
    bias: Tensor,
    window: tuple[int, int],
    shift: int | tuple[int, int],
    scale: float | None,
    logit_scale: Tensor | None = None,
    pad_kv: Tensor | None = None,
) -> Tensor:
    """The usual way: roll, pad, partition, attend with a mask, reverse. All in the dtype that comes in."""
    batch, height, width, _, heads, dim = qkv.shape
    (wy, wx), (sy, sx) = window, (shift, shift) if isinstance(shift, int) else shift
    pad_y, pad_x = -height % wy, -width % wx
    x = torch.roll(qkv, (-sy, -sx), (1, 2))
    x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, pad_x, 0, pad_y))
    region = torch.zeros(height + pad_y, width + pad_x)
    if sy:
        region[-sy:] += 1
    if sx:
        region[:, -sx:] += 2
    is_pad = torch.zeros(height + pad_y, width + pad_x, dtype=torch.bool)
    is_pad[height:], is_pad[:, width:] = True, True
    if pad_kv is not None:
        fill = torch.cat([torch.ones_like(pad_kv[:1]), pad_kv])  # a query of zeros has no direction
        x = torch.where(is_pad[:, :, None, None, None], fill, x)

    def cut(t: Tensor) -> Tensor:  # [B, H, W, ...] -> [B, windows, N, ...]
        t = t.unflatten(2, (-1, wx)).unflatten(1, (-1, wy)).transpose(2, 3)
        return t.flatten(3, 4).flatten(1, 2)

    q, k, v = cut(x).permute(3, 0, 1, 4, 2, 5)
    if logit_scale is not None:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        logits = q @ k.mT * logit_scale.clamp(max=math.log(100)).exp()[:, None, None]
    else:
        logits = (q * scale) @ k.mT
    offsets = torch.stack(torch.meshgrid(torch.arange(wy), torch.arange(wx), indexing="ij")).flatten(1)
    dy, dx = offsets[:, :, None] - offsets[:, None, :]
    logits = logits + bias.view(2 * wy - 1, 2 * wx - 1, heads)[dy + wy - 1, dx + wx - 1].permute(2, 0, 1)
    regions, pads = cut(region[None])[0], cut(is_pad[None])[0]
    hidden = regions[:, :, None] != regions[:, None, :]
    if pad_kv is None:
        hidden = hidden | pads[:, None, :]
    hidden = hidden & ~pads[:, :, None]
    out = logits.masked_fill(hidden[:, None], float("-inf")).softmax(-1) @ v
    out = out.transpose(2, 3).flatten(3)  # [B, windows, N, C]
    out = out.unflatten(2, (wy, wx)).unflatten(1, (-1, (width + pad_x) // wx)).transpose(2, 3)
    out = out.flatten(3, 4).flatten(1, 2)[:, :height, :width]
    return torch.roll(out, (sy, sx), (1, 2))
