"""Dropout that depends on a seed and on places only: not on the backend, the device, the padding or the
packing.

The random number of (sample b, head i, query m, key n) is word n % 4 of Philox 4x32-10 with the counter (n
// 4, m, i, b) and the seed as its key (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"); n
counts within the sample. Counters make it possible to compute it inside a kernel, tile by tile, again in the
backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox 4x32-10: four counter words and two key words, int64 tensors that hold uint32 -> four random
    words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The products fill 64 bits and overflow int64, which keeps the bits; masking undoes the shift's sign
        # extension.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & LOW) ^ c1 ^ k0, p1 & LOW, ((p0 >> 32) & LOW) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return c0, c1, c2, c3


def keep_mask(
    seed: Tensor,
    probability: float,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    first_sample: int = 0,
    first_key: int = 0,
) -> Tensor:
    """bool [B, h, M, N], True = kept (with probability 1 - `probability`). seed: int64 scalar on the device
    to use. first_key: a multiple of 4."""

    def count(size: int, dims: int, start: int = 0) -> Tensor:
        return torch.arange(start, start + size, device=seed.device).view(-1, *[1] * dims)

    counter = (
        count(-(-keys // 4), 0, first_key // 4),
        count(queries, 1),
        count(heads, 2),
        count(batch, 3, first_sample),
    )
    words = torch.stack(
        philox(counter, (seed & LOW, (seed >> 32) & LOW)), dim=-1
    )  # [B, h, M, ceil(N / 4), 4]
    uniform = (words.flatten(-2)[..., :keys] >> 8).float() * 2.0**-24  # 24 bits are exact in float32
    return uniform >= probability


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as an int64 scalar on `device`; None draws one from torch's default generator of that
    device."""
    if seed is None:
        return torch.randint(2**62, (), device=device)
    if isinstance(seed, Tensor):
        return seed.to(device, torch.int64)
    return torch.tensor(seed, dtype=torch.int64, device=device)
