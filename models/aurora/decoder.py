"""The text stack: one set of weights in four modes.

    text embedding    unimodal layers only
    captioning        unimodal, then crossmodal layers; every token sees those before it (CoCa,
    arXiv:2205.01917)
    masked language   the same layers, every token sees all
    object queries    [text; queries] through the crossmodal layers, every token sees all

Shapes: B batch, T tokens of text, D width, M tokens of the image memory, V vocabulary, L layers.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.aurora.config import AuroraConfig
from models.layers import Block, DecodingState, KeyValueCache, RMSNorm, Rotary, rotary_angles
from models.tokens import PAD


class TextDecoder(nn.Module):
    """Token embedding, unimodal layers, crossmodal layers; logits use the embedding's own weights."""

    def __init__(self, config: AuroraConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        dim, head_dim = config.decoder_width, config.decoder_head_dim
        self.head_dim = head_dim
        self.embedding = nn.Embedding(config.vocabulary, dim)
        self.queries = nn.Embedding(config.queries, dim)

        def layer(memory_dim: int | None) -> Block:
            return Block(
                dim,
                head_dim,
                memory_dim=memory_dim,
                layer_scale=config.layer_scale_init,
                cross_scale=config.cross_scale_init,
                dropout=config.decoder_dropout,
            )

        self.unimodal = nn.ModuleList(layer(None) for _ in range(config.unimodal_layers))
        self.unimodal_norm = RMSNorm(dim, eps=1e-6)
        self.crossmodal = nn.ModuleList(layer(dim) for _ in range(config.crossmodal_layers))
        self.norm = RMSNorm(dim, eps=1e-6)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., D] of about unit variance (arXiv:1706.03762, section 3.4: tied embeddings
        times sqrt(D))."""
        return self.embedding(tokens) * self.embedding.embedding_dim**0.5

    def read_text(self, tokens: Tensor, *, causal: bool) -> Tensor:
        """Unimodal layers: int64 [B, T] -> [B, T, D]. Padding is never seen (causal: it only follows)."""
        x = self.embed(tokens)
        rotary = rotary_angles(tokens.shape[1], self.head_dim, tokens.device)
        mask = None if causal else tokens != PAD
        for block in self.unimodal:
            x = self.run(block, x, None, rotary, causal, mask)
        return self.unimodal_norm(x)

    def read_image(
        self, x: Tensor, memory: Tensor, *, causal: bool, key_mask: Tensor | None = None
    ) -> Tensor:
        """Crossmodal layers: x [B, T, D] over memory [B, M, D] -> [B, T, D]; key_mask bool [B, T], True =
        visible."""
        rotary = rotary_angles(x.shape[1], self.head_dim, x.device)
        for block in self.crossmodal:
            x = self.run(block, x, memory, rotary, causal, key_mask)
        return self.norm(x)

    def run(
        self,
        block: nn.Module,
        x: Tensor,
        memory: Tensor | None,
        rotary: Rotary,
        causal: bool,
        mask: Tensor | None,
    ) -> Tensor:
        """One layer, with activation checkpointing where that is on."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(
                block, x, memory, rotary=rotary, causal=causal, key_mask=mask, use_reentrant=False
            )
        return block(x, memory, rotary=rotary, causal=causal, key_mask=mask)

    def answer_queries(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """The learned queries after reading text [B, T] and image memory [B, M, D] -> [B, queries, D]."""
        text = self.read_text(tokens, causal=False)
        queries = self.queries.weight * self.queries.embedding_dim**0.5
        queries = queries[None].expand(tokens.shape[0], -1, -1).to(text.dtype)
        visible = F.pad(tokens != PAD, (0, queries.shape[1]), value=True)
        x = self.read_image(torch.cat((text, queries), dim=1), memory, causal=False, key_mask=visible)
        return x[:, tokens.shape[1] :]

    def logits(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return F.linear(x, self.embedding.weight)

    def start(self, memory: Tensor) -> DecodingState:
        """State for generating from memory [B, M, D]: the crossmodal keys and values are computed once."""
        layers = len(self.unimodal) + len(self.crossmodal)
        keys_values = [cast(Block, block).keys_values(memory) for block in self.crossmodal]
        return DecodingState([KeyValueCache() for _ in range(layers)], keys_values)

    def step(self, tokens: Tensor, state: DecodingState) -> Tensor:
        """The next token's logits [B, V] after the token int64 [B]; state moves on by one."""
        x = self.embed(tokens)[:, None]
        rotary = rotary_angles(1, self.head_dim, tokens.device, start=state.length)
        for block, cache in zip(self.unimodal, state.caches, strict=False):
            x = block(x, rotary=rotary, cache=cache)
        x = self.unimodal_norm(x)
        for block, cache, memory in zip(
            self.crossmodal, state.caches[len(self.unimodal) :], state.memory, strict=True
        ):
            x = block(x, memory, rotary=rotary, cache=cache)
        state.length += 1
        return self.logits(self.norm(x))[:, 0]
