"""A training step of a Perceiver: this project's latent transformer against transformers', the same weights in both.

Forward under autocast, a loss over the latents, backward, fused AdamW. And how the cost of the read grows with the
inputs, which stays the same array of latents.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from bench.measure import random_like
from bench.peers.autocast import wide
from bench.peers.step import Trained, training_flops
from bench.subject import Absent, Function, Peer, Subject
from bench.work import Work
from models.perceiver.convert import config_from_transformers, load_encoder
from models.perceiver.latents import LatentTransformer


@dataclass(frozen=True)
class PerceiverCase:
    """`latents` rows of `width` channels in `layers` blocks over `keys` inputs of `kv_width`; transformers' own model."""

    name: str
    batch: int
    latents: int
    width: int
    layers: int
    keys: int
    kv_width: int
    heads: int = 8

    @property
    def shape(self) -> str:
        """For readers."""
        parameters = sum(p.numel() for p in _model(self).parameters())
        return (
            f"{self.batch} x {self.latents} latents of {self.width}, {self.layers} layers, over {self.keys:,} inputs of "
            f"{self.kv_width}, {parameters / 1e6:.1f}M parameters, fused AdamW"
        )

    def inputs(self, device: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        """inputs [B, N, E], fp32 (fp64 for the exact result): autocast does the rest."""
        shape = (self.batch, self.keys, self.kv_width)
        return {"inputs": random_like(torch.empty(shape, device=device, dtype=wide(dtype)), seed)}

    def work(self, mode: str, dtype: torch.dtype) -> Work:
        """FLOPs as torch's counter finds them in transformers' forward and backward; bytes are not assumed."""
        return Work(_flops(self), 0.0, self.batch * self.keys, "inputs")


@cache
def _model(case: PerceiverCase) -> nn.Module:
    """transformers' PerceiverModel with random weights, without dropout: those that all take. On the CPU, fp32."""
    try:
        from transformers import PerceiverConfig as Theirs
        from transformers import PerceiverModel
    except ImportError as error:
        raise Absent(f"transformers is not installed ({error})") from None
    config = Theirs(
        num_latents=case.latents, d_latents=case.width, d_model=case.kv_width, num_blocks=1,
        num_self_attends_per_block=case.layers, num_self_attention_heads=case.heads,
        num_cross_attention_heads=case.heads, attention_probs_dropout_prob=0.0,
        self_attention_widening_factor=4, cross_attention_widening_factor=4, cross_attention_shape_for_attention="q",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = PerceiverModel(config)
    # Their latents start so small that a LayerNorm divides by noise: use those of a model that has been trained a while.
    model.embeddings.latents.data *= 50  # type: ignore[operator, union-attr]
    return model


@cache
def _flops(case: PerceiverCase) -> float:
    return training_flops(_Theirs(copy.deepcopy(_model(case))), case.inputs("cpu", torch.float32, 0))


class _Theirs(nn.Module):
    """transformers' latents of dense inputs [B, N, E]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.model(inputs).last_hidden_state
        return out


class _Ours(nn.Module):
    """The same from packed inputs."""

    def __init__(self, latent: LatentTransformer) -> None:
        super().__init__()
        self.latent = latent

    def forward(self, inputs: Tensor) -> Tensor:
        batch, keys, _ = inputs.shape
        offsets = torch.arange(0, batch * keys + 1, keys, device=inputs.device, dtype=torch.int32)
        return self.latent(inputs.flatten(0, 1), offsets)


def _perceiver(case: PerceiverCase, device: str, dtype: torch.dtype) -> Function:
    theirs = _model(case)
    latent = LatentTransformer(config_from_transformers(theirs))
    load_encoder(latent, theirs.state_dict())
    return Trained(_Ours(latent), device, dtype)


def _transformers(case: PerceiverCase, device: str, dtype: torch.dtype) -> Function:
    return Trained(_Theirs(copy.deepcopy(_model(case))), device, dtype)


PERCEIVER_STEP = Subject(
    "perceiver_step",
    (Peer("perceiver", _perceiver, ours=True), Peer("transformers", _transformers)),
    exact="transformers",
    plain=("transformers",),
    depth=4.0,
)

LATENT_READ = Subject(
    "latent_read",
    PERCEIVER_STEP.peers,
    exact="transformers",
    plain=("transformers",),
    depth=4.0,
)
"""The same models forward, for cases that differ in their number of inputs alone: cost is linear where the rate of inputs
per second is level."""
