"""Attention of few queries over many keys: this project's backends, the textbook, FlexAttention, FlashAttention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from bench import work
from bench.measure import random_like
from bench.peers.compiling import compiled
from bench.subject import TRAINING, Absent, Function, Peer, Subject
from kernels import latent_attention


@dataclass(frozen=True)
class LatentCase:
    """`queries` latents per sample over `keys` inputs; `ragged`: the samples have different numbers of keys."""

    name: str
    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    ragged: bool = False
    v_dim: int | None = None  # where it is not head_dim

    @property
    def lengths(self) -> tuple[int, ...]:
        """Visible keys of each sample: all of them, or from a quarter to all in even steps."""
        if not self.ragged or self.batch == 1:
            return (self.keys,) * self.batch
        return tuple(self.keys // 4 + 3 * self.keys * i // (4 * (self.batch - 1)) for i in range(self.batch))

    @property
    def shape(self) -> str:
        """For readers."""
        keys = f"{min(self.lengths):,}-{self.keys:,}" if self.ragged else f"{self.keys:,}"
        dims = self.head_dim if self.v_dim is None else f"{self.head_dim}, values {self.v_dim}"
        return f"{self.batch} x {self.queries} latents over {keys} keys, {self.heads} heads of {dims}"

    def inputs(self, device: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        """q [B, M, h, d]; k, v [B, N, h, d]."""
        d, dv = self.head_dim, self.v_dim or self.head_dim
        sizes = {"q": (self.queries, d), "k": (self.keys, d), "v": (self.keys, dv)}
        empty = {
            name: torch.empty(self.batch, some, self.heads, dim, device=device, dtype=dtype)
            for name, (some, dim) in sizes.items()
        }
        return {name: random_like(tensor, 3 * seed + i) for i, (name, tensor) in enumerate(empty.items())}

    def work(self, mode: str, dtype: torch.dtype) -> work.Work:
        """See work.latent_attention; hidden keys are no work."""
        return work.latent_attention(
            sum(self.lengths), self.queries, self.batch, self.heads, self.heads, self.head_dim,
            self.v_dim or self.head_dim, dtype.itemsize, backward=mode == TRAINING,
        )  # fmt: skip


@cache
def _lengths(case: LatentCase, device: str) -> Tensor | None:
    return torch.tensor(case.lengths, device=device, dtype=torch.int32) if case.ragged else None


def _ours(backend: str) -> Peer:
    def build(case: LatentCase, device: str, dtype: torch.dtype) -> Function:
        lengths = _lengths(case, device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return latent_attention(q, k, v, key_lengths=lengths, backend=backend)

        return attend

    return Peer(backend, build, ours=True)


def _plain(case: LatentCase, device: str, dtype: torch.dtype) -> Function:
    lengths = _lengths(case, device)
    mask = None
    if lengths is not None:
        hidden = torch.arange(case.keys, device=device) >= lengths[:, None]
        mask = torch.zeros(hidden.shape, device=device, dtype=dtype).masked_fill(hidden, float("-inf"))[
            :, None, None
        ]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        logits = q @ k.mT * case.head_dim**-0.5
        if mask is not None:
            logits = logits + mask
        return (logits.softmax(-1) @ v).transpose(1, 2)

    return attend


def _flex(case: LatentCase, device: str, dtype: torch.dtype) -> Function:
    if dtype == torch.float64:
        raise Absent("FlexAttention takes no float64")
    lengths, mask = _lengths(case, device), None
    if lengths is not None:

        def visible(b: Tensor, _h: Tensor, _q: Tensor, k: Tensor) -> Tensor:
            return k < lengths[b]

        mask = create_block_mask(visible, case.batch, None, case.queries, case.keys, device=device)
    attention = compiled(flex_attention, device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if device == "cpu" and q.requires_grad:
            raise Absent("FlexAttention has no backward on a CPU")
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return attention(q, k, v, block_mask=mask).transpose(1, 2)

    return attend


def _flash(case: LatentCase, device: str, dtype: torch.dtype) -> Function:
    if device != "cuda":
        raise Absent("FlashAttention needs a CUDA device")
    if dtype not in (torch.float16, torch.bfloat16):
        raise Absent(f"FlashAttention takes half types, not {str(dtype).removeprefix('torch.')}")
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func
    except ImportError as error:
        raise Absent(f"flash-attn is not installed ({error})") from None
    lengths = _lengths(case, device)
    if lengths is None:
        return lambda q, k, v: flash_attn_func(q, k, v)
    visible = torch.arange(case.keys, device=device) < lengths[:, None]
    rows = visible.flatten().nonzero()[:, 0]
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    queries = torch.arange(case.batch + 1, device=device, dtype=torch.int32) * case.queries

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.flatten(0, 1)[rows] for t in (k, v))
        out = flash_attn_varlen_func(q.flatten(0, 1), k, v, queries, starts, case.queries, max(case.lengths))
        return out.view_as(q)

    return attend


def _torch(kind: SDPBackend) -> Callable[[LatentCase, str, torch.dtype], Function]:
    """torch's attention, held to one of its kernels; in its layout, to which q, k and v are views."""

    def build(case: LatentCase, device: str, dtype: torch.dtype) -> Function:
        if device != "cuda":
            raise Absent("torch's kernels by name are for CUDA devices")
        if dtype == torch.float64:
            raise Absent("it takes no float64")
        lengths, mask = _lengths(case, device), None
        if lengths is not None:
            if kind == SDPBackend.FLASH_ATTENTION:
                raise Absent("it takes no mask, so no lengths")
            mask = (torch.arange(case.keys, device=device) < lengths[:, None])[:, None, None]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            try:
                q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
                with sdpa_kernel(kind):
                    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
            except RuntimeError as error:
                if "No available kernel" in str(error):
                    raise Absent("torch says that this kernel cannot run the call") from None
                raise
            return out.transpose(1, 2)

        return attend

    return build


def _torch_sdpa(case: LatentCase, device: str, dtype: torch.dtype) -> Function:
    """torch's attention as one calls it on a CPU, with the mask that key lengths need."""
    if device != "cpu":
        raise Absent("torch's attention is here by its kernels")
    lengths = _lengths(case, device)
    mask = None if lengths is None else (torch.arange(case.keys) < lengths[:, None])[:, None, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return attend


LATENT_ATTENTION = Subject(
    "latent_attention",
    (
        *map(_ours, ("auto", "reference", "eager", "sdpa", "triton", "flash_attn")),
        Peer("plain", _plain),
        Peer("torch-sdpa", _torch_sdpa),
        Peer("torch-flash", _torch(SDPBackend.FLASH_ATTENTION)),
        Peer("torch-cudnn", _torch(SDPBackend.CUDNN_ATTENTION)),
        Peer("torch-efficient", _torch(SDPBackend.EFFICIENT_ATTENTION)),
        Peer("flex", _flex, note="compiled; compile time is not counted"),
        Peer("flash-attn", _flash, note="ragged keys are packed in the call"),
    ),
    exact="reference",
    plain=("plain", "reference"),
)
