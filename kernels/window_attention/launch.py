"""How a call to the Triton kernels is cut into programs: tiles, groups of windows, warps. No Triton is imported here.

Legend in tiles.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.launch import Config, forced, power_of_two, processor
from kernels.window_attention.geometry import Grid

MAX_HEAD_DIM = 128
MAX_GRID = 65_535  # of the grid's second and third axis
LEAST_SCALE = 1 / 64  # of logits, where the bias is divided by it
BIAS_STEP = 64  # a multiple of what the tiled kernels take of the bias's columns at once


@dataclass(frozen=True)
class Form:
    """What the choice of a configuration depends on: everything but the sizes of batch and map. (Nothing is cached in it:
    torch.compile looks into it, and before Python 3.12 not into cached_property.)"""

    window: tuple[int, int]
    head_dim: int
    half: bool  # float16 or bfloat16
    cosine: bool
    pads_are_keys: bool
    arch: int  # 80 or 90
    exact: bool = False  # the window divides the map: no slot is without a token

    @property
    def slots(self) -> int:
        """N."""
        return self.window[0] * self.window[1]

    @property
    def side(self) -> int:
        """Of the bias that the tiled kernels read: N up to whole tiles."""
        return -(-self.slots // BIAS_STEP) * BIAS_STEP

    @property
    def block_d(self) -> int:
        """head_dim, padded."""
        return power_of_two(self.head_dim)

    @property
    def tight(self) -> bool:
        """Whether masks or pads take registers, so that tiles have to be smaller."""
        return self.pads_are_keys or self.head_dim != self.block_d

    @property
    def whole(self) -> bool:
        """Whether a window is one tile in the forward: all logits of a head are in registers at once."""
        return self.slots <= (64 if self.half else 32) and self.block_d <= 64

    @property
    def fused_backward(self) -> bool:
        """Whether one kernel does the backward of a whole window: where that takes no more registers than there are."""
        return self.whole and fused_config(self) is not None

    @property
    def padded(self) -> int:
        """Np: N up to a power of two, where a window is one tile."""
        return power_of_two(self.slots)

    @property
    def walks(self) -> bool:
        """Whether the backward walks over windows in tiles (backward_walking.py): where that was timed."""
        return (
            self.arch >= 90
            and self.half
            and self.exact
            and self.head_dim in (32, 64)
            and 64 < self.slots <= 256
        )

    @property
    def pieces(self) -> tuple[int, int, int, int]:
        """Of a window's slots, where a kernel walks: 64 at a time, then a smaller piece; 0 where there is none."""
        rest = self.slots % 64
        widths = [64] * (self.slots // 64) + [power_of_two(rest)] * (rest > 0)
        first, second, third, fourth = (*widths, 0, 0, 0)[:4]
        return first, second, third, fourth


@dataclass(frozen=True)
class Call:
    """One call: its sizes, and what follows from them."""

    grid: Grid
    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    cosine: bool
    pads_are_keys: bool
    scale: float  # as the kernels want it: times log2 e
    device: torch.device

    @cached_property
    def form(self) -> Form:
        """What configurations depend on, without `exact`: a compiler that looks at it need not ask about the map's size."""
        half, arch = self.dtype.itemsize == 2, processor(self.device)[0]
        return Form(self.grid.window, self.head_dim, half, self.cosine, self.pads_are_keys, arch)

    @cached_property
    def launched(self) -> Form:
        """All that configurations depend on."""
        return replace(
            self.form, exact=self.form.arch >= 90 and not self.grid.padded
        )  # on sm_80 it would spill

    @property
    def walks(self) -> bool:
        """Whether the backward walks. There the bias is divided by the scale, which must leave it within fp16."""
        return self.launched.walks and (self.cosine or self.scale >= LEAST_SCALE)

    @property
    def slots(self) -> int:
        """N."""
        return self.grid.slots

    @property
    def windows(self) -> int:
        """Of all samples."""
        return self.batch * self.grid.windows

    @property
    def masked(self) -> bool:
        """Whether some windows hide what others show."""
        return self.grid.shift != (0, 0) or (self.grid.padded and not self.pads_are_keys)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers that every kernel takes, in its order: batch, height, width, rows, columns, sy, sx, h."""
        grid = self.grid
        return (
            self.batch,
            grid.height,
            grid.width,
            grid.rows,
            grid.columns,
            *grid.shift,
            self.heads,
        )

    @property
    def constants(self) -> dict[str, Any]:
        """The constants that every kernel takes."""
        return constants(self.form)

    def each_window(self, block: int) -> tuple[int, int, int]:
        """The grid where a program has one head, and one tile of `block` slots of one window."""
        return self.heads * -(-self.slots // block), self.grid.windows, self.batch

    def group_size(self, config: Config, tiles: int = 1) -> int:
        """Windows to a group, where a program has one head and one of `tiles` tiles of each window in its group."""
        groups = -(-config.programs * processor(self.device)[1] // (self.heads * tiles))
        return max(1, -(-self.windows // groups))

    def groups(self, size: int) -> int:
        """How many groups of at most `size` windows there are; those of one group have the same mask. See
        `tiles.windows_of`."""
        rows, columns = self.grid.rows - 1, self.grid.columns - 1
        return sum(-(-self.batch * kind // size) for kind in (rows * columns, rows, columns, 1))


def constants(form: Form) -> dict[str, Any]:
    """The constants that every kernel takes."""
    wy, wx = form.window
    return {"WY": wy, "WX": wx, "HEAD_DIM": form.head_dim, "BLOCK_D": form.block_d, "COSINE": form.cosine}


def bias_strides(bias: Tensor) -> tuple[int, int]:
    """From one kind of window, and from one head's expanded bias, to the next: 0 where all share one. [kinds, h, ., .]"""
    kinds, heads = bias.shape[:2]
    return 0 if kinds == 1 else bias.stride(0), 0 if heads == 1 else bias.stride(1)


def tail_of(form: Form) -> int:
    """The tiled forward's last step, for the keys that whole steps leave; 0 where they leave none."""
    rest = form.slots % configure("forward", form).keys
    return power_of_two(rest) if rest else 0


# ---- the configurations. Those for sm_90 at head_dim 32 and 64 are the fastest, or within a few percent of it, of what
# `python -m bench.tune` tried on an H200 (2026-11-27). Those for sm_80, and at other head_dims, are the largest tiles that
# compile without spilling registers: nothing else was tried. head_dim counts as the next power of two, 16 to 128.


def fused_config(form: Form) -> Config | None:
    """For whole_backward_kernel; None where the tiled kernels do it. At head_dim 64 it may spill, and is more than twice as
    fast as they are for all that."""
    if "fused" in forced:
        return forced["fused"]
    if form.tight or not form.half or form.block_d > (64 if form.arch >= 90 else 32):
        return None
    warps = power_of_two(form.slots) // 16
    if form.arch < 90:
        return None if form.cosine and form.block_d == 32 else Config(0, 0, warps, 2, late=True)
    if form.block_d == 64:
        return Config(0, 0, warps, 3 if form.exact else 2, by_product=True, programs=2)
    if form.cosine or form.block_d < 32:
        return Config(0, 0, warps, 3)
    return Config(0, 0, warps, 3, by_product=True, programs=3)


def walking_config(kernel: Literal["walking queries", "walking keys"], form: Form) -> Config:
    """For the kernels of backward_walking.py, queries or keys in tiles of 64."""
    if (config := forced.get(kernel)) is not None:
        return config
    wide = form.block_d == 64
    return Config(64, 64, 4, 1 if wide else 2, programs=2 if wide else 4)


Kernel = Literal["forward", "queries", "keys", "bias"]


def configure(kernel: Kernel, form: Form) -> Config:
    """For the forward (whole or tiled) and for the tiled backward's kernels."""
    if (config := forced.get(kernel)) is not None:
        return config
    if form.whole and kernel == "forward":
        walkers = 16 if form.cosine and form.block_d <= 32 else 4
        return Config(0, 0, power_of_two(form.slots) // 16, 2 if form.block_d == 64 else 3, programs=walkers)
    if not form.half:  # no tensor cores: products are unrolled, so the tiles are small
        side = 32 if form.block_d <= 64 else 16
        return Config(side, 16 if kernel == "keys" and form.block_d == 64 else side, 8, 1)
    return _hopper(kernel, form) if form.arch >= 90 else _ampere(kernel, form)


def _hopper(kernel: Kernel, form: Form) -> Config:
    tight, wide = form.tight, form.block_d == 128
    match kernel:
        case "forward":
            if wide and tight:
                return Config(32, 32, 4, 1)
            return Config(64, 64, 4, 2) if form.block_d == 32 and not tight else Config(64, 32, 4, 3)
        case "queries":
            return Config(32, 16, 4, 2) if wide and tight else Config(64, 32, 4, 2 if wide else 3)
        case "keys":
            if wide:
                return Config(16 if form.cosine or tight else 32, 32, 4, 1 if tight else 2)
            return Config(16 if form.block_d == 64 else 32, 64 if tight else 128, 4, 3)
        case _:
            if wide:
                return Config(32, 32 if tight else 64, 4, 1)
            if tight:
                return Config(64, 64, 4, 1)
            return Config(128, 64, 8, 3) if form.block_d == 64 else Config(64, 64, 4, 3, programs=8)


def _ampere(kernel: Kernel, form: Form) -> Config:
    cosine, tight = form.cosine, form.tight
    match kernel, form.block_d:
        case "forward", 128:
            return Config(32, 32, 4, 1 if tight else 2)
        case "queries", 128:
            return Config(32, 16, 4, 2) if tight else Config(32, 32, 4, 2)
        case "keys", 128:
            return Config(16 if cosine or tight else 32, 32, 4, 1 if tight else 2)
        case "bias", 128:
            return Config(32, 32 if tight or cosine else 64, 4, 1)
        case "forward", _:
            return Config(64, 32 if tight else 64, 4, 3)
        case "queries", 64:
            return Config(64, 32, 4, 2)
        case "keys", 64:
            return Config(32, 32, 4, 2) if tight or cosine else Config(32, 64, 4, 1)
        case "bias", 64:
            return Config(32, 64, 4, 1 if tight else 2)
        case "queries", _:
            if tight and form.block_d == 16 and cosine:
                return Config(32, 64, 4, 2)
            return Config(64, 32 if tight and (form.block_d == 16 or not cosine) else 64, 4, 2)
        case "keys", _:
            return Config(32, 64, 4, 2)
        case _:
            return Config(32 if tight and cosine else 64, 64, 4, 1 if tight else 2)
