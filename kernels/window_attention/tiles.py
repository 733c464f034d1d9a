"""What the Triton kernels of window attention share: which windows a program has, where their tokens lie, who sees whom.

Legend: a map H x W of each of B samples, cut into ny x nx windows of N = wy * wx slots after a roll by (-sy, -sx);
h heads of D numbers. qkv is [B, H, W, 3, h, D]. Slot n of a window is its row n // wx and column n % wx. The meaning of
all this is geometry.py; here it is index arithmetic, and no index is ever in memory. Tiled kernels find the mask in the
bias of a window's kind, the others make it.

Importing this file imports Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import launch
from kernels.triton_parts import product

LOG2_E: tl.constexpr = tl.constexpr(launch.LOG2_E)
LARGEST_HALF: tl.constexpr = tl.constexpr(
    60_000.0
)  # about what fp16 can hold: what stands for infinity there

# Numbers whose divisibility makes no better code: a form of its own for each would be compiled for nothing.
SIZES = [
    "batch",
    "height",
    "width",
    "rows",
    "columns",
    "sy",
    "sx",
    "heads",
    "group_size",
]


@triton.jit
def windows_of(group, size, batch, rows, columns):
    """The windows that a group has: `first` to `last`, numbered within one of four kinds.

    Interior windows, those of the last column, those of the last row, and the last corner have different masks, so a
    group has one kind only: its program then makes the mask once. The groups of the four kinds follow one another,
    each with at most `size` windows (launch.groups counts them). Returns first, last, and for `locate`, whether they
    are at the bottom and at the right (0 or 1), and the height and width of the rectangle in which the kind is numbered.
    """
    interior = tl.cdiv(batch * (rows - 1) * (columns - 1), size)
    right = interior + tl.cdiv(batch * (rows - 1), size)
    bottom = right + tl.cdiv(batch * (columns - 1), size)
    at_bottom = (group >= right).to(tl.int32)
    at_right = ((group >= interior) & (group < right)).to(tl.int32) + (group >= bottom).to(tl.int32)
    begin = tl.where(
        at_bottom == 1, tl.where(at_right == 1, bottom, right), tl.where(at_right == 1, interior, 0)
    )
    down = tl.where(at_bottom == 1, 1, rows - 1)
    across = tl.where(at_right == 1, 1, columns - 1)
    first = (group - begin) * size
    last = tl.minimum(first + size, batch * down * across)
    return first, last, at_bottom, at_right, down, across


@triton.jit
def place_of(window, down, across):
    """Sample, row and column of a window that `windows_of` numbered, within its kind's rectangle."""
    sample = window // (down * across)
    within = window % (down * across)
    return sample, within // across, within % across


@triton.jit
def next_place(sample, row, column, down, across):
    """Of the next window: a loop that divided at every turn would spend a tenth of its instructions on it."""
    column += 1
    row = tl.where(column == across, row + 1, row)
    column = tl.where(column == across, 0, column)
    sample = tl.where(row == down, sample + 1, sample)
    row = tl.where(row == down, 0, row)
    return sample, row, column


@triton.jit
def corner_of(row, column, at_bottom, at_right, rows, columns, wy, wx):
    """The rolled map's row and column of the first slot of a window at `place_of`."""
    return (at_bottom * (rows - 1) + row) * wy, (at_right * (columns - 1) + column) * wx


@triton.jit
def number_of(sample, row, column, at_bottom, at_right, rows, columns):
    """Of a window at `place_of` among all: samples, rows and columns in their order."""
    return (sample * rows + at_bottom * (rows - 1) + row) * columns + at_right * (columns - 1) + column


@triton.jit
def own_window(rows, columns, wy, wx):
    """The window of a program whose grid is (., windows of a sample, samples): sample, `number_of`, whether it is at the
    bottom and at the right, and `corner_of`. One division: such a program has one window, and little time for it."""
    sample = tl.program_id(2)
    row = tl.program_id(1) // columns
    column = tl.program_id(1) % columns
    at_bottom = (row == rows - 1).to(tl.int32)
    at_right = (column == columns - 1).to(tl.int32)
    return sample, sample * rows * columns + tl.program_id(1), at_bottom, at_right, row * wy, column * wx


@triton.jit
def locate(n, top, left, height, width, wy, wx, sy, sx):
    """int32 token y * W + x of each slot n of the window at (top, left), and whether the slot holds one.

    The roll wraps at the map's own size; slots beyond it, or beyond the window, hold nothing.
    """
    row = n // wx
    column = n % wx
    y = top + row
    x = left + column
    real = (row < wy) & (y < height) & (x < width)
    y += sy
    x += sx
    y = tl.where(y >= height, y - height, y)
    x = tl.where(x >= width, x - width, x)
    return y * width + x, real


@triton.jit
def offset_of(n, at_bottom, at_right, height, width, sy, sx, WY: tl.constexpr, WX: tl.constexpr):
    """int32 tokens from the first slot of a window to slot n, the same in all windows of a kind: what `locate` finds, made once
    for all windows. For maps that the window divides: there the roll wraps in the last windows alone."""
    row = tl.minimum(n // WX, WY - 1)  # slots beyond the window: anywhere in it, for what is not masked
    column = n % WX
    down = row * width - tl.where((at_bottom == 1) & (row >= WY - sy), height * width, 0)
    return down + column - tl.where((at_right == 1) & (column >= WX - sx), width, 0)


@triton.jit
def regions(
    n, at_bottom, at_right, height, width, rows, columns, wy, wx, sy, sx, PADS_ARE_KEYS: tl.constexpr
):
    """int32 region of each slot n as a query and as a key: they see each other where these are equal.

    In the last row of windows, what the roll took from the top is a region of its own, and likewise at the right.
    Padding is no key, unless PADS_ARE_KEYS.
    """
    row = n // wx
    column = n % wx
    region = 2 * at_bottom * (row >= wy - sy) + at_right * (column >= wx - sx)
    key = region
    if not PADS_ARE_KEYS:
        pad = at_bottom * (row >= height - (rows - 1) * wy) + at_right * (
            column >= width - (columns - 1) * wx
        )
        key = tl.where(pad > 0, -1, region)
    return region, key


@triton.jit
def bias_of(bias, kind_stride, bias_stride, at_bottom, at_right, head):
    """Where the bias of a head begins, with what is hidden in a window of this kind: [kinds, h, SIDE, SIDE]."""
    return bias + (2 * at_bottom + at_right).to(tl.int64) * kind_stride + head.to(tl.int64) * bias_stride


@triton.jit
def identity(SIDE: tl.constexpr):
    """[SIDE, SIDE] fp16. `tl.dot(identity, bias)` is the bias, exactly: a way to keep it in shared memory as an operand of the
    tensor cores, where it takes no registers. A bias of that kind is finite (0 * inf is not 0) and fp16."""
    i = tl.arange(0, SIDE)
    return (i[:, None] == i[None, :]).to(tl.float16)


@triton.jit
def with_pads(rows, pad, n, slots, real, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`rows` [., BLOCK_D] with the vector at `pad` in those of padding: slots of the window that hold no token."""
    d = tl.arange(0, BLOCK_D)
    vector = tl.load(pad + d, mask=d < HEAD_DIM, other=0.0).to(rows.dtype)
    return tl.where(((n < slots) & ~real)[:, None], vector[None, :], rows)


@triton.jit
def inverse_norm(rows):
    """1 / max(|row|, 1e-12), fp32, as torch.nn.functional.normalize."""
    wide = rows.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), 1e-12)


@triton.jit
def scaled_products(left, right, left_scale, COSINE: tl.constexpr):
    """left_scale * left right^T, for COSINE with right's rows of unit length; and those rows. float32 gets their lengths
    after the product: to round unit vectors first would be most of its error. Half types round them, as plain PyTorch does,
    and save a multiplication for each logit."""
    unit = right
    if COSINE:
        norm = inverse_norm(right)
        unit = (right * norm[:, None]).to(right.dtype)
        if right.dtype == tl.float32:
            return product(left, tl.trans(right)) * left_scale[:, None] * norm[None, :], unit
    return product(left, tl.trans(unit)) * left_scale[:, None], unit


@triton.jit
def grad_of_unit(grad, rows, norm, multiplier):
    """From the gradient to rows / |rows| (times multiplier) to that of rows, and sum(grad * unit rows) of each row.

    norm is 1 / |row|. With u the unit row, d row = multiplier * norm * (g - u <u, g>).
    """
    along = tl.sum(grad * rows, 1) * norm * multiplier
    return grad * (norm * multiplier)[:, None] - rows * (along * norm * norm)[:, None], along


@triton.jit
def absorb(acc, largest, total, logits, v):
    """One step of the online softmax: the sum of weighted values, the largest logit and the sum of weights so far."""
    new = tl.maximum(largest, tl.max(logits, 1))
    shown = tl.where(new == float("-inf"), 0.0, new)  # where nothing was visible yet, not -inf - -inf
    weights = tl.exp2(logits - shown[:, None])
    decay = tl.exp2(largest - shown)
    acc = acc * decay[:, None] + product(weights.to(v.dtype), v)
    return acc, new, total * decay + tl.sum(weights, 1)
