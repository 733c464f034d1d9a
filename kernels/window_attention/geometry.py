"""Where every token goes: windows, roll, padding and mask as index arithmetic.

The map [H, W] is rolled by (-shift_y, -shift_x) at its own size, padded at its end (bottom, right) to a
multiple of the window, and cut into nW = ny * nx windows of N = wy * wx slots; windows and slots are
numbered row-major. After a roll, the last window row holds rows that were not neighbours: those from local
row wy - shift_y on form a region of their own. The same holds for the last window column, and two slots see
each other where both regions are equal (Liu et al. 2021, arXiv:2103.14030, figure 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The sizes of one call: the map, its windows (y, x) and their shift. Hashable, so it is the caches'
    key."""

    height: int
    width: int
    window: tuple[int, int]
    shift: tuple[int, int]

    @property
    def rows(self) -> int:
        """ny, how many windows stand one below the other."""
        return -(-self.height // self.window[0])

    @property
    def columns(self) -> int:
        """nx, how many windows stand side by side."""
        return -(-self.width // self.window[1])

    @property
    def windows(self) -> int:
        """nW."""
        return self.rows * self.columns

    @property
    def slots(self) -> int:
        """N, the slots of one window."""
        return self.window[0] * self.window[1]

    @property
    def tokens(self) -> int:
        """H * W."""
        return self.height * self.width

    @property
    def padded(self) -> bool:
        """Whether some slots hold padding."""
        return self.windows * self.slots != self.tokens


# Rows and columns are independent, so each tensor below is a sum over two short lists, one per axis. They are plain
# lists because torch 2.13's compiler fails on the same arithmetic with torch.arange.


def token_of_slot(grid: Grid, device: torch.device) -> Tensor:
    """int64 [nW, N]: the token (y * W + x) in each slot; H * W where the slot is padding."""
    y, x = (_source(*axis) for axis in _axes(grid))
    token = _plane([grid.width * i for i in y], x, device)
    # A negative number in a list marks padding.
    is_pad = _plane([i < 0 for i in y], [i < 0 for i in x], device) > 0
    return _cut(grid, token.masked_fill(is_pad, grid.tokens))


def slot_of_token(grid: Grid, device: torch.device) -> Tensor:
    """int64 [H * W]: the place of each token in the nW * N slots; the inverse of `token_of_slot`."""
    (wy, wx), (sy, sx) = grid.window, grid.shift
    rolled_y = [(y - sy) % grid.height for y in range(grid.height)]
    rolled_x = [(x - sx) % grid.width for x in range(grid.width)]
    by_row = [y // wy * grid.columns * grid.slots + y % wy * wx for y in rolled_y]
    by_column = [x // wx * grid.slots + x % wx for x in rolled_x]
    return _plane(by_row, by_column, device).flatten()


def region_of_slot(grid: Grid, device: torch.device) -> Tensor:
    """int64 [nW, N]: slots of a window see each other where these are equal."""
    (wy, wx), (sy, sx) = grid.window, grid.shift
    height, width = grid.rows * wy, grid.columns * wx
    below = [2 * (y >= height - sy) for y in range(height)]
    right = [1 * (x >= width - sx) for x in range(width)]
    return _cut(grid, _plane(below, right, device))


def relative_index(window: tuple[int, int], device: torch.device) -> Tensor:
    """int64 [N, N]: the bias table's row for (query slot, key slot): row-major in (relative y, relative x),
    as in timm."""
    wy, wx = window
    y = torch.arange(wy, device=device).repeat_interleave(wx)
    x = torch.arange(wx, device=device).repeat(wy)
    dy = y[:, None] - y[None, :] + wy - 1
    dx = x[:, None] - x[None, :] + wx - 1
    return dy * (2 * wx - 1) + dx


def _axes(grid: Grid) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(size, padded size, shift) in y and in x."""
    (wy, wx), (sy, sx) = grid.window, grid.shift
    return (grid.height, grid.rows * wy, sy), (grid.width, grid.columns * wx, sx)


def _source(size: int, padded: int, shift: int) -> list[int]:
    """Where each place of a rolled and padded axis comes from; -1 is padding."""
    return [(place + shift) % size if place < size else -1 for place in range(padded)]


def _plane(by_row: list[int], by_column: list[int], device: torch.device) -> Tensor:
    """int64 [rows, columns] of by_row[i] + by_column[j]."""
    rows = torch.tensor(by_row, dtype=torch.int64, device=device)
    columns = torch.tensor(by_column, dtype=torch.int64, device=device)
    return rows[:, None] + columns[None, :]


def _cut(grid: Grid, plane: Tensor) -> Tensor:
    """[ny * wy, nx * wx] -> [nW, N]."""
    wy, wx = grid.window
    return (
        plane.reshape(grid.rows, wy, grid.columns, wx).permute(0, 2, 1, 3).reshape(grid.windows, grid.slots)
    )


# What follows is what the fast backends use.

T = TypeVar("T")


def remember(like: Tensor, build: Callable[..., T], *sizes: Any) -> T:
    """build(*sizes, device of `like`), from a bounded cache where that is safe."""
    # A tensor that was made while tracing must not outlive the trace.
    if torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return build(*sizes, like.device)
    return cast(T, _remembered(build, *sizes, like.device))


@lru_cache(maxsize=128)
def _remembered(build: Callable[..., Any], *sizes: Any) -> Any:
    # Tensors that are made under torch.inference_mode could not be saved for a later backward.
    with torch.inference_mode(False):
        return build(*sizes)


@dataclass(frozen=True)
class Masks:
    """0 and -inf, [N, N] each, to be added to the logits of the last window row and the last window
    column."""

    last_row: Tensor | None
    last_column: Tensor | None


def masks(grid: Grid, mask_pads: bool, dtype: torch.dtype, device: torch.device) -> Masks:
    """What the shift and, where mask_pads, the padding hide."""
    (wy, wx), (sy, sx) = grid.window, grid.shift
    pads_y, pads_x = grid.rows * wy - grid.height, grid.columns * wx - grid.width
    rows = _hidden(wy, sy, pads_y if mask_pads else 0, device)
    columns = _hidden(wx, sx, pads_x if mask_pads else 0, device)
    zeros = torch.zeros(wy, wx, wy, wx, dtype=dtype, device=device)

    def additive(hidden: Tensor) -> Tensor:
        return zeros.masked_fill(hidden, float("-inf")).view(grid.slots, grid.slots)

    return Masks(
        last_row=None if rows is None else additive(rows[:, None, :, None]),
        last_column=None if columns is None else additive(columns[None, :, None, :]),
    )


def _hidden(window: int, shift: int, pads: int, device: torch.device) -> Tensor | None:
    """bool [window, window], (query, key) in the last window along one axis; None where nothing is hidden.

    A pad query sees everything: its result is dropped, and a row with no visible key would be NaN.
    """
    if shift == 0 and pads == 0:
        return None
    real = range(window - pads)
    after = [place >= window - shift for place in range(window)]
    hidden = [
        [q in real and (k not in real or after[q] != after[k]) for k in range(window)] for q in range(window)
    ]
    return torch.tensor(hidden, dtype=torch.bool, device=device)
