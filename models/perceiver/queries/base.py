"""An output is a query: learned rows, one per wanted value, read the latents (Perceiver IO, arXiv:2107.14795).

Letters: B samples, M latents, D their width, Q queries, W their width, F numbers of an output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers import Block
from models.perceiver.classic import ClassicBlock
from models.perceiver.config import PerceiverConfig


class QueryDecoder(nn.Module):
    """Latents [B, M, D] -> [B, Q, F]. A new task is a subclass, or an object of this class, that is put into
    `PerceiverIO.queries` under its name."""

    def __init__(self, config: PerceiverConfig, queries: int, out: int) -> None:
        """queries: Q, how many rows are wanted. out: F, numbers in each."""
        super().__init__()
        self.gradient_checkpointing = False
        dim, classic = config.query_width, config.classic
        self.queries = nn.Parameter(torch.empty(queries, dim))
        if classic is None:
            self.blocks = nn.ModuleList(
                Block(
                    dim, min(64, dim), memory_dim=config.latent_width, self_attention=False,
                    layer_scale=config.layer_scale_init, cross_scale=config.cross_scale_init,
                )
                for _ in range(config.query_layers)
            )  # fmt: skip
        else:
            self.blocks = nn.ModuleList(
                ClassicBlock(
                    dim, classic.decoder_heads, memory_dim=config.latent_width,
                    qk_width=classic.decoder_qk_width or config.latent_width, widening=classic.decoder_widening,
                    query_residual=classic.decoder_query_residual,
                )
                for _ in range(config.query_layers)
            )  # fmt: skip
        self.norm = nn.RMSNorm(dim, eps=1e-6) if classic is None else nn.Identity()
        self.out = nn.Linear(dim, out)

    def forward(self, latents: Tensor) -> Tensor:
        """All queries: [B, M, D] -> [B, Q, F]."""
        x = self.queries.expand(latents.shape[0], -1, -1)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, latents, use_reentrant=False)
            else:
                x = block(x, latents)
        return self.out(self.norm(x))
