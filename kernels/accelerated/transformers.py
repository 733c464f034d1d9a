"""The Swin layers of transformers (checked with 5.24): Swin, Swinv2, and those of Donut, CLAP, MaskFormer, Swin2SR.

They take tokens [B, H * W, C] and the map's (H, W). Attention weights, which some can return, are never made here;
a call that asks for them takes the library's own path.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.accelerated.attend import attend, continuous_table, padded
from kernels.accelerated.base import Accelerated, plain

WEIGHTS_ASKED = "a call asked for attention weights (output_attentions), which the kernel does not make"
COMMON = ("window_size", "shift_size", "layernorm_before", "layernorm_after", "drop_path")
OLDER = (*COMMON, "intermediate", "output", "attention.output", "attention.self.query", "attention.self.key",
         "attention.self.value", "attention.self.num_attention_heads")  # fmt: skip


class Layer(Accelerated):
    """The attributes that the layers of all these models have."""

    attention: Any
    layernorm_before: Any
    layernorm_after: Any
    drop_path: Any
    dropout: Any  # SwinLayer has this and mlp, the older layers have intermediate and output
    mlp: Any
    intermediate: Any
    output: Any
    set_shift_and_window_size: Any  # some layers cut their window to the map at every call; it stays cut


class SwinLayer(Layer):
    """transformers' SwinLayer on window_attention. Returns (hidden_states, None): there are no attention weights."""

    needs = (*COMMON, "dropout", "mlp", "set_shift_and_window_size", "attention.q_proj", "attention.k_proj",
             "attention.v_proj", "attention.o_proj", "attention.num_attention_heads", "attention.scaling",
             "attention.config", "attention.relative_position_bias.relative_position_bias_table")  # fmt: skip
    dropout_at = "attention.attention_dropout"
    skipped = ("attention", "attention.relative_position_bias")

    def forward(
        self, hidden_states: Tensor, input_dimensions: Any, always_partition: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        default = getattr(self.attention.config, "output_attentions", False)
        if self.takes_library_path(WEIGHTS_ASKED if kwargs.get("output_attentions", default) else None):
            return self.library.forward(self, hidden_states, input_dimensions, always_partition, **kwargs)
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        attention = self.attention
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        table = attention.relative_position_bias.relative_position_bias_table
        heads = attention.num_attention_heads
        x = self.layernorm_before(hidden_states).unflatten(1, input_dimensions)
        x = attention.o_proj(_attend(self, x, projections, heads, table, scale=attention.scaling))
        x = hidden_states + self.drop_path(self.dropout(x.flatten(1, 2)))
        return x + self.dropout(self.mlp(self.layernorm_after(x))), None


class OlderSwinLayer(Layer):
    """transformers' DonutSwinLayer, ClapAudioLayer and MaskFormerSwinLayer on window_attention."""

    needs = (*OLDER, "attention.self.relative_position_bias_table")
    dropout_at = "attention.self.dropout.p"
    skipped = ("attention", "attention.self", "attention.self.dropout")

    def forward(
        self,
        hidden_states: Tensor,
        input_dimensions: Any,
        output_attentions: bool = False,
        *rest: Any,
        **named: Any,
    ) -> tuple[Tensor, ...]:
        if self.takes_library_path(WEIGHTS_ASKED if output_attentions else None):
            return self.library.forward(
                self, hidden_states, input_dimensions, output_attentions, *rest, **named
            )
        self._fit(input_dimensions, *rest, **named)
        x = self.layernorm_before(hidden_states).unflatten(1, input_dimensions)
        x = hidden_states + self.drop_path(_older_attention(self, x).flatten(1, 2))
        return (x + self.output(self.intermediate(self.layernorm_after(x))),)

    def _fit(self, input_dimensions: Any, always_partition: bool = False) -> None:
        """Cut the window to the map, as two of the three libraries' layers do at every call."""
        if hasattr(self, "set_shift_and_window_size") and not always_partition:
            self.set_shift_and_window_size(input_dimensions)


class Swinv2Layer(Layer):
    """transformers' Swinv2Layer and Swin2SRLayer on window_attention."""

    needs = (*OLDER, "attention.self.continuous_position_bias_mlp", "attention.self.relative_coords_table",
             "attention.self.logit_scale")  # fmt: skip
    dropout_at = "attention.self.dropout.p"
    skipped = ("attention", "attention.self", "attention.self.dropout")

    def forward(
        self, hidden_states: Tensor, input_dimensions: Any, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        if self.takes_library_path(WEIGHTS_ASKED if output_attentions else None):
            return self.library.forward(self, hidden_states, input_dimensions, output_attentions)
        x = _older_attention(self, hidden_states.unflatten(1, input_dimensions)).flatten(1, 2)
        x = hidden_states + self.drop_path(self.layernorm_before(x))
        return (x + self.drop_path(self.layernorm_after(self.output(self.intermediate(x)))),)


def _older_attention(layer: Any, x: Tensor) -> Tensor:
    """x [B, H, W, C] -> [B, H, W, C], with the projections of `attention.self` and `attention.output`."""
    inner, heads = layer.attention.self, layer.attention.self.num_attention_heads
    projections = (inner.query, inner.key, inner.value)
    if hasattr(inner, "logit_scale"):
        table = continuous_table(inner.continuous_position_bias_mlp, inner.relative_coords_table, heads)
        out = _attend(layer, x, projections, heads, table, logit_scale=inner.logit_scale.flatten())
    else:
        out = _attend(layer, x, projections, heads, inner.relative_position_bias_table)
    return layer.attention.output(out, x)


def _attend(
    layer: Any, x: Tensor, projections: tuple[Any, Any, Any], heads: int, table: Tensor, **kind: Any
) -> Tensor:
    """x [B, H, W, C] -> [B, H, W, C], not yet projected back."""
    window, shift = (layer.window_size,) * 2, (layer.shift_size,) * 2
    bias = size = None
    if all(plain(projection) for projection in projections):
        biases = [projection.bias for projection in projections]
        if any(part is not None for part in biases):
            zeros = x.new_zeros(x.shape[-1])  # SwinV2's keys have no bias
            bias = torch.cat([zeros if part is None else part for part in biases])
        # One product, whose result is packed as the kernel reads it.
        weight = torch.cat([projection.weight for projection in projections])
        qkv = F.linear(x, weight, bias).unflatten(-1, (3, heads, -1))
    else:  # adapters, quantised layers, hooks: each projection is called
        x, size = padded(x, window, shift), x.shape[1:3]
        parts = [projection(x) for projection in projections]
        qkv = torch.stack(parts, dim=-2).unflatten(-1, (heads, -1))
    return attend(qkv, bias, table, window, shift, layer.attention_backend, size=size, **kind)
