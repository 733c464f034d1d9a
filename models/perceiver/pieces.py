"""What goes into the model, and how the tokens of all modalities of a sample come to lie one behind the other.

Letters: B samples, P pieces (pictures, sounds, clips or texts), n tokens of a piece, N tokens of all of them, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.tokens import PAD


class Piece(NamedTuple):
    """All pieces of one modality in a batch."""

    data: Tensor
    """What its adapter reads: images [P, ...], or waveforms, frames, token ids packed one behind the other [N, ...]"""
    sample: Tensor
    """int64 [P]: the sample (0..B-1) of each piece"""
    offsets: Tensor | None = None
    """int [P+1] where `data` is packed: piece i is data[offsets[i] : offsets[i+1]]"""
    mask: Tensor | None = None
    """bool, True = hidden, in the masked objectives: [P, rows, columns] of an image, in cells of any size; of other
    modalities [P, n] tokens, padded. None: the masked objectives draw one"""

    @property
    def lengths(self) -> Tensor:
        """int [P]: elements of each piece of packed data."""
        if self.offsets is None:
            raise ValueError("these pieces are not packed: they have no offsets")
        return self.offsets.diff()

    def select(self, pieces: Tensor, samples: Tensor) -> Piece:
        """The pieces with these numbers (int64 [Q]), which then belong to `samples` int64 [Q]."""
        mask = None if self.mask is None else self.mask[pieces]
        if self.offsets is None:
            return Piece(self.data[pieces], samples, None, mask)
        lengths = self.lengths[pieces]
        offsets = ends(lengths)
        total = int(offsets[-1])
        first = (self.offsets[:-1][pieces] - offsets[:-1]).repeat_interleave(lengths, output_size=total)
        return Piece(self.data[first + torch.arange(total, device=first.device)], samples, offsets, mask)


def together(first: Piece, second: Piece) -> Piece:
    """The pieces of both, of one modality, the second's behind the first's; masks are dropped."""
    data = torch.cat((first.data, second.data))
    sample = torch.cat((first.sample, second.sample))
    if first.offsets is None or second.offsets is None:
        return Piece(data, sample)
    return Piece(data, sample, torch.cat((first.offsets, second.offsets[1:] + first.offsets[-1])))


def no_samples(device: torch.device) -> Tensor:
    """Owners of no piece."""
    return torch.empty(0, dtype=torch.long, device=device)


def no_offsets(device: torch.device) -> Tensor:
    """Offsets of no piece."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def ends(lengths: Tensor) -> Tensor:
    """int [P] -> int32 [P+1], from 0 to their sum."""
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).to(torch.int32)


def visible(lengths: Tensor, longest: int) -> Tensor:
    """bool [P, longest]: True at each piece's own elements."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def padded(data: Tensor, lengths: Tensor, longest: int | None = None) -> Tensor:
    """Packed [N, ...] -> [P, longest, ...] with zeros behind."""
    if longest is None:
        longest = max(int(lengths.max()) if len(lengths) else 0, 1)
    out = data.new_zeros(len(lengths), longest, *data.shape[1:])
    out[visible(lengths, longest)] = data
    return out


def packed(tokens: Tensor) -> Piece:
    """Texts int64 [S, T] with padding -> one piece of each of S samples."""
    words = tokens != PAD
    return Piece(tokens[words], torch.arange(len(tokens), device=tokens.device), ends(words.sum(1)))


class Tokens(NamedTuple):
    """The tokens of one modality, as its adapter makes them: padded, so that the encoder runs them in one go."""

    values: Tensor
    """[P, n, E]"""
    lengths: Tensor
    """int [P]"""


def join(parts: Sequence[tuple[Tokens, Tensor]], samples: int) -> tuple[Tensor, Tensor]:
    """Tokens and their samples int64 [P], modality by modality -> (packed [N, E] sample by sample, offsets int32 [B+1]).

    Within a sample the modalities come in the order given. Nothing is padded; a sample without tokens is empty. One
    gather of all tokens.
    """
    values, owners = [], []
    for tokens, sample in parts:
        own = visible(tokens.lengths, tokens.values.shape[1])
        values.append(tokens.values[own])
        owners.append(sample[:, None].expand(own.shape)[own])
    owner = torch.cat(owners)
    order = torch.argsort(owner, stable=True)
    lengths = torch.zeros(samples, dtype=torch.long, device=owner.device)
    lengths = lengths.scatter_add(0, owner, torch.ones_like(owner))
    return torch.cat(values)[order], ends(lengths)
