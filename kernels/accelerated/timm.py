"""The Swin blocks of timm (checked with 1.0.31)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.accelerated.attend import attend, continuous_table, padded
from kernels.accelerated.base import Accelerated, plain

# One call each in a graph that is traced before the sizes of maps are known.
torch.fx.wrap("attend")
torch.fx.wrap("padded")
BOTH = (
    "_attn",
    "window_size",
    "shift_size",
    "attn.qkv.weight",
    "attn.num_heads",
    "attn.proj",
    "attn.proj_drop",
)


class SwinBlock(Accelerated):
    """timm.models.swin_transformer.SwinTransformerBlock on window_attention."""

    needs: ClassVar[tuple[str, ...]] = (
        *BOTH,
        "attn.qkv.bias",
        "attn.scale",
        "attn.relative_position_bias_table",
    )
    dropout_at = "attn.attn_drop.p"
    skipped = ("attn", "attn.softmax", "attn.attn_drop")
    attn: Any
    window_size: Any
    shift_size: Any

    def _attn(self, x: Tensor) -> Tensor:
        if self.takes_library_path():
            return self.library._attn(self, x)
        attn = self.attn
        return self._attend(*self._project(x), attn.relative_position_bias_table, scale=attn.scale)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor | None, Any]:
        """What the qkv layer makes of the map; what it makes of padding; and the map's size where it was padded before."""
        qkv = self.attn.qkv
        if plain(qkv):
            return qkv(x), qkv.bias, None
        return qkv(padded(x, self.window_size, self.shift_size, True)), None, (x.shape[1], x.shape[2])

    def _attend(self, qkv: Tensor, bias: Tensor | None, size: Any, table: Tensor, **kind: Any) -> Tensor:
        qkv = qkv.unflatten(-1, (3, self.attn.num_heads, -1))
        window, shift, backend = self.window_size, self.shift_size, self.attention_backend
        out = attend(qkv, bias, table, window, shift, backend, rolls_first=True, size=size, **kind)
        return self.attn.proj_drop(self.attn.proj(out))


class SwinV2Block(SwinBlock):
    """timm.models.swin_transformer_v2.SwinTransformerV2Block on window_attention."""

    needs = (*BOTH, "attn.q_bias", "attn.k_bias", "attn.v_bias", "attn.logit_scale", "attn.cpb_mlp",
             "attn.relative_coords_table", "attn.qkv_bias_separate")  # fmt: skip

    def _attn(self, x: Tensor) -> Tensor:
        if self.takes_library_path():
            return self.library._attn(self, x)
        attn, bias = self.attn, None
        if attn.q_bias is not None:
            bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        table = continuous_table(attn.cpb_mlp, attn.relative_coords_table, attn.num_heads)
        # timm calls its qkv layer, which may have a hook or an adapter, in these cases alone.
        size = None
        if bias is None or attn.qkv_bias_separate:
            qkv, _, size = self._project(x)
            qkv = qkv if bias is None else qkv + bias
        else:
            qkv = F.linear(x, attn.qkv.weight, bias)
        return self._attend(qkv, bias, size, table, logit_scale=attn.logit_scale.flatten())
