"""The relative position bias as the Triton kernels of window attention want it, and its gradient.

    expand_bias_table   table [(2wy-1)(2wx-1), h] -> bias [h, Np, Np], padded, scaled and in any of three dtypes
    bias_table_grad     partial gradients of the bias [G, h, Np, Np] -> gradient of the table

Both run on Triton (bias_triton.py), on a GPU or in Triton's interpreter. NO GPU HAS RUN THEM: their numbers were checked
in the interpreter only, their machine code by `python -m bench.aot`. The meaning is `expand_bias` of reference.py. Triton
is imported at the first call, so that importing this file needs none.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from kernels.backend import BackendError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def expand_bias_table(
    table: Tensor,
    window: tuple[int, int],
    *,
    padded: int | None = None,
    multiplier: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """multiplier * table, looked up for every pair of slots of a window.

    table: [(2wy-1)*(2wx-1), h], indexed as in timm (row-major in relative y, x); float32, float16 or bfloat16.
    window: (wy, wx), each at least 1; N = wy * wx.
    padded: the side Np >= N of the result; default N.
    multiplier: a constant; log2(e) where the softmax uses exp2.
    dtype: of the result, float32, float16 or bfloat16. It is computed in float32 and rounded once.

    Returns [h, Np, Np], (head, query, key). Key columns from N on are -inf in every row: a softmax then gives padded
    keys no weight, without a mask. Query rows from N on are 0 in the real columns: what a padded query computes is
    finite, and the caller drops it. Gradient: table, exact in the order of its sums (`bias_table_grad`); it cannot be
    differentiated twice.
    Raises TypeError (dtypes), ValueError (shapes, values), BackendError (no Triton, or not on a GPU).
    """
    wy, wx = _check_window("expand_bias_table", window)
    rows, slots = (2 * wy - 1) * (2 * wx - 1), wy * wx
    if table.dim() != 2 or len(table) != rows:
        raise ValueError(
            f"expand_bias_table: table for window {wy} x {wx} must be [{rows}, heads], got {list(table.shape)}"
        )
    for name, found in (("table", table.dtype), ("dtype", dtype)):
        if found not in DTYPES:
            raise TypeError(f"expand_bias_table: {name} must be float32, float16 or bfloat16, got {found}")
    side = slots if padded is None else padded
    if side < slots:
        raise ValueError(
            f"expand_bias_table: padded must be at least the window's {slots} slots, got {padded}"
        )
    bias: Tensor = _expand(table.float(), wy, wx, side, float(multiplier), dtype)
    return bias


def bias_table_grad(partials: Tensor, window: tuple[int, int], *, multiplier: float = 1.0) -> Tensor:
    """The gradient of `expand_bias_table` to the table, from G partial gradients of its result.

    partials: [G, h, Np, Np] float32, Np >= N; what is in padded rows and columns is ignored, NaN included.
    window, multiplier: as they were given to `expand_bias_table`.

    Returns [(2wy-1)*(2wx-1), h] float32: for each row, multiplier times the sum over G and over the row's (query,
    key) pairs. The order of the sums depends on the shape alone, and nothing is added atomically: the same input
    gives the same bits. G = 0, an empty batch, gives zeros.
    Raises as `expand_bias_table`.
    """
    wy, wx = _check_window("bias_table_grad", window)
    if partials.dim() != 4 or partials.shape[2] != partials.shape[3] or partials.shape[3] < wy * wx:
        raise ValueError(
            f"bias_table_grad: partials for window {wy} x {wx} must be [G, heads, Np, Np] with Np >= {wy * wx}, "
            f"got {list(partials.shape)}"
        )
    if partials.dtype != torch.float32:
        raise TypeError(f"bias_table_grad: partials must be float32, got {partials.dtype}")
    grad: Tensor = _table_grad(partials, wy, wx, float(multiplier))
    return grad


# ---- operators, opaque to torch.compile


@torch.library.custom_op("auroraio::expand_bias_table", mutates_args=())
def _expand(table: Tensor, wy: int, wx: int, padded: int, multiplier: float, dtype: torch.dtype) -> Tensor:
    if table.numel() == 0:
        return table.new_empty((table.shape[1], padded, padded), dtype=dtype)
    bias: Tensor = _triton(table).expand(table, wy, wx, padded, multiplier, dtype)
    return bias


@_expand.register_fake
def _(table: Tensor, wy: int, wx: int, padded: int, multiplier: float, dtype: torch.dtype) -> Tensor:
    return table.new_empty((table.shape[1], padded, padded), dtype=dtype)


@torch.library.custom_op("auroraio::bias_table_grad", mutates_args=())
def _table_grad(partials: Tensor, wy: int, wx: int, multiplier: float) -> Tensor:
    if partials.numel() == 0:
        return partials.new_zeros(((2 * wy - 1) * (2 * wx - 1), partials.shape[1]))
    grad: Tensor = _triton(partials).table_grad(partials, wy, wx, multiplier)
    return grad


@_table_grad.register_fake
def _(partials: Tensor, wy: int, wx: int, multiplier: float) -> Tensor:
    return partials.new_empty(((2 * wy - 1) * (2 * wx - 1), partials.shape[1]))


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, int, int, int, float, torch.dtype],
    output: Tensor,
) -> None:
    _, wy, wx, _, multiplier, _ = inputs
    ctx.arguments = wy, wx, multiplier  # type: ignore[attr-defined]


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor
) -> tuple[Tensor, None, None, None, None, None]:
    wy, wx, multiplier = ctx.arguments  # type: ignore[attr-defined]
    return _table_grad(grad.float()[None], wy, wx, multiplier), None, None, None, None, None


_expand.register_autograd(_backward, setup_context=_setup_context)


def _triton(tensor: Tensor) -> ModuleType:
    """bias_triton, or an error that says what is missing for `tensor`."""
    try:
        import triton

        from kernels.window_attention import bias_triton
    except ImportError as error:
        raise BackendError(
            f"the bias kernels need Triton (pip install 'triton>=3.6', on Linux): {error}"
        ) from error
    interpreted = not isinstance(bias_triton.bias_expand_kernel, triton.runtime.JITFunction)
    if tensor.is_cuda or interpreted:
        return bias_triton
    raise BackendError(
        f"the bias kernels run on a GPU, got a tensor on {tensor.device}. Elsewhere they run in Triton's "
        "interpreter, where TRITON_INTERPRET=1 was set before Triton was imported"
    )


def _check_window(function: str, window: tuple[int, int]) -> tuple[int, int]:
    if len(window) != 2 or min(window) < 1:
        raise ValueError(f"{function}: window must be (y, x), each at least 1, got {window}")
    return window
