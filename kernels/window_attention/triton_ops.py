"""Window attention on Triton, as two operators that torch.compile does not look into: one for each pass.

    auroraio::window_attention_forward     bias expanded (bias.py), then forward.py
    auroraio::window_attention_backward    bias expanded again, then backward.py; partial sums added

Triton is imported at the first call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import is_hopper, triton_refusal
from kernels.launch import LOG2_E
from kernels.operators import operator
from kernels.window_attention.geometry import Grid, masks, remember
from kernels.window_attention.launch import MAX_GRID, MAX_HEAD_DIM, Call, Form
from kernels.window_attention.partials import Gradients
from kernels.window_attention.reference import MAX_LOGIT_SCALE, logit_multiplier

MAX_OFFSET = 2**31  # offsets within one sample, and within one head's bias, are 32-bit


def refusal(qkv: Tensor, grid: Grid, cosine: bool, pads: bool) -> str | None:
    """Why the kernels cannot run this call; None where they can."""
    if (why := triton_refusal(qkv.device)) is not None:
        return why
    if qkv.dtype == torch.float64:
        return "it computes in float32 at most, got float64"
    if qkv.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim must be from 1 to {MAX_HEAD_DIM}, got {qkv.shape[-1]}"
    form = Form(
        grid.window,
        qkv.shape[-1],
        qkv.dtype.itemsize == 2,
        cosine,
        pads and grid.padded,
        90 if is_hopper(qkv.device) else 80,
    )
    if form.side**2 >= MAX_OFFSET:
        return f"a window's bias must have fewer than 2^31 numbers, got {form.side**2:,}"
    if qkv[:1].numel() >= MAX_OFFSET:
        return f"one sample of qkv must have fewer than 2^31 numbers, got {qkv[:1].numel():,}"
    if max(len(qkv), grid.windows) > MAX_GRID and not form.fused_backward:
        sizes = f"{len(qkv):,} samples of {grid.windows:,} windows"
        return (
            f"for such windows it takes up to {MAX_GRID:,} samples, and as many windows of each, got {sizes}"
        )
    return None


def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_kv: Tensor | None,
    grid: Grid,
    scale: float,
) -> Tensor:
    """qkv [B, H, W, 3, h, d] -> [B, H, W, h * d]; see reference.py for the meaning."""
    inputs = (qkv, bias, logit_scale, pad_kv)
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    out: Tensor = _forward(*inputs, *grid.window, *grid.shift, scale, training)[0]
    return out


# ---- operators


def _fake_forward(
    qkv: Tensor,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_kv: Tensor | None,
    wy: int,
    wx: int,
    sy: int,
    sx: int,
    scale: float,
    training: bool,
) -> tuple[Tensor, Tensor]:
    batch, height, width, _, heads, head_dim = qkv.shape
    call = _call(qkv, logit_scale, pad_kv, wy, wx, sy, sx, scale)
    out = qkv.new_empty((batch, height, width, heads * head_dim))
    return out, qkv.new_empty(_lse_shape(call, training), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, logit_scale, pad_kv, *ctx.numbers, _ = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    # A backward in one kernel has no lse, and does not read out.
    ctx.save_for_backward(qkv, bias, logit_scale, pad_kv, out if lse.numel() else lse, lse)


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, bias, logit_scale, pad_kv, out, lse = ctx.saved_tensors
    bias_grad = bias is not None and ctx.needs_input_grad[1]
    found = _backward(grad, qkv, out, lse, bias, logit_scale, pad_kv, *ctx.numbers, bias_grad)
    wanted = (True, bias_grad, logit_scale is not None, pad_kv is not None)
    return *(one if want else None for one, want in zip(found, wanted, strict=True)), *[None] * 6


@operator("window_attention_forward", _fake_forward, (_autograd, _setup_context))
def _forward(
    qkv: Tensor,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_kv: Tensor | None,
    wy: int,
    wx: int,
    sy: int,
    sx: int,
    scale: float,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """out [B, H, W, h * d], and lse [B * nW, h, N] fp32 where `training` in tiles needs it, else empty."""
    call = _call(qkv, logit_scale, pad_kv, wy, wx, sy, sx, scale)
    if qkv.numel() == 0:
        return _fake_forward(qkv, bias, logit_scale, pad_kv, wy, wx, sy, sx, scale, training)
    from kernels.window_attention.forward import forward

    qkv = _aligned(qkv)
    lse = qkv.new_empty(_lse_shape(call, training), dtype=torch.float32)
    operands = _operands(call, qkv, bias, logit_scale, pad_kv, whole=call.form.whole)
    return forward(call, qkv, *operands, lse), lse


def _fake_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_kv: Tensor | None,
    wy: int,
    wx: int,
    sy: int,
    sx: int,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_bias, d_scale, d_pads = (
        qkv.new_empty(0) if part is None else part.new_empty(part.shape)
        for part in (bias if bias_grad else None, logit_scale, pad_kv)
    )
    return qkv.new_empty(qkv.shape), d_bias, d_scale, d_pads


@operator("window_attention_backward", _fake_backward)
def _backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_kv: Tensor | None,
    wy: int,
    wx: int,
    sy: int,
    sx: int,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, bias, logit_scale and pad_kv; empty for what is None, and for the bias unless `bias_grad`."""
    call = _call(qkv, logit_scale, pad_kv, wy, wx, sy, sx, scale)
    if qkv.numel() == 0:
        grads = _fake_backward(
            grad, qkv, out, lse, bias, logit_scale, pad_kv, wy, wx, sy, sx, scale, bias_grad
        )
        for part in grads:
            part.zero_()
        return grads
    from kernels.window_attention.bias import table_grad

    found = _gradients(
        call, _aligned(grad), _aligned(qkv), out, lse, bias, logit_scale, pad_kv, bias_grad=bias_grad
    )
    d_bias, d_scale, d_pads = (qkv.new_empty(0) for _ in range(3))  # results may not share memory
    if bias is not None and found.bias is not None:
        if bias.dim() == 2:
            d_bias = table_grad(found.bias, wy, wx, 1.0).to(bias.dtype)
        else:
            d_bias = found.bias.sum(0)[:, : call.slots, : call.slots].to(bias.dtype).contiguous()
    if logit_scale is not None and found.multiplier is not None:
        # The gradient of log(multiplier), which is the clamped logit_scale.
        d_scale = (found.multiplier.sum(0) * (logit_scale.float() <= MAX_LOGIT_SCALE)).to(logit_scale.dtype)
    if pad_kv is not None:  # without padding it has no part in the result
        d_pads = torch.zeros_like(pad_kv) if found.pads is None else found.pads.sum(0).to(pad_kv.dtype)
    return found.qkv, d_bias, d_scale, d_pads


def _gradients(
    call: Call,
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_kv: Tensor | None,
    *,
    bias_grad: bool,
) -> Gradients:
    """By the kernels that fit the call."""
    if call.form.fused_backward:
        from kernels.window_attention import backward_whole

        whole_bias, multiplier, _ = _operands(call, qkv, bias, logit_scale, pad_kv, whole=True)
        return backward_whole.backward(call, grad, qkv, whole_bias, multiplier, bias_grad=bias_grad)
    if call.walks:
        from kernels.window_attention import backward_walking
        from kernels.window_attention.half_bias import half_bias

        halved = half_bias(call, bias, qkv)
        multiplier = halved.centre if logit_scale is None else _multiplier(logit_scale)
        return backward_walking.backward(call, grad, qkv, out, lse, halved, multiplier, bias_grad=bias_grad)
    from kernels.window_attention import backward

    operands = _operands(call, qkv, bias, logit_scale, pad_kv, whole=False)
    return backward.backward(call, grad, qkv, out, lse, *operands, bias_grad=bias_grad)


# ---- what the launchers need


def _call(
    qkv: Tensor,
    logit_scale: Tensor | None,
    pad_kv: Tensor | None,
    wy: int,
    wx: int,
    sy: int,
    sx: int,
    scale: float,
) -> Call:
    batch, height, width, _, heads, head_dim = qkv.shape
    grid = Grid(height, width, (wy, wx), (sy, sx))
    cosine, pads_are_keys = logit_scale is not None, pad_kv is not None and grid.padded
    return Call(grid, batch, heads, head_dim, qkv.dtype, cosine, pads_are_keys, scale * LOG2_E, qkv.device)


def _lse_shape(call: Call, training: bool) -> tuple[int, ...]:
    return (call.windows, call.heads, call.slots) if training and not call.form.fused_backward else (0,)


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, from an address that 16-byte loads can take."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _operands(
    call: Call,
    qkv: Tensor,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_kv: Tensor | None,
    *,
    whole: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """bias, multiplier and pad_kv as the kernels take them; something stands for what they will not look at.

    The bias is [kinds, h, side, side]: kernels whose tile is a `whole` window make their mask themselves, once; the others find
    it in the bias of the window's kind.
    """
    pads = qkv if pad_kv is None else pad_kv.detach().to(qkv.dtype).contiguous()
    side = call.form.padded if whole else call.form.side
    if bias is None:
        expanded = remember(qkv, _no_bias, call.slots, side)[None]
    elif bias.dim() == 2:
        from kernels.window_attention.bias import expand

        expanded = expand(bias.detach().float(), *call.grid.window, side, LOG2_E)[None]
    else:
        more = side - call.slots
        expanded = F.pad(bias.detach().float() * LOG2_E, (0, more), value=float("-inf"))
        # F.pad keeps the strides of what it need not pad
        expanded = F.pad(expanded, (0, 0, 0, more)).contiguous()[None]
    if call.masked and not whole:
        expanded = expanded + remember(qkv, _kinds, _least(call.grid), not call.pads_are_keys, side)
    return expanded, expanded if logit_scale is None else _multiplier(logit_scale), pads


def _multiplier(logit_scale: Tensor) -> Tensor:
    """[h] fp32, times log2 e."""
    return logit_multiplier(logit_scale.detach(), torch.float32) * LOG2_E


def _no_bias(slots: int, side: int, device: torch.device) -> Tensor:
    """[1, side, side]: hides padded keys, from every head alike."""
    bias = torch.zeros(1, side, side, device=device)
    bias[:, :, slots:] = float("-inf")
    return bias


def _least(grid: Grid) -> Grid:
    """The smallest map with the same mask: what is remembered does not depend on the map's size."""
    (wy, wx), pads_y, pads_x = grid.window, -grid.height % grid.window[0], -grid.width % grid.window[1]
    return Grid(2 * wy - pads_y, 2 * wx - pads_x, grid.window, grid.shift)


def _kinds(grid: Grid, mask_pads: bool, side: int, device: torch.device) -> Tensor:
    """[4, 1, side, side], 0 and -inf: what is hidden in windows inside, in the last column, the last row, the corner."""
    hidden = masks(grid, mask_pads, torch.float32, device)
    kinds = torch.zeros(4, 1, side, side, device=device)
    inside = kinds[:, :, : grid.slots, : grid.slots]
    if hidden.last_column is not None:
        inside[1::2] += hidden.last_column
    if hidden.last_row is not None:
        inside[2:] += hidden.last_row
    return kinds
