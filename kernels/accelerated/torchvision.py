"""The Swin attention of torchvision (checked with 0.28). Its modules take whole maps, so the block is not touched."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.accelerated.attend import attend, continuous_table, shift_where_uncovered
from kernels.accelerated.base import Accelerated

# One call each in a graph that is traced before the sizes of maps are known, as feature extractors do.
torch.fx.wrap("attend")
torch.fx.wrap("shift_where_uncovered")
BOTH = (
    "qkv.weight",
    "qkv.bias",
    "proj.weight",
    "proj.bias",
    "num_heads",
    "window_size",
    "shift_size",
    "dropout",
)


class SwinAttention(Accelerated):
    """torchvision.models.swin_transformer.ShiftedWindowAttention on window_attention."""

    needs: ClassVar[tuple[str, ...]] = (*BOTH, "relative_position_bias_table")
    dropout_at = "attention_dropout"
    qkv: nn.Linear
    proj: nn.Linear
    num_heads: int
    window_size: list[int]
    shift_size: list[int]
    dropout: float
    relative_position_bias_table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.takes_library_path():
            return self.library.forward(self, x)
        return self._attend(x, self.qkv.bias, self.relative_position_bias_table)

    def _attend(self, x: Tensor, bias: Tensor | None, table: Tensor, **kind: Any) -> Tensor:
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        shift = shift_where_uncovered(x, self.window_size, self.shift_size)
        out = attend(qkv, bias, table, self.window_size, shift, self.attention_backend, **kind)
        return F.dropout(F.linear(out, self.proj.weight, self.proj.bias), self.dropout, self.training)


class SwinV2Attention(SwinAttention):
    """torchvision.models.swin_transformer.ShiftedWindowAttentionV2 on window_attention."""

    needs = (*BOTH, "cpb_mlp", "relative_coords_table", "logit_scale")
    cpb_mlp: nn.Module
    relative_coords_table: Tensor
    logit_scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.takes_library_path():
            return self.library.forward(self, x)
        bias: Tensor | None = self.qkv.bias
        if (
            bias is not None
        ):  # SwinV2 gives keys no bias; the numbers that this library keeps for one are not used
            query, key, value = bias.chunk(3)
            bias = torch.cat((query, torch.zeros_like(key), value))
        table = continuous_table(self.cpb_mlp, self.relative_coords_table, self.num_heads)
        return self._attend(x, bias, table, logit_scale=self.logit_scale.flatten())
