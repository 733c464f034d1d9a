"""Packed keys of several samples, [total, h_kv, d] with offsets, to a padded batch [B, N, h_kv, d]."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.rows import gather_rows


def unpack_keys(k: Tensor, v: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """k, v [total, h_kv, d], offsets int [B + 1] -> k, v [B, N, h_kv, d] and visible bool [B, N]; N is the
    longest sample, or 1 where all are empty. Where all samples are equally long, these are views, and visible is None.

    Reads the lengths on the host. A compiler cannot do that, so under torch.compile N is `total`: right, but
    of the size batch * total.
    """
    total, samples = len(k), len(offsets) - 1
    if samples == 0:
        return k[None][:0], v[None][:0], torch.ones(0, total, dtype=torch.bool, device=k.device)
    offsets = offsets.long()
    lengths = offsets.diff()
    longest = total if torch.compiler.is_compiling() else int(lengths.max())
    longest = max(longest, 1)
    if total == samples * longest and not torch.compiler.is_compiling():
        return k.unflatten(0, (samples, longest)), v.unflatten(0, (samples, longest)), None
    place = torch.arange(longest, device=k.device)
    visible = place < lengths[:, None]  # [B, N]
    # Hidden places hold zeros. Where a packed row t of sample b goes: b * N + t - offsets[b].
    index = (offsets[:-1, None] + place).masked_fill(~visible, total).flatten()
    row = torch.arange(total, device=k.device)
    sample = torch.searchsorted(offsets, row, right=True) - 1
    inverse = sample * longest + row - offsets[sample]
    k, v = (_gather(t, index, inverse).view(samples, longest, *t.shape[1:]) for t in (k, v))
    return k, v, visible


def _gather(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    zero_row = rows.new_zeros(1, *rows.shape[1:])
    # The zero row is read by every hidden place. It needs no gradient, so any place will do as its inverse.
    return gather_rows(torch.cat([rows, zero_row]), index, torch.cat([inverse, inverse.new_zeros(1)]))
