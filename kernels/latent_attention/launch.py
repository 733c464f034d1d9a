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
BLOCKS_PER_SM = 1  # of the kernels below, mostly, by their registers


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


# ---- the configurations: large tiles that compile without spilling registers (`python -m bench.aot` holds them to it);
# none was ever timed


def configure(kernel: Literal["forward", "queries", "keys"], form: Form) -> Config:
    """For the forward and the two kernels of the backward."""
    if (config := forced.get(kernel)) is not None:
        return config
    new, dropout = form.arch >= 90, form.dropout
    if not form.half:  # no tensor cores: products are unrolled, so the tiles are small
        side = 32 if form.block_d <= 64 else 16
        return Config(side, side, 4 if kernel == "forward" and side == 32 else 8, 1)
    match kernel, form.block_d:
        case "forward", 256:
            return Config(64, 32, 8, 2)
        case "forward", 128:
            return Config(128 if new else 64, 64, 8, 2)
        case "forward", _:
            return Config(128, 64, 8, 3)
        case "queries", 256:
            return Config(32, 32, 4, 1)
        case "queries", 128:
            return Config(64, 64, 8, 2)
        case "queries", _:
            return Config(128, 64, 8, 2)
        case "keys", 256:
            return Config(32, 32, 8, 1)
        case "keys", 128:
            return Config(32, 64, 8, 2)
        case _:
            return Config(32, 64, 4, 2) if dropout and not new else Config(64, 64, 8, 2)
