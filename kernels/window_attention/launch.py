"""How a call to the Triton kernels is cut into programs: tiles, groups of windows, warps. No Triton is imported here.

Legend in tiles.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.launch import Config, forced, power_of_two, processor
from kernels.window_attention.geometry import Grid

MAX_HEAD_DIM = 128
BIAS_STEP = 64  # a multiple of what the tiled kernels take of the bias's columns at once
PROGRAMS_PER_SM = (
    4  # of kernels that walk over windows: enough to fill a GPU, few enough to keep the bias in registers
)


@dataclass(frozen=True)
class Form:
    """What the choice of a configuration depends on: everything but the sizes of batch and map."""

    window: tuple[int, int]
    head_dim: int
    half: bool  # float16 or bfloat16
    cosine: bool
    pads_are_keys: bool
    arch: int  # 80 or 90

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
    def resident(self) -> bool:
        """Whether a program of the forward keeps all keys of a window."""
        return self.half and not self.whole and self.block_d <= 64 and self.slots <= 256

    @property
    def resident_backward(self) -> bool:
        """The same of the backward."""
        small = self.half and self.block_d <= 64 and self.slots <= 256
        return small and not self.fused_backward and not self.pads_are_keys

    @property
    def padded(self) -> int:
        """Np: N up to a power of two, where a window is one tile."""
        return power_of_two(self.slots)


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
        """What configurations depend on."""
        half, arch = self.dtype.itemsize == 2, processor(self.device)[0]
        return Form(self.grid.window, self.head_dim, half, self.cosine, self.pads_are_keys, arch)

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

    def group_size(self, tiles: int = 1) -> int:
        """Windows to a group, where a program has one head and one of `tiles` tiles of each window in its group."""
        groups = -(-PROGRAMS_PER_SM * processor(self.device)[1] // (self.heads * tiles))
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


@cache
def pieces(slots: int) -> dict[str, int]:
    """Up to three powers of two, 16 to 128, that hold N keys with the least left over, in the fewest pieces."""
    sizes = (0, 16, 32, 64, 128)
    fitting = [
        some for some in product(sizes[1:], sizes, sizes) if sum(some) >= slots and some == tuple(sorted(some, reverse=True))
    ]
    best = min(fitting, key=lambda some: (sum(some), len(some) - some.count(0), some))
    return dict(zip(("K1", "K2", "K3"), best, strict=True))


def tail_of(form: Form) -> int:
    """The tiled forward's last step, for the keys that whole steps leave; 0 where they leave none."""
    rest = form.slots % configure("forward", form).keys
    return power_of_two(rest) if rest else 0


# ---- the configurations: the largest tiles that compile without spilling registers (`python -m bench.aot` holds them to
# it); none was ever timed. head_dim counts as the next power of two, 16 to 128


def fused_config(form: Form) -> Config | None:
    """For whole_backward_kernel; None where it would spill, so that the tiled kernels do it."""
    if "fused" in forced:
        return forced["fused"]
    if form.tight or not form.half:
        return None
    warps = power_of_two(form.slots) // 16
    if form.block_d == 64:  # spills, and is more than twice as fast as the tiled kernels for all that
        return Config(0, 0, warps, 1)
    if form.arch >= 90:
        return Config(0, 0, warps, 3)
    if form.block_d == 16:
        return Config(0, 0, warps, 2, late=True)
    return None if form.cosine else Config(0, 0, warps, 3, late=True)


Kernel = Literal["forward", "resident", "resident_backward", "queries", "keys", "bias"]


def configure(kernel: Kernel, form: Form) -> Config:
    """For the forward (whole or tiled), for those of windows whose keys stay, and for the tiled backward's kernels."""
    if (config := forced.get(kernel)) is not None:
        return config
    if kernel == "resident":
        return Config(64, 0, 4, 1)
    if kernel == "resident_backward":
        return Config(64, 0, 8, 1)
    if form.whole and kernel == "forward":
        return Config(0, 0, power_of_two(form.slots) // 16, 3)
    if not form.half:  # no tensor cores: products are unrolled, so the tiles are small
        side = 32 if form.block_d <= 64 else 16
        return Config(side, side, 8, 1)
    new, cosine, tight = form.arch >= 90, form.cosine, form.tight
    match kernel, form.block_d:
        case "forward", 128:
            return Config(64, 32, 4, 3) if new and not tight else Config(32, 32, 4, 1 if tight else 2)
        case "queries", 128:
            return Config(32, 16, 4, 2) if tight else Config(64 if new or not cosine else 32, 32, 4, 2)
        case "keys", 128:
            return Config(16 if cosine or tight else 32, 32, 4, 1 if tight else 2)
        case "bias", 128:
            return Config(32, 32 if tight else 64, 4, 1)
        case "forward", _:
            return Config(64, 64, 4, 3)
        case "queries", 64:
            return Config(64, 64 if new and not tight else 32, 4, 2)
        case "keys", 64:
            return Config(32, 32 if tight else 64, 4, 2 if tight or new else 1)
        case "bias", 64:
            if tight:
                return Config(64 if new else 32, 64, 4, 1)
            return Config(64 if new else 32, 64, 4, 1 if new and cosine else 2)
        case "queries", _:
            if tight and form.block_d == 16 and cosine:
                return Config(32, 64, 4, 2)
            return Config(64, 32 if tight and (form.block_d == 16 or not cosine) else 64, 4, 2)
        case "keys", _:
            return Config(32, 64, 4, 2)
        case _:
            return Config(64, 64, 4, 1 if tight else 2)
