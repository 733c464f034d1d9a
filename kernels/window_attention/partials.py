"""What a backward gives: gradients, and partial sums that someone adds in a fixed order. No Triton is imported here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.window_attention.launch import Call


class Gradients(NamedTuple):
    """What the launchers return; bias, multiplier and pads are partial sums, None where nobody asked."""

    qkv: Tensor  # [B, H, W, 3, h, D]
    bias: Tensor | None  # [G, h, Np, Np] fp32: of the bias itself, without log2 e
    multiplier: Tensor | None  # [G, h] fp32: of the logarithm of the multiplier
    pads: Tensor | None  # [G, 2, h, D] fp32


def empty_partials(
    call: Call, like: Tensor, bias_grad: bool, groups: int, query_programs: int, key_programs: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Room for the partial sums of the bias, the multiplier and the pads; None where there will be none."""

    side = call.form.padded if call.form.fused_backward else call.form.side

    def room(wanted: bool, *shape: int) -> Tensor | None:
        return like.new_empty(shape, dtype=torch.float32) if wanted else None

    return (
        room(bias_grad, groups, call.heads, side, side),
        room(call.cosine, query_programs, call.heads),
        room(call.pads_are_keys, key_programs, 2, call.heads, call.head_dim),
    )
