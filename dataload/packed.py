"""Sequences of different lengths in one tensor, without padding: what variable-length attention reads.

Letters: S sequences, N elements of all of them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True)
class Packed:
    """S sequences one behind the other."""

    values: torch.Tensor
    """[N, ...]"""
    cu_seqlens: torch.Tensor
    """int32 [S+1]: sequence i is values[cu_seqlens[i] : cu_seqlens[i+1]]; the first is 0, the last N"""
    longest: int
    """elements of the longest sequence; 0 where there is none"""

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> torch.Tensor:
        """int32 [S]"""
        return self.cu_seqlens.diff()

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The sequences, as views."""
        return iter(self.values.split(self.lengths.tolist()))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packed:
        """The same on `device`."""
        return replace(
            self,
            values=self.values.to(device, non_blocking=non_blocking),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Packed:
        """The same in page-locked memory. What is on a GPU already stays there."""
        values, ends = (x if x.is_cuda else x.pin_memory() for x in (self.values, self.cu_seqlens))
        return replace(self, values=values, cu_seqlens=ends)

    def padded(self, fill: float = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """([S, longest, ...] filled up with `fill`, bool [S, longest] that is True at the sequences' own
        elements)."""
        at = torch.arange(self.longest, device=self.values.device)
        mine = at[None] < self.lengths[:, None]
        result = self.values.new_full((len(self), self.longest, *self.values.shape[1:]), fill)
        result[mine] = self.values
        return result, mine


def pack(sequences: Sequence[np.ndarray | torch.Tensor], like: torch.Tensor | None = None) -> Packed:
    """Packs S sequences [n_i, ...] of one dtype and the same further sizes; n_i may be 0.

    `like`: a tensor whose dtype and further sizes [*, ...] an empty pack takes. Raises ValueError for sequences that do
    not fit together, for a scalar, and for none at all without `like`.
    """
    tensors = [torch.as_tensor(one) for one in sequences]
    if not tensors:
        if like is None:
            raise ValueError("no sequence to pack, and no `like` to say of which kind")
        return Packed(like.new_empty((0, *like.shape[1:])), torch.zeros(1, dtype=torch.int32), 0)
    first = tensors[0]
    for i, one in enumerate(tensors):
        if one.dim() == 0:
            raise ValueError(f"sequence {i} is a scalar; sequences have at least one dimension")
        if one.dtype != first.dtype or one.shape[1:] != first.shape[1:] or one.device != first.device:
            raise ValueError(
                f"sequence {i} is {one.dtype} [n, {', '.join(map(str, one.shape[1:]))}] on {one.device}, the first "
                f"{first.dtype} [n, {', '.join(map(str, first.shape[1:]))}] on {first.device}"
            )
    lengths = [len(one) for one in tensors]
    ends = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int64)
    if int(ends[-1]) >= 2**31:
        raise ValueError(f"{int(ends[-1])} elements do not fit the int32 of cu_seqlens")
    return Packed(torch.cat(tensors), ends.to(torch.int32).to(first.device), max(lengths))


def concatenate(parts: Sequence[tuple[Packed, torch.Tensor]], samples: int) -> tuple[Packed, torch.Tensor]:
    """Joins several modalities' sequences sample by sample: ([N, ...] packed by sample, int64 [N] that says from
    which part an element came).

    Each part is (packed, int64 [S]): its sequences, and to which sample (0..samples-1) each belongs. Within a sample
    the parts come in the order given, and a part's sequences in their own order; a sample without any is an empty
    sequence. All `values` have one dtype and the same further sizes. Differentiable: one gather of all elements.
    Raises ValueError where there is no part, or a part and its samples do not fit.
    """
    if not parts:
        raise ValueError("nothing to concatenate")
    for number, (packed, owner) in enumerate(parts):
        if owner.shape != (len(packed),):
            raise ValueError(f"part {number} has {len(packed)} sequences, but samples {tuple(owner.shape)}")
        if len(owner) and not (0 <= int(owner.min()) and int(owner.max()) < samples):
            raise ValueError(f"part {number} names samples outside of 0..{samples - 1}")
    device = parts[0][0].values.device
    values = torch.cat([packed.values for packed, _ in parts])
    owners = torch.cat([owner.to(device).repeat_interleave(packed.lengths.long()) for packed, owner in parts])
    kinds = torch.cat(
        [torch.full((len(packed.values),), i, device=device) for i, (packed, _) in enumerate(parts)]
    )
    order = torch.argsort(owners, stable=True)
    lengths = torch.bincount(owners, minlength=samples)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    return Packed(values[order], ends, int(lengths.max()) if samples else 0), kinds[order]
