"""Maps to windows and back: one gather each way.

Data is seen as rows of head_dim numbers. A sample has R = nW * h * N of them in windows, in the order
(window, head, slot): the order in which batched products want them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from kernels.window_attention.geometry import Grid, remember, slot_of_token, token_of_slot

# A batch bigger than this many rows (of head_dim numbers) adds its samples' offsets anew: little beside its work, and
# the cache stays small (1 MB an entry).
REMEMBERED_ROWS = 1 << 17


# How the part of an index that is the same for every sample is made: `build(*sizes, device)`, anew or remembered.
Maker: TypeAlias = Callable[..., Tensor]


def _anew(device: torch.device) -> Maker:
    return lambda build, *sizes: build(*sizes, device)


def qkv_to_windows(
    grid: Grid, batch: int, heads: int, device: torch.device, make: Maker | None = None
) -> Tensor:
    """int64 [3 * B * R]: for each row of the packed q, k, v, its row in qkv [B, H, W, 3, h, d]. Pads read
    some row."""
    kind = torch.arange(3, device=device)[:, None, None] * heads
    sample = torch.arange(batch, device=device)[:, None] * (grid.tokens * 3 * heads)
    return ((make or _anew(device))(_rows_of_slots, grid, heads, 3 * heads) + (kind + sample)).flatten()


def windows_to_qkv(
    grid: Grid, batch: int, heads: int, device: torch.device, make: Maker | None = None
) -> Tensor:
    """int64 [B * H * W * 3 * h]: the inverse of `qkv_to_windows`."""
    rows = grid.windows * heads * grid.slots
    kind = torch.arange(3, device=device)[:, None] * (batch * rows)
    sample = torch.arange(batch, device=device)[:, None, None, None] * rows
    return ((make or _anew(device))(_rows_of_tokens, grid, heads)[:, None, :] + (kind + sample)).flatten()


def map_to_windows(
    grid: Grid, batch: int, heads: int, device: torch.device, make: Maker | None = None
) -> Tensor:
    """int64 [B * R]: for each row in windows, its row in a map [B, H, W, h, d]. Pads read some row."""
    sample = torch.arange(batch, device=device)[:, None] * (grid.tokens * heads)
    return ((make or _anew(device))(_rows_of_slots, grid, heads, heads) + sample).flatten()


def windows_to_map(
    grid: Grid, batch: int, heads: int, device: torch.device, make: Maker | None = None
) -> Tensor:
    """int64 [B * H * W * h]: the inverse of `map_to_windows`."""
    sample = torch.arange(batch, device=device)[:, None, None] * (grid.windows * heads * grid.slots)
    return ((make or _anew(device))(_rows_of_tokens, grid, heads) + sample).flatten()


def _rows_of_slots(grid: Grid, heads: int, stride: int, device: torch.device) -> Tensor:
    """int64 [R]: token * stride + head of each row (window, head, slot) of one sample; pads take token 0."""
    token = token_of_slot(grid, device)[:, None, :]  # [nW, 1, N]
    token = token.masked_fill(token == grid.tokens, 0)
    return (token * stride + torch.arange(heads, device=device)[:, None]).flatten()


def _rows_of_tokens(grid: Grid, heads: int, device: torch.device) -> Tensor:
    """int64 [H * W, h]: the row (window, head, slot) of each token and head of one sample."""
    slot = slot_of_token(grid, device)[:, None]
    return (slot // grid.slots * heads + torch.arange(heads, device=device)) * grid.slots + slot % grid.slots


def rows(build: Callable[..., Tensor], grid: Grid, batch: int, heads: int, like: Tensor) -> Tensor:
    """One of the four index tensors above, on the device of `like`; remembered where it is small, else the part that
    is the same for every sample: that one comes from the host, which a GPU would have to wait for."""
    if 3 * batch * grid.windows * grid.slots * heads > REMEMBERED_ROWS:
        return build(grid, batch, heads, like.device, partial(remember, like))
    return remember(like, build, grid, batch, heads)


def pack_qkv(qkv: Tensor, grid: Grid) -> Tensor:
    """qkv [B, H, W, 3, h, d] -> [3, B * nW, h, N, d]; pad slots hold some token's numbers."""
    batch, _, _, _, heads, head_dim = qkv.shape
    gathered = qkv.reshape(-1, head_dim).index_select(0, rows(qkv_to_windows, grid, batch, heads, qkv))
    return gathered.view(3, batch * grid.windows, heads, grid.slots, head_dim)


def unpack_qkv(packed: Tensor, grid: Grid, batch: int, heads: int, head_dim: int) -> Tensor:
    """The inverse of `pack_qkv`; pad slots are dropped. Sizes are told: torch 2.11's compiler fails where an autograd.Function
    asks a tensor of its own for them."""
    gathered = packed.view(-1, head_dim).index_select(0, rows(windows_to_qkv, grid, batch, heads, packed))
    return gathered.view(batch, grid.height, grid.width, 3, heads, head_dim)


def pack_map(plane: Tensor, grid: Grid, heads: int) -> Tensor:
    """[B, H, W, h * d] -> [B * nW, h, N, d]; pad slots hold some token's numbers."""
    batch, head_dim = plane.shape[0], plane.shape[3] // heads
    gathered = plane.reshape(-1, head_dim).index_select(0, rows(map_to_windows, grid, batch, heads, plane))
    return gathered.view(batch * grid.windows, heads, grid.slots, head_dim)


def unpack_map(packed: Tensor, grid: Grid, batch: int, heads: int, head_dim: int) -> Tensor:
    """The inverse of `pack_map`; pad slots are dropped. Sizes as above."""
    gathered = packed.view(-1, head_dim).index_select(0, rows(windows_to_map, grid, batch, heads, packed))
    return gathered.view(batch, grid.height, grid.width, heads * head_dim)


def pad_slots(grid: Grid, batch: int, like: Tensor) -> Tensor:
    """bool [B * nW, 1, N, 1], True where the slot is padding."""
    return remember(like, _is_pad, grid).repeat(batch, 1)[:, None, :, None]


def _is_pad(grid: Grid, device: torch.device) -> Tensor:
    """bool [nW, N]."""
    return token_of_slot(grid, device) == grid.tokens
