"""Text: token ids, a bidirectional encoder with rotary positions, tokens for the latents and an embedding for contrast.

Letters: S texts, N tokens of all of them, T of the longest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers import Block, rotary_angles
from models.perceiver.config import PerceiverConfig
from models.perceiver.pieces import Piece, Tokens, no_offsets, no_samples, padded, visible


class TextAdapter(nn.Module):
    """Token ids packed, int64 [N] -> a token per id."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.head_dim, self.longest = config.encoder_head_dim, config.text_length
        dim = config.text_width
        self.embedding = nn.Embedding(config.vocabulary, dim)
        self.blocks = nn.ModuleList(
            Block(dim, config.encoder_head_dim, layer_scale=config.layer_scale_init, dropout=config.dropout)
            for _ in range(config.text_layers)
        )
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.project = nn.Linear(dim, config.encoder_width, bias=False)
        self.kind = nn.Parameter(torch.empty(config.encoder_width))

    def empty(self, device: torch.device) -> Piece:
        """No text at all; see Adapter.empty."""
        return Piece(torch.empty(0, dtype=torch.long, device=device), no_samples(device), no_offsets(device))

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., D] of about unit variance (tied embeddings times sqrt(D))."""
        return self.embedding(tokens) * self.embedding.embedding_dim**0.5

    def read(self, piece: Piece) -> Tokens:
        """The encoder's own states, [S, T, text_width]."""
        lengths = piece.lengths
        if len(lengths) and int(lengths.max()) > self.longest:
            raise ValueError(
                f"a text of {int(lengths.max())} tokens; this model reads up to {self.longest} (text_length)"
            )
        tokens = padded(piece.data, lengths)
        seen = visible(lengths, tokens.shape[1])
        rotary = rotary_angles(tokens.shape[1], self.head_dim, tokens.device)
        x = self.embed(tokens)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, rotary=rotary, key_mask=seen, use_reentrant=False)
            else:
                x = block(x, rotary=rotary, key_mask=seen)
        return Tokens(self.norm(x), lengths)

    def inputs(self, states: Tokens) -> Tokens:
        """What the latents read of the states of `read`."""
        x = self.project(states.values)
        return Tokens(x + self.kind.to(x.dtype), states.lengths)

    def forward(self, piece: Piece) -> Tokens:
        return self.inputs(self.read(piece))
