"""Whole layers, as people have them in their models: a SwinV2 block, and Perceiver's cross-attention.

The same weights in every library's own layer, so the same numbers must come out; the clock covers everything the
layer does, projections and data movement too.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import work
from bench.measure import random_like
from bench.peers.autocast import Autocast, wide
from bench.peers.window import WindowCase
from bench.subject import TRAINING, Absent, Function, Peer, Subject
from kernels import latent_attention
from models import AURORA_SIZES
from models.aurora.convert import load_block
from models.aurora.encoder import SwinBlock


@dataclass(frozen=True)
class BlockCase(WindowCase):
    """One SwinV2 block on the map of a WindowCase; the feed-forward layer is 4x wide, GELU."""

    @property
    def dim(self) -> int:
        """Channels."""
        return self.heads * self.head_dim

    def inputs(self, device: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        """x [B, H, W, C], fp32: half types come by autocast, as in training."""
        shape = (self.batch, self.height, self.width, self.dim)
        return {"x": random_like(torch.empty(shape, device=device, dtype=wide(dtype)), seed)}

    def work(self, mode: str, dtype: torch.dtype) -> work.Work:
        """See work.swin_block; what crosses the bus has the dtype of inputs and weights."""
        tokens, itemsize = self.batch * self.height * self.width, wide(dtype).itemsize
        backward = mode == TRAINING
        return work.swin_block(tokens, self.dim, self.slots, 4 * self.dim, itemsize, backward=backward)


@cache
def _timm_block(case: BlockCase) -> nn.Module:
    """timm's block with random weights, fp32 on the CPU: the weights that all take."""
    try:
        from timm.models.swin_transformer_v2 import SwinTransformerV2Block
    except ImportError as error:
        raise Absent(f"timm is not installed ({error})") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = SwinTransformerV2Block(
            case.dim, (case.height, case.width), case.heads, window_size=case.window, shift_size=case.shift
        )
        for parameter in block.parameters():  # biases start at 0 and norms at 1: make all of them matter
            parameter.data += 0.02 * torch.randn_like(parameter)
    return block.requires_grad_(True)


def _timm(case: BlockCase, device: str, dtype: torch.dtype) -> Function:
    return Autocast(copy.deepcopy(_timm_block(case)), device, dtype)


def _aurora(case: BlockCase, device: str, dtype: torch.dtype) -> Function:
    config = replace(
        AURORA_SIZES["tiny"], head_dim=case.head_dim, width=case.dim, mlp="gelu", window_padding="zero"
    )
    block = SwinBlock(config, case.dim, case.window, case.window, case.shift, 0.0)
    load_block(block, _timm_block(case).state_dict())
    return Autocast(block, device, dtype)


class _Transformers(nn.Module):
    """transformers' Swinv2Layer on a map instead of a sequence."""

    def __init__(self, layer: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.layer, self.size = layer, (height, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1, 2), self.size)[0].view_as(x)


def _transformers(case: BlockCase, device: str, dtype: torch.dtype) -> Function:
    try:
        from transformers import Swinv2Config
        from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer
    except ImportError as error:
        raise Absent(f"transformers is not installed ({error})") from None
    config = Swinv2Config(window_size=case.window, qkv_bias=True, hidden_act="gelu", layer_norm_eps=1e-5)
    layer = Swinv2Layer(config, case.dim, (case.height, case.width), case.heads, shift_size=case.shift)
    weights = _timm_block(case).state_dict()
    q, k, v = weights["attn.qkv.weight"].chunk(3)
    attention, dense = "attention.self.", "attention.output.dense."
    layer.load_state_dict({
        attention + "query.weight": q, attention + "key.weight": k, attention + "value.weight": v,
        attention + "query.bias": weights["attn.q_bias"], attention + "value.bias": weights["attn.v_bias"],
        attention + "logit_scale": weights["attn.logit_scale"],
        attention + "continuous_position_bias_mlp.0.weight": weights["attn.cpb_mlp.0.weight"],
        attention + "continuous_position_bias_mlp.0.bias": weights["attn.cpb_mlp.0.bias"],
        attention + "continuous_position_bias_mlp.2.weight": weights["attn.cpb_mlp.2.weight"],
        dense + "weight": weights["attn.proj.weight"], dense + "bias": weights["attn.proj.bias"],
        "layernorm_before.weight": weights["norm1.weight"], "layernorm_before.bias": weights["norm1.bias"],
        "layernorm_after.weight": weights["norm2.weight"], "layernorm_after.bias": weights["norm2.bias"],
        "intermediate.dense.weight": weights["mlp.fc1.weight"], "intermediate.dense.bias": weights["mlp.fc1.bias"],
        "output.dense.weight": weights["mlp.fc2.weight"], "output.dense.bias": weights["mlp.fc2.bias"],
    })  # fmt: skip
    return Autocast(_Transformers(layer.eval(), case.height, case.width), device, dtype)


SWIN_BLOCK = Subject(
    "swin_block",
    (Peer("aurora", _aurora, ours=True), Peer("timm", _timm), Peer("transformers", _transformers)),
    exact="timm",
    plain=("timm",),
    depth=2.0,
)


@dataclass(frozen=True)
class CrossCase:
    """Perceiver's cross-attention: norms, projections of q, k, v, attention, output projection, residual."""

    name: str
    batch: int
    queries: int
    keys: int
    q_dim: int
    kv_dim: int
    heads: int

    @property
    def shape(self) -> str:
        """For readers."""
        return (
            f"{self.batch} x {self.queries} latents of {self.q_dim} over {self.keys:,} inputs of {self.kv_dim}, "
            f"{self.heads} heads"
        )

    def inputs(self, device: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        """latents [B, M, Dq] and inputs [B, N, Dkv], fp32: half types come by autocast, as in training."""
        latents = torch.empty(self.batch, self.queries, self.q_dim, device=device, dtype=wide(dtype))
        inputs = torch.empty(self.batch, self.keys, self.kv_dim, device=device, dtype=wide(dtype))
        return {"latents": random_like(latents, 2 * seed), "inputs": random_like(inputs, 2 * seed + 1)}

    def work(self, mode: str, dtype: torch.dtype) -> work.Work:
        """See work.cross_attention_layer; what crosses the bus has the dtype of inputs and weights."""
        return work.cross_attention_layer(
            self.keys, self.queries, self.batch, self.q_dim, self.kv_dim, self.q_dim, wide(dtype).itemsize,
            backward=mode == TRAINING,
        )  # fmt: skip


class _Cross(nn.Module):
    """Perceiver's cross-attention over `attend(q, k, v)`, [B, ., h, d] each: what a user of the kernels writes."""

    def __init__(self, case: CrossCase, attend: Any) -> None:
        super().__init__()
        self.heads, self.attend = case.heads, attend
        self.q_norm, self.kv_norm = nn.LayerNorm(case.q_dim), nn.LayerNorm(case.kv_dim)
        self.q, self.out = nn.Linear(case.q_dim, case.q_dim), nn.Linear(case.q_dim, case.q_dim)
        self.k, self.v = nn.Linear(case.kv_dim, case.q_dim), nn.Linear(case.kv_dim, case.q_dim)

    def forward(self, latents: Tensor, inputs: Tensor) -> Tensor:
        kv = self.kv_norm(inputs)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1))
            for part in (self.q(self.q_norm(latents)), self.k(kv), self.v(kv))
        )
        return latents + self.out(self.attend(q, k, v).flatten(2))


@cache
def _cross_weights(case: CrossCase) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = _Cross(case, None)
        for parameter in layer.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return layer.state_dict()


def _textbook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _cross(name: str, attend: Any, *, ours: bool = False) -> Peer:
    def build(case: CrossCase, device: str, dtype: torch.dtype) -> Function:
        layer = _Cross(case, attend)
        layer.load_state_dict(_cross_weights(case))
        return Autocast(layer, device, dtype)

    return Peer(name, build, ours=ours)


class _Perceiver(nn.Module):
    """transformers' PerceiverAttention with positional arguments."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, latents: Tensor, inputs: Tensor) -> Tensor:
        return self.layer(latents, inputs=inputs)[0]


def _perceiver(case: CrossCase, device: str, dtype: torch.dtype) -> Function:
    try:
        from transformers import PerceiverConfig
        from transformers.models.perceiver.modeling_perceiver import PerceiverAttention
    except ImportError as error:
        raise Absent(f"transformers is not installed ({error})") from None
    config = PerceiverConfig(attention_probs_dropout_prob=0.0, cross_attention_shape_for_attention="q")
    layer = PerceiverAttention(
        config,
        is_cross_attention=True,
        num_heads=case.heads,
        q_dim=case.q_dim,
        kv_dim=case.kv_dim,
        v_channels=case.q_dim,
    )
    names = {
        "q_norm": "self.layernorm1", "kv_norm": "self.layernorm2", "q": "self.query", "k": "self.key",
        "v": "self.value", "out": "output.dense",
    }  # fmt: skip
    weights = {}
    for name, tensor in _cross_weights(case).items():
        part, kind = name.rsplit(".", 1)
        weights[f"{names[part]}.{kind}"] = tensor
    layer.load_state_dict(weights)
    return Autocast(_Perceiver(layer.eval()), device, dtype)


PERCEIVER_CROSS_ATTENTION = Subject(
    "perceiver_cross_attention",
    (
        _cross("latent_attention", latent_attention, ours=True),
        _cross("plain", _textbook),
        _cross("sdpa", _sdpa),
        Peer("transformers", _perceiver),
    ),
    exact="plain",
    plain=("plain",),
    depth=2.0,
)
