"""Queries of text: what a sample is called (word by word), and which words were hidden.

Letters: S texts, T tokens of a text, W the decoder's width, M latents, D their width, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers import Block, DecodingState, KeyValueCache, rotary_angles
from models.perceiver.config import PerceiverConfig


class TextDecoder(nn.Module):
    """Tokens read the latents of their sample, and each other: those before them (generation), or all (masked text).

    Logits come from the embedding's own weights; where the text encoder has the same width, from its embedding.
    """

    def __init__(self, config: PerceiverConfig, embedding: nn.Embedding) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        dim, self.head_dim = config.decoder_width, config.decoder_head_dim
        shared = embedding.embedding_dim == dim
        self.embedding = embedding if shared else nn.Embedding(config.vocabulary, dim)
        self.blocks = nn.ModuleList(
            Block(
                dim, config.decoder_head_dim, memory_dim=config.latent_width, layer_scale=config.layer_scale_init,
                cross_scale=config.cross_scale_init, dropout=config.dropout,
            )
            for _ in range(config.decoder_layers)
        )  # fmt: skip
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., W] of about unit variance."""
        return self.embedding(tokens) * self.embedding.embedding_dim**0.5

    def forward(self, tokens: Tensor, latents: Tensor, *, causal: bool, seen: Tensor | None = None) -> Tensor:
        """int64 [S, T], latents [S, M, D] -> [S, T, W]. seen bool [S, T]: not padding (where not causal)."""
        x = self.embed(tokens)
        rotary = rotary_angles(tokens.shape[1], self.head_dim, tokens.device)
        mask = None if causal else seen
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(
                    block, x, latents, rotary=rotary, causal=causal, key_mask=mask, use_reentrant=False
                )
            else:
                x = block(x, latents, rotary=rotary, causal=causal, key_mask=mask)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., V]."""
        return F.linear(x, self.embedding.weight)

    def start(self, latents: Tensor) -> DecodingState:
        """State for generating from latents [S, M, D]: their keys and values are computed once."""
        keys_values = [cast(Block, block).keys_values(latents) for block in self.blocks]
        return DecodingState([KeyValueCache() for _ in self.blocks], keys_values)

    def step(self, tokens: Tensor, state: DecodingState) -> Tensor:
        """The next token's logits [S, V] after the token int64 [S]; state moves on by one."""
        x = self.embed(tokens)[:, None]
        rotary = rotary_angles(1, self.head_dim, tokens.device, start=state.length)
        for block, cache, memory in zip(self.blocks, state.caches, state.memory, strict=True):
            x = block(x, memory, rotary=rotary, cache=cache)
        state.length += 1
        return self.logits(self.norm(x))[:, 0]
