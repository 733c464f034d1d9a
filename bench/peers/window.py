"""Window attention on a packed qkv map: this project's backends, the textbook, FlexAttention, and timm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench import work
from bench.measure import random_like
from bench.peers.compiling import compiled, compiled_for_gpu
from bench.subject import TRAINING, Absent, Function, Peer, Subject
from kernels import window_attention


@dataclass(frozen=True)
class WindowCase:
    """SwinV2's attention (cosine, a learnable scale per head, a bias table) on a map of height x width tokens; without
    `cosine` Swin's, of scaled dot products."""

    name: str
    batch: int
    height: int
    width: int
    heads: int
    head_dim: int
    window: int
    shift: int
    cosine: bool = True

    @property
    def scale(self) -> float:
        """Of the dot products, without `cosine`: not the usual one, so that whoever ignores it is found out."""
        return 1.5 * self.head_dim**-0.5

    @property
    def slots(self) -> int:
        """Tokens per window, N."""
        return self.window**2

    @property
    def shape(self) -> str:
        """For readers."""
        heads = f"{self.heads} head{'s' * (self.heads > 1)} of {self.head_dim}"
        dots = "" if self.cosine else ", dot products"
        return f"{self.batch} x {self.height}x{self.width} tokens, {heads}, window {self.window}, shift {self.shift}{dots}"

    def inputs(self, device: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        """qkv [B, H, W, 3, h, d] in the dtype; bias table [(2w-1)^2, h] and, with `cosine`, logit scales [h] in fp32
        as a model has them (fp64 for fp64)."""
        small = torch.float64 if dtype == torch.float64 else torch.float32
        qkv = torch.empty(
            self.batch, self.height, self.width, 3, self.heads, self.head_dim, device=device, dtype=dtype
        )
        table = torch.empty((2 * self.window - 1) ** 2, self.heads, device=device, dtype=small)
        scale = torch.empty(self.heads, device=device, dtype=small)
        found = {"qkv": random_like(qkv, 3 * seed), "bias": random_like(table, 3 * seed + 1)}
        if self.cosine:
            found["logit_scale"] = math.log(10) + 0.3 * random_like(scale, 3 * seed + 2)
        return found

    def work(self, mode: str, dtype: torch.dtype) -> work.Work:
        """See work.window_attention."""
        tokens = self.batch * self.height * self.width
        channels = self.heads * self.head_dim
        return work.window_attention(tokens, channels, self.slots, dtype.itemsize, backward=mode == TRAINING)


def _ours(backend: str) -> Peer:
    def build(case: WindowCase, device: str, dtype: torch.dtype) -> Function:
        def attend(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None = None) -> Tensor:
            return window_attention(
                qkv, bias, window=case.window, shift=case.shift, scale=None if case.cosine else case.scale,
                logit_scale=logit_scale, backend=backend,
            )  # fmt: skip

        return attend

    return Peer(backend, build, ours=True)


# --- the textbook: roll, partition, mask, as in the SwinV2 paper's code; no half type is computed in fp32 ---------


def _partition(x: Tensor, window: int) -> Tensor:
    """[B, H, W, ...] -> [B * nW, N, ...]; the window divides the map."""
    batch, height, width = x.shape[:3]
    x = x.unflatten(2, (width // window, window)).unflatten(1, (height // window, window))
    return x.transpose(2, 3).reshape(batch * height * width // window**2, window**2, *x.shape[5:])


def _reverse(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """The inverse of `_partition`."""
    x = x.reshape(-1, height // window, width // window, window, window, *x.shape[2:])
    return x.transpose(2, 3).reshape(-1, height, width, *x.shape[5:])


@cache
def _pair_index(window: int, device: str) -> Tensor:
    """int64 [N, N]: the row of the bias table for query i and key j."""
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    place = torch.stack((y.flatten(), x.flatten()), dim=1)
    offset = place[:, None] - place[None] + window - 1
    return (offset[..., 0] * (2 * window - 1) + offset[..., 1]).to(device)


@cache
def _regions(case: WindowCase, device: str) -> Tensor:
    """int64 [nW, N]: tokens of a window see each other where their numbers are equal; padding has number -1."""
    height, width = (-(-side // case.window) * case.window for side in (case.height, case.width))
    below = torch.arange(height, device=device) >= height - case.shift
    right = torch.arange(width, device=device) >= width - case.shift
    region = 2 * below[:, None] + 1 * right[None]
    region[case.height :], region[:, case.width :] = -1, -1
    return _partition(region[None], case.window)


def _padded(qkv: Tensor, case: WindowCase) -> Tensor:
    if case.shift:
        qkv = qkv.roll((-case.shift, -case.shift), (1, 2))
    down, right = -case.height % case.window, -case.width % case.window
    return F.pad(qkv, (0, 0, 0, 0, 0, 0, 0, right, 0, down)) if down or right else qkv


def _unpadded(out: Tensor, case: WindowCase) -> Tensor:
    """[B * nW, N, h * d] -> [B, H, W, h * d]."""
    height, width = (-(-side // case.window) * case.window for side in (case.height, case.width))
    out = _reverse(out, case.window, height, width)[:, : case.height, : case.width]
    return out.roll((case.shift, case.shift), (1, 2)) if case.shift else out


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float() if x.dtype != torch.float64 else x, dim=-1).to(x.dtype)


def _multiplier(logit_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the cosines, [h, 1, 1]."""
    return logit_scale.clamp(max=math.log(100)).exp()[:, None, None].to(dtype)


def _plain(case: WindowCase, device: str, dtype: torch.dtype) -> Function:
    region, pairs = _regions(case, device), _pair_index(case.window, device)
    hidden = (region[:, :, None] != region[:, None]) & (
        region[:, :, None] >= 0
    )  # a pad query sees all: no 0 / 0
    masked = bool(hidden.any())
    mask = torch.zeros(hidden.shape, device=device, dtype=dtype).masked_fill(hidden, float("-inf"))

    def attend(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None = None) -> Tensor:
        q, k, v = _partition(_padded(qkv, case), case.window).permute(2, 0, 3, 1, 4).unbind(0)  # [P, h, N, d]
        if logit_scale is None:
            logits = (q * case.scale) @ k.mT
        else:
            logits = _unit(q) @ _unit(k).mT * _multiplier(logit_scale, dtype)
        logits = logits + bias[pairs].permute(2, 0, 1).to(dtype)
        if masked:
            windows = len(mask)
            logits = (logits.unflatten(0, (-1, windows)) + mask[:, None]).flatten(0, 1)
        out = logits.softmax(-1) @ v
        return _unpadded(out.transpose(1, 2).flatten(2), case)

    return attend


def _flex(case: WindowCase, device: str, dtype: torch.dtype) -> Function:
    if dtype == torch.float64:
        raise Absent("FlexAttention takes no float64")
    region, pairs = _regions(case, device), _pair_index(case.window, device)
    windows = len(region)
    mask = None
    if bool((region != region[:, :1]).any()):

        def visible(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
            mine = region[b % windows, q]
            return (mine == region[b % windows, k]) | (mine < 0)

        mask = create_block_mask(visible, windows * case.batch, None, case.slots, case.slots, device=device)
    attention = compiled(flex_attention, device)

    def attend(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None = None) -> Tensor:
        if device == "cpu" and qkv.requires_grad:
            raise Absent("FlexAttention has no backward on a CPU")
        q, k, v = _partition(_padded(qkv, case), case.window).permute(2, 0, 3, 1, 4).unbind(0)
        if logit_scale is None:
            q = q * case.scale
        else:
            q, k = _unit(q) * _multiplier(logit_scale, dtype), _unit(k)
        expanded = bias[pairs].permute(2, 0, 1).contiguous()

        def add_bias(score: Tensor, _b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + expanded[h, i, j]

        out = attention(
            q.contiguous(), k.contiguous(), v.contiguous(), score_mod=add_bias, block_mask=mask, scale=1.0
        )
        return _unpadded(out.transpose(1, 2).flatten(2), case)

    return attend


def _compiled(case: WindowCase, device: str, dtype: torch.dtype) -> Function:
    return compiled_for_gpu(_plain(case, device, dtype), device)


def _timm(case: WindowCase, device: str, dtype: torch.dtype) -> Function:
    """timm's roll, windows, mask and attention, whose projections are left out."""
    if case.cosine:
        raise Absent("timm's cosine attention has no form without its projections; swin_block has it whole")
    if case.height % case.window or case.width % case.window:
        raise Absent("timm lets its padding take part")
    try:
        from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
    except ImportError as error:
        raise Absent(f"timm is not installed ({error})") from None
    size, window, shift = (case.height, case.width), (case.window, case.window), (case.shift, case.shift)
    block = SwinTransformerBlock(
        case.heads * case.head_dim, size, case.heads, window_size=case.window, shift_size=case.shift
    ).to(device, dtype)
    mask, attention = block.attn_mask, cast(Any, block.attn)
    attention.qkv, attention.proj, attention.scale = nn.Identity(), nn.Identity(), case.scale
    del attention.relative_position_bias_table  # a parameter, in whose place the call's table comes

    def attend(qkv: Tensor, bias: Tensor) -> Tensor:
        attention.relative_position_bias_table = bias.to(dtype)
        x = qkv.flatten(3)
        x = x.roll((-case.shift, -case.shift), (1, 2)) if case.shift else x
        out = attention(window_partition(x, window).flatten(1, 2), mask)  # [B * nW, N, h * d]
        out = window_reverse(out.unflatten(1, window), window, *size)
        result: Tensor = out.roll(shift, (1, 2)) if case.shift else out
        return result

    return attend


WINDOW_ATTENTION = Subject(
    "window_attention",
    (
        *map(_ours, ("auto", "reference", "eager", "sdpa", "triton")),
        Peer("plain", _plain),
        Peer("compiled", _compiled, note="the textbook, compiled; compile time is not counted"),
        Peer("flex", _flex, note="compiled; compile time is not counted"),
        Peer("timm", _timm),
    ),
    exact="reference",
    plain=("plain", "reference"),
)
