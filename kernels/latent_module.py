"""Attention of latents over inputs as a module, for models that are written from scratch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.backend import Plan, resolve
from kernels.latent_attention.op import latent_attention

NAME = "LatentAttention"
TRUNCATED_STD = 0.8796256610342398  # of a standard normal distribution that is cut at 2


class LatentAttention(nn.Module):
    """Multi-head attention of latents over inputs: [B, M, dim], [B, N, input_dim] -> [B, M, out_dim], any M, N.

    The attention of Perceiver (arXiv:2103.03206) and Perceiver IO (arXiv:2107.14795): in its encoder latents attend
    to inputs, in its decoder output queries attend to latents, and without inputs it is self-attention. There is no
    norm, MLP or residual in it. Parameters: the linear layers q, k, v and proj.

    dim: of the latents. heads: of the queries. input_dim: of the inputs; default dim.
    kv_heads: of keys and values, a divisor of heads: query head i reads key head i // (heads / kv_heads), as in
        grouped-query attention (arXiv:2305.13245); default heads.
    qk_dim: of each head's queries and keys; default dim / heads. v_dim: of each head's values; default qk_dim.
    out_dim: of the result; default dim.
    bias: whether the four layers have one.
    dropout_p: share of the attention weights that is dropped, in training mode alone; the seed is drawn from torch's
        default generator.
    backend: as for `latent_attention`. "sdpa" has no dropout and cannot train with it.

    Raises ValueError (values, shapes), TypeError (dtypes that `latent_attention` refuses), BackendError (a backend
    that this version does not have, or that cannot run the call).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        input_dim: int | None = None,
        kv_heads: int | None = None,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        out_dim: int | None = None,
        bias: bool = True,
        dropout_p: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.dropout_p, self.backend = dim, heads, dropout_p, backend
        self.input_dim = dim if input_dim is None else input_dim
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.out_dim = dim if out_dim is None else out_dim
        self._check(divides=qk_dim is None)
        self.qk_dim = dim // heads if qk_dim is None else qk_dim
        self.v_dim = self.qk_dim if v_dim is None else v_dim
        if min(self.qk_dim, self.v_dim) < 1:
            raise ValueError(f"{NAME}: qk_dim and v_dim must be at least 1, got {self.qk_dim}, {self.v_dim}")
        kind: Any = {"bias": bias, "device": device, "dtype": dtype}
        self.q = nn.Linear(dim, heads * self.qk_dim, **kind)
        self.k = nn.Linear(self.input_dim, self.kv_heads * self.qk_dim, **kind)
        self.v = nn.Linear(self.input_dim, self.kv_heads * self.v_dim, **kind)
        self.proj = nn.Linear(heads * self.v_dim, self.out_dim, **kind)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """All initial values, as in Perceiver's code (google-deepmind/deepmind-research, perceiver.py).

        Weights: normal, cut at two standard deviations, of variance 1 / fan_in. Biases: 0.
        """
        for layer in (self.q, self.k, self.v, self.proj):
            std = layer.in_features**-0.5 / TRUNCATED_STD
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        latents: Tensor,
        inputs: Tensor | None = None,
        *,
        key_lengths: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """latents [B, M, dim], inputs [B, N, input_dim] -> [B, M, out_dim].

        inputs: packed, [total, input_dim], with cu_seqlens_k; None for the latents themselves.
        Visible inputs, at most one of: key_lengths int [B], the first so many; cu_seqlens_k int [B + 1], sample b
        has rows cu[b] to cu[b + 1]; key_mask bool [B, N], True = visible. Hidden inputs must be finite. Where
        nothing is visible, the result is proj's bias.
        """
        if inputs is None and cu_seqlens_k is None:
            inputs = latents
        self._check_call(latents, inputs, cu_seqlens_k)
        assert inputs is not None
        out = latent_attention(
            self.q(latents).unflatten(-1, (self.heads, self.qk_dim)),
            self.k(inputs).unflatten(-1, (self.kv_heads, self.qk_dim)),
            self.v(inputs).unflatten(-1, (self.kv_heads, self.v_dim)),
            key_lengths=key_lengths,
            cu_seqlens_k=cu_seqlens_k,
            key_mask=key_mask,
            dropout_p=self.dropout_p if self.training else 0.0,
            backend=self.backend,
        )
        return self.proj(out.flatten(-2))

    def extra_repr(self) -> str:
        """What print(model) shows of the settings."""
        return (
            f"{self.dim}, heads={self.heads}, input_dim={self.input_dim}, kv_heads={self.kv_heads}, "
            f"qk_dim={self.qk_dim}, v_dim={self.v_dim}, out_dim={self.out_dim}, dropout_p={self.dropout_p}, "
            f"backend={self.backend!r}"
        )

    def _check(self, divides: bool) -> None:
        """The constructor's arguments, or an error that says what came and what is supported."""
        if min(self.dim, self.input_dim, self.out_dim) < 1:
            raise ValueError(
                f"{NAME}: dim, input_dim and out_dim must be at least 1, got {self.dim}, {self.input_dim}, "
                f"{self.out_dim}"
            )
        if self.heads < 1 or self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"{NAME}: heads must be a multiple of kv_heads, got heads {self.heads}, kv_heads {self.kv_heads}"
            )
        if divides and self.dim % self.heads:
            raise ValueError(
                f"{NAME}: dim must be a multiple of heads where qk_dim is not given, got dim {self.dim}, "
                f"heads {self.heads}"
            )
        if not 0 <= self.dropout_p < 1:
            raise ValueError(f"{NAME}: dropout_p must be in [0, 1), got {self.dropout_p}")
        resolve(NAME, self.backend, Plan("auto", "", {}))  # raises for a backend that there is not

    def _check_call(self, latents: Tensor, inputs: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
        """What `latent_attention` would say of projected tensors, said of those that came."""
        if latents.dim() != 3 or latents.shape[-1] != self.dim:
            raise ValueError(f"{NAME}: latents must be [B, M, {self.dim}], got {list(latents.shape)}")
        if inputs is None:
            raise ValueError(f"{NAME}: cu_seqlens_k is for packed inputs, got no inputs")
        packed = cu_seqlens_k is not None
        if inputs.dim() != (2 if packed else 3) or inputs.shape[-1] != self.input_dim:
            shape = f"[total, {self.input_dim}] with" if packed else f"[B, N, {self.input_dim}] without"
            raise ValueError(f"{NAME}: inputs must be {shape} cu_seqlens_k, got {list(inputs.shape)}")
        if not packed and inputs.shape[0] != latents.shape[0]:
            raise ValueError(
                f"{NAME}: latents and inputs must agree in batch, got latents {list(latents.shape)}, "
                f"inputs {list(inputs.shape)}"
            )
