"""How a call to the Triton kernels of latent attention is cut into programs. No Triton is imported here.

Legend: B samples, M queries, h heads in groups of g = h / h_kv that share keys, N keys (of one sample, or rows of all
samples where they are packed).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kernels.launch import Config, forced, power_of_two

MAX_HEAD_DIM = 256
MAX_SPLITS = 128
Kernel = Literal["forward", "queries", "keys"]


@dataclass(frozen=True)
class Form:
    """What the choice of a configuration depends on."""

    dqk: int
    dv: int
    half: bool  # float16 or bfloat16
    masked: bool
    dropout: bool
    arch: int  # 80 or 90

    @property
    def block_d(self) -> int:
        """The wider head_dim, padded."""
        return power_of_two(max(self.dqk, self.dv))

    @property
    def constants(self) -> dict[str, Any]:
        """The constants that every kernel takes."""
        return {
            "DQK": self.dqk,
            "DV": self.dv,
            "BLOCK_DQK": power_of_two(self.dqk),
            "BLOCK_DV": power_of_two(self.dv),
            "MASKED": self.masked,
            "DROPOUT": self.dropout,
        }


def splits(programs: int, steps: int, slots: int) -> int:
    """Into how many parts the keys (or queries) of a program are split, so that whole waves of `slots` programs are full.

    The fewest parts whose last wave wastes at most a tenth more than the best choice does; never fewer than four steps to
    a part. FlashAttention-2 does not split once 80% of the slots have a program, and so leaves a band of shapes that
    keeps half of a GPU idle.
    """

    def waste(parts: int) -> float:
        """Time of whole waves over time of the work alone."""
        work = programs * parts / slots
        return -(-programs * parts // slots) / work

    choices = range(1, max(1, min(MAX_SPLITS, steps // 4)) + 1)
    best = min(map(waste, choices))
    return next(parts for parts in choices if waste(parts) <= 1.1 * best)


# ---- the configurations. Those for sm_90 without dropout are the fastest of what `python -m bench.tune` tried on an H200
# (2026-11-27), but for the backward at head_dim 256; that one, dropout, and sm_80 have large tiles that compile without
# spilling registers, and were never timed.


def blocks_per_sm(config: Config) -> int:
    """How many programs run at a time on a multiprocessor, by their registers and shared memory."""
    return 1 if config.num_warps > 4 else 2


def configure(kernel: Kernel, form: Form) -> Config:
    """For the forward and the two kernels of the backward."""
    if (config := forced.get(kernel)) is not None:
        return config
    if not form.half:  # no tensor cores: products are unrolled, so the tiles are small
        side = 32 if form.block_d <= 64 else 16
        if kernel == "keys" and form.dropout:
            return Config(16, side, 8, 1)
        return Config(side, side, 4 if kernel == "forward" and side == 32 else 8, 1)
    if form.arch >= 90:
        return _careful(kernel, form) if form.dropout else _hopper(kernel, form)
    return _ampere(kernel, form)


def _hopper(kernel: Kernel, form: Form) -> Config:
    match kernel, max(form.block_d, 32):
        case "forward", 32:
            return Config(128, 64, 4, 4, apart=True)
        case "forward", 64:
            return Config(64, 128, 4, 3, apart=True)
        case "forward", 128:
            return Config(64, 64, 4, 3, apart=True)
        case "forward", _:
            return Config(128, 64, 8, 2, apart=True)
        case "queries", 32:
            return Config(64, 64, 4, 3, apart=True)
        case "queries", 64:
            return Config(64, 128, 4, 3, apart=True)
        case "queries", 128:
            return Config(128, 64, 8, 3, apart=True)
        case "queries", _:
            return Config(32, 32, 4, 1)
        case _, 32:
            return Config(64, 128, 4, 1, apart=True)
        case _, 64:
            return Config(32, 128, 4, 1, apart=True)
        case _, 128:
            return Config(32, 64, 4, 1, apart=True)
        case _:
            return Config(32, 32, 8, 1, apart=True)


def _careful(kernel: Kernel, form: Form) -> Config:
    """For sm_90 with dropout, whose random numbers take registers; not timed."""
    match kernel, form.block_d:
        case "forward", 256:
            return Config(64, 32, 8, 2)
        case "forward", 128:
            return Config(128, 64, 8, 2)
        case "forward", _:
            return Config(128, 64, 8, 3)
        case "queries" | "keys", 256:
            return Config(32, 32, 4 if kernel == "queries" else 8, 1)
        case "queries", 128:
            return Config(64, 64, 8, 2)
        case "queries", _:
            return Config(128, 64, 8, 2)
        case _, 128:
            return Config(32, 64, 8, 2)
        case _:
            return Config(64, 64, 8, 2)


def _ampere(kernel: Kernel, form: Form) -> Config:
    match kernel, form.block_d:
        case "forward", 256:
            return Config(64, 32, 8, 2)
        case "forward", 128:
            return Config(64, 64, 8, 2)
        case "forward", _:
            return Config(128, 64, 8, 3)
        case "queries", 256:
            return Config(32, 32, 4, 1)
        case "queries", 128:
            return Config(64, 64, 8, 2)
        case "queries", _:
            return Config(128, 64, 8, 2)
        case _, 256:
            return Config(32, 32, 8, 1)
        case _, 128:
            return Config(32, 64 if form.dqk == form.dv else 32, 8, 1)
        case _:
            return Config(32, 64, 4 if form.dropout else 8, 1)
