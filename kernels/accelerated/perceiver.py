"""The attention of transformers' Perceiver (checked with 5.24): encoder, latents among themselves, decoder.

The library adds a mask to the logits. One that hides keys, as PerceiverModel makes it of an attention_mask, becomes
the kernel's key_mask. Any other takes the library's own path, and so does one that leaves a sample nothing to see:
the library then attends to everything alike, the kernel gives 0. To tell them apart a mask's values are read, which
waits for the device, and which compiled code cannot do: there, a call with a mask takes the library's own path.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.accelerated.base import Accelerated
from kernels.accelerated.transformers import WEIGHTS_ASKED
from kernels.latent_attention.op import latent_attention

HIDES = -1e4  # e**-10000 is 0 in every dtype, unless logits of one query differ nearly that much
UNKNOWN = "a call gave arguments (head_mask or others) that the kernel does not have"
OTHER_MASK = "a call's attention mask does more than hide keys"
COMPILED = "a compiled call has an attention mask, whose values cannot be read there"


class PerceiverSelfAttention(Accelerated):
    """transformers' PerceiverSelfAttention, which is its cross-attention too, on latent_attention."""

    needs: ClassVar[tuple[str, ...]] = ("layernorm1", "layernorm2", "query", "key", "value", "num_heads",
                                        "qk_channels_per_head", "v_channels_per_head")  # fmt: skip
    dropout_at = "dropout.p"
    dropout_why = "the kernel would drop others than the library"
    skipped = ("dropout",)
    function = "latent_attention"
    unmade = "attention weights"
    layernorm1: Any
    layernorm2: Any
    query: Any
    key: Any
    value: Any
    num_heads: int
    qk_channels_per_head: int
    v_channels_per_head: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inputs: Tensor | None = None,
        inputs_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        *rest: Any,
        **named: Any,
    ) -> tuple[Tensor, ...]:
        asked, key_mask = None, None
        if rest or any(value is not None for value in named.values()):
            asked = UNKNOWN
        elif output_attentions:
            asked = WEIGHTS_ASKED
        else:
            # As the library has it: cross-attention does not look at attention_mask.
            asked, key_mask = _key_mask(
                attention_mask if inputs is None else inputs_mask, hidden_states, inputs
            )
        if self.takes_library_path(asked):
            if rest:  # another order of arguments, as older versions have it
                placed = (attention_mask, inputs, inputs_mask, output_attentions, *rest)
                return self.library.forward(self, hidden_states, *placed, **named)
            named |= {"attention_mask": attention_mask, "inputs": inputs, "inputs_mask": inputs_mask}
            return self.library.forward(self, hidden_states, output_attentions=output_attentions, **named)
        latents = self.layernorm1(hidden_states)
        inputs = self.layernorm2(inputs)
        source = latents if inputs is None else inputs
        out = latent_attention(
            self.query(latents).unflatten(-1, (self.num_heads, self.qk_channels_per_head)),
            self.key(source).unflatten(-1, (self.num_heads, self.qk_channels_per_head)),
            self.value(source).unflatten(-1, (self.num_heads, self.v_channels_per_head)),
            key_mask=key_mask,
            backend=self.attention_backend,
        )
        return (out.flatten(-2),)


def _key_mask(
    mask: Tensor | None, latents: Tensor, inputs: Tensor | None
) -> tuple[str | None, Tensor | None]:
    """(why the library's path is needed, key_mask bool [B, N]) of what the library adds to logits [B, h, M, N]."""
    if mask is None:
        return None, None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return COMPILED, None
    batch, keys = latents.shape[0], (latents if inputs is None else inputs).shape[1]
    if (
        mask.dim() != 4
        or mask.shape[0] not in (1, batch)
        or mask.shape[1] != 1
        or mask.shape[2] not in (1, latents.shape[1])
        or mask.shape[3] != keys
        or not mask.is_floating_point()
        or mask.requires_grad
    ):
        return OTHER_MASK, None
    seen, hidden = mask == 0, mask <= HIDES
    visible = seen[:, 0, :1]  # [B or 1, 1, N]; a mask without queries has no row, and nothing to hide
    plain = (seen | hidden).all() & (seen[:, 0] == visible).all() & visible.any(-1).all()
    if not plain or visible.shape[1] == 0:
        return OTHER_MASK, None
    return None, visible[:, 0].expand(batch, keys)
