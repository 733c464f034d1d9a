"""The public function: checks, choice of the backend, dispatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.autocast import autocast_dtype
from kernels.backend import Choice, Plan, describe, is_hopper, resolve
from kernels.transforms import refuse_transforms, require_tensors
from kernels.window_attention import eager, reference, sdpa, triton_ops
from kernels.window_attention.geometry import Grid

NAME = "window_attention"
OPTIONAL = ("bias", "logit_scale", "pad_kv")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NEVER = {"flash_attn": "FlashAttention knows neither windows nor a position bias"}
BACKEND_FUNCTIONS = {
    "reference": reference.window_attention,
    "eager": eager.window_attention,
    "sdpa": sdpa.window_attention,
    "triton": triton_ops.window_attention,
}


def window_attention(
    qkv: Tensor,
    bias: Tensor | None = None,
    *,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    pad_kv: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Self-attention inside the (shifted) windows of a map, as in Swin (arXiv:2103.14030) and SwinV2
    (arXiv:2111.09883).

    qkv: [B, H, W, 3, h, d], any H, W; float64, float32, float16 or bfloat16.
    bias: None, a table [(2wy-1)*(2wx-1), h] indexed as in timm (row-major in relative y, x), or [h, N, N], N
    = wy * wx. window, shift: int or (y, x); 1 <= window <= map, 0 <= shift < window. The map is rolled by
        -shift, padded at its bottom and right up to whole windows, and rolled back; tokens that the roll
        made neighbours do not see each other. Where the window covers the map, the shift is the caller's to
        set to 0, as Swin does.
    scale: of the dot products; default d**-0.5.
    logit_scale: [h]; makes it cosine attention, exp(min(logit_scale, ln 100)) * cos(q, k) + bias. Then scale
    must be None. pad_kv: [2, h, d], key and value of the padding, which then takes part as in timm and
        torchvision, where the padded input went through the qkv layer: pass its key and value bias. Default:
        padding is masked, so that the result does not depend on how far a map happens to be padded.
    backend: "auto", "reference", "eager", "sdpa" or "triton"; `kernels.explain` tells what auto takes.

    Returns [B, H, W, h * d] in qkv's dtype. Gradients: qkv, bias, logit_scale, pad_kv. Those three may be
    float32 beside half-precision qkv. Under autocast a float32 qkv is cast to autocast's dtype, as torch's
    own attention casts it.
    Raises TypeError (dtypes), ValueError (shapes, values), BackendError (a named backend that cannot run the
    call).
    """
    require_tensors(NAME, OPTIONAL, qkv=qkv, bias=bias, logit_scale=logit_scale, pad_kv=pad_kv)
    refuse_transforms(NAME, backend, qkv, bias, logit_scale, pad_kv)
    low = autocast_dtype(qkv)
    if low is not None:
        qkv = qkv.to(low)
    grid = _check(qkv, bias, window, shift, scale, logit_scale, pad_kv)
    plan_ = plan(qkv, grid, logit_scale is not None, pad_kv is not None)
    run = BACKEND_FUNCTIONS[resolve(NAME, backend, plan_)]
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if low is None:
        return run(qkv, bias, logit_scale, pad_kv, grid, scale)
    with torch.autocast(
        qkv.device.type, enabled=False
    ):  # from here on, the dtypes are this function's business
        return run(qkv, bias, logit_scale, pad_kv, grid, scale)


def explain(
    qkv: Tensor,
    bias: Tensor | None = None,
    *,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    pad_kv: Tensor | None = None,
    backend: str = "auto",
) -> Choice:
    """`kernels.explain(window_attention, ...)`."""
    grid = _check(qkv, bias, window, shift, scale, logit_scale, pad_kv)
    if (low := autocast_dtype(qkv)) is not None:
        qkv = qkv.to(low)
    return describe(NAME, backend, plan(qkv, grid, logit_scale is not None, pad_kv is not None))


def plan(qkv: Tensor, grid: Grid, cosine: bool, pads: bool) -> Plan:
    """What auto takes for this call. The figures behind it are in kernels/README.md."""
    why = triton_ops.refusal(qkv, grid, cosine, pads)
    refusals = NEVER if why is None else NEVER | {"triton": why}
    if torch.compiler.is_exporting():
        return Plan("reference", "its program does not depend on the batch (torch.export)", refusals)
    if qkv.device.type == "cpu":
        return Plan("eager", "measured faster on CPUs at every shape that was tried", refusals)
    if why is None and is_hopper(qkv.device) and qkv.dtype.itemsize == 2:
        return Plan("triton", "measured faster on an H200 at every shape that was tried", refusals)
    if is_hopper(qkv.device) and qkv.dtype == torch.float32:
        return Plan("eager", "measured faster on an H200 in float32, gradients included", refusals)
    reason = f"torch's fused attention; nothing was measured on {qkv.device.type} like this in {qkv.dtype}"
    return Plan("sdpa", reason + (": triton can be asked for by name" if why is None else ""), refusals)


def _check(
    qkv: Tensor,
    bias: Tensor | None,
    window: int | tuple[int, int],
    shift: int | tuple[int, int],
    scale: float | None,
    logit_scale: Tensor | None,
    pad_kv: Tensor | None,
) -> Grid:
    """The call's sizes, or an error that says what came and what is supported."""
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(f"{NAME}: qkv must be [B, H, W, 3, heads, head_dim], got {list(qkv.shape)}")
    if qkv.dtype not in DTYPES:
        raise TypeError(f"{NAME}: qkv must be float64, float32, float16 or bfloat16, got {qkv.dtype}")
    _, height, width, _, heads, head_dim = qkv.shape
    if 0 in (height, width, heads, head_dim):
        raise ValueError(f"{NAME}: only the batch may be empty, got qkv {list(qkv.shape)}")
    wy, wx = _pair("window", window)
    sy, sx = _pair("shift", shift)
    if not (1 <= wy <= height and 1 <= wx <= width):
        raise ValueError(f"{NAME}: window must be from 1 to the map's {height} x {width}, got {wy} x {wx}")
    if not (0 <= sy < wy and 0 <= sx < wx):
        raise ValueError(
            f"{NAME}: shift must be from 0 to less than the window's {wy} x {wx}, got {sy} x {sx}"
        )
    grid = Grid(height, width, (wy, wx), (sy, sx))
    if isinstance(scale, Tensor):
        raise TypeError(
            f"{NAME}: scale must be a number, got a tensor {list(scale.shape)}; one that learns is multiplied into q, or is "
            "logit_scale (cosine attention)"
        )
    if scale is not None and logit_scale is not None:
        raise ValueError(
            f"{NAME}: scale must be None with logit_scale (cosine attention has its own), got {scale}"
        )
    if bias is not None:
        table, full = [(2 * wy - 1) * (2 * wx - 1), heads], [heads, grid.slots, grid.slots]
        if list(bias.shape) not in (table, full):
            raise ValueError(
                f"{NAME}: bias for window {wy} x {wx} and {heads} heads must be a table {table} or {full}, "
                f"got {list(bias.shape)}"
            )
        _check_like("bias", bias, qkv)
    if logit_scale is not None:
        if list(logit_scale.shape) != [heads]:
            raise ValueError(
                f"{NAME}: logit_scale must be [heads] = [{heads}], got {list(logit_scale.shape)}"
            )
        _check_like("logit_scale", logit_scale, qkv)
    if pad_kv is not None:
        if list(pad_kv.shape) != [2, heads, head_dim]:
            raise ValueError(
                f"{NAME}: pad_kv must be [2, heads, head_dim] = [2, {heads}, {head_dim}], "
                f"got {list(pad_kv.shape)}"
            )
        _check_like("pad_kv", pad_kv, qkv)
    return grid


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """`value` as (y, x)."""
    both = (value, value) if isinstance(value, int) else value
    whole = isinstance(both, Sequence) and len(both) == 2
    if not (whole and all(isinstance(size, int) and not isinstance(size, bool) for size in both)):
        raise ValueError(f"{NAME}: {name} must be an int or (y, x) of ints, got {value!r}")
    return both[0], both[1]


def _check_like(name: str, tensor: Tensor, qkv: Tensor) -> None:
    if tensor.device != qkv.device:
        raise ValueError(f"{NAME}: {name} must be on qkv's device {qkv.device}, got {tensor.device}")
    if tensor.dtype not in (qkv.dtype, torch.float32):
        raise TypeError(f"{NAME}: {name} must have qkv's dtype {qkv.dtype} or float32, got {tensor.dtype}")
