"""Window attention the usual way, in place of the project's: roll, partition into windows, all logits, bias and mask added to
them, softmax, and back, as timm's SwinV2 does under autocast. It is the textbook of `bench.peers.window`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

import models.aurora.encoder
from bench.peers.window import WindowCase, _plain
from bench.subject import Function
from kernels.autocast import autocast_dtype
from train.plan.standins import replaced

NAMES = ("ours", "timm-style")


@cache
def _function(
    height: int, width: int, heads: int, head_dim: int, window: int, shift: int, device: str, dtype: torch.dtype
) -> Function:  # fmt: skip
    """With its mask, which timm keeps in a buffer."""
    return _plain(WindowCase("", 1, height, width, heads, head_dim, window, shift), device, dtype)


def window_attention(
    qkv: Tensor, bias: Tensor, *, window: tuple[int, int], shift: tuple[int, int], logit_scale: Tensor,
    pad_kv: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `kernels.window_attention` for what the presets ask: square windows that divide the map, or hidden padding."""
    if window[0] != window[1] or shift[0] != shift[1] or pad_kv is not None:
        raise ValueError(
            f"square windows, one shift and masked padding, got {window}, {shift}, pad_kv {pad_kv is not None}"
        )
    low = autocast_dtype(qkv)
    qkv = qkv if low is None else qkv.to(low)
    _, height, width, _, heads, dim = qkv.shape
    attend: Any = _function(height, width, heads, dim, window[0], shift[0], str(qkv.device), qkv.dtype)
    out: Tensor = attend(qkv, bias, logit_scale)
    return out.to(qkv.dtype)


@contextmanager
def attention(name: str) -> Iterator[None]:
    """The models attend as one of NAMES does while this is on."""
    places = [(models.aurora.encoder, "window_attention", window_attention)] if name == "timm-style" else []
    with replaced(places):
        yield
