"""The latent array: it reads the inputs, and thinks.

    latents [M, D] --read(inputs)--> --blocks--> [read again --> blocks] --> norm --> [B, M, D]

Letters: B samples, M latents, D their width, N input tokens of all samples, E theirs, h heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import latent_attention
from models.layers import Block, CrossAttention, SwiGLU
from models.perceiver.classic import ClassicBlock
from models.perceiver.config import PerceiverConfig


class LatentTransformer(nn.Module):
    """Packed inputs [N, E] of B samples -> latents [B, M, D]. Latents are a learned set without order: no rotary."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        dim, layers, classic = config.latent_width, config.latent_layers, config.classic
        self.latents = nn.Parameter(torch.empty(config.latents, dim))
        self.repeats = 1
        self.norm: nn.Module = nn.RMSNorm(dim, eps=1e-6)
        if classic is None:
            self.reads = nn.ModuleList(InputRead(config) for _ in range(config.input_reads))
            self.blocks = nn.ModuleList(
                Block(dim, config.latent_head_dim, layer_scale=config.layer_scale_init) for _ in range(layers)
            )
        else:
            self.norm, self.repeats = nn.Identity(), classic.repeats
            self.reads = nn.ModuleList(
                ClassicBlock(
                    dim, classic.read_heads, memory_dim=config.encoder_width,
                    qk_width=classic.read_qk_width or classic.qk_width, v_width=classic.v_width,
                    widening=classic.read_widening, query_residual=classic.query_residual,
                )
                for _ in range(config.input_reads)
            )  # fmt: skip
            self.blocks = nn.ModuleList(
                ClassicBlock(
                    dim, classic.heads, qk_width=classic.qk_width, v_width=classic.v_width, widening=classic.widening
                )
                for _ in range(layers)
            )  # fmt: skip
        self.read_before = {i * layers // config.input_reads: i for i in range(config.input_reads)}

    def forward(self, inputs: Tensor, offsets: Tensor | None = None) -> Tensor:
        """inputs [N, E], offsets int [B+1]: sample b has rows offsets[b] to offsets[b+1], none if they are equal. Without
        offsets inputs are [B, N, E]: all samples have as many, and nothing depends on what offsets hold."""
        x = self.latents[None]  # the same for all samples until they have read: its queries are computed once
        if not self.blocks:
            x = self.run(self.reads[0], x, inputs, offsets)
        for turn in range(self.repeats):
            for i, block in enumerate(self.blocks):
                if turn == 0 and i in self.read_before:
                    x = self.run(self.reads[self.read_before[i]], x, inputs, offsets)
                x = self.run(block, x)
        return self.norm(x)

    def run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        """One block or read, with activation checkpointing where that is on."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class InputRead(nn.Module):
    """Cross-attention of the latents over the packed inputs of their sample, and a SwiGLU. Costs as much as there are
    inputs: nothing is padded to the longest sample on a GPU."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        dim = config.latent_width
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.memory_norm = nn.RMSNorm(config.encoder_width, eps=1e-6)
        self.attention = CrossAttention(dim, config.latent_head_dim, config.encoder_width)
        self.scale = nn.Parameter(torch.full((dim,), config.cross_scale_init))
        self.feed_norm = nn.RMSNorm(dim, eps=1e-6)
        self.feed = SwiGLU(dim)
        self.feed_scale = nn.Parameter(torch.full((dim,), config.layer_scale_init))

    def forward(self, x: Tensor, inputs: Tensor, offsets: Tensor | None = None) -> Tensor:
        """x [B, M, D], or [1, M, D] for all samples; inputs [N, E], offsets int [B+1], or inputs [B, N, E] -> [B, M, D]."""
        read = self.attention
        q = read.q_norm(read.q(self.norm(x)).unflatten(-1, (read.heads, read.head_dim)))
        if offsets is None:
            k, v = read.keys_values(self.memory_norm(inputs))  # [B, N, h, d]
            y = latent_attention(q.expand(inputs.shape[0], -1, -1, -1), k.to(q.dtype), v.to(q.dtype))
        else:
            k, v = read.keys_values(self.memory_norm(inputs)[None])  # [1, N, h, d]
            k, v = k[0].to(q.dtype), v[0].to(q.dtype)
            y = latent_attention(q.expand(len(offsets) - 1, -1, -1, -1), k, v, cu_seqlens_k=offsets)
        x = x + self.scale * read.out(y.flatten(-2))
        return x + self.feed_scale * self.feed(self.feed_norm(x))
