"""One micro-step of the real model on the meta device: forward, backward, and what both cost."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from train.config import PretrainConfig
from train.families import family_of
from train.plan.batches import batch_of
from train.plan.meter import Counts, Meter
from train.plan.standins import in_place_of_kernels, replaced


@dataclass(frozen=True)
class Traced:
    """What one micro-step of some samples costs on one rank, by whatever device would run it."""

    samples: int
    counts: Counts
    activations: int
    """bytes: the most that was alive beside weights and their gradients"""
    with_gradients: int
    """bytes: the most that was alive beside the weights alone, in a first micro-step"""
    gradients: int
    """bytes of the weights' gradients at the end"""
    logits: int
    """bytes of the largest chunk of logits, contained in the others where they are highest then"""

    @property
    def model_flops(self) -> float:
        """Forward and backward; what is recomputed does not count."""
        return self.counts.flops["forward"] + self.counts.flops["backward"]


def trace(
    config: PretrainConfig,
    counts: Mapping[str, int],
    *,
    kind: str,
    bf16: bool,
    weights: torch.dtype = torch.float32,
    flop_rate: float = 0.0,
    byte_rate: float = 0.0,
    model: Any = None,
) -> Traced:
    """Run the micro-step of a batch with `counts` samples of each kind.

    kind: "cuda" or "cpu", whose kernels are stood in for. bf16: whether autocast is on. weights: their dtype (bfloat16
    where an engine keeps the fp32 ones apart). flop_rate, byte_rate: see `Meter`. model: of `empty_model`, to save
    its making.
    """
    if bf16 and kind == "cpu":
        raise ValueError("bf16 is planned for CUDA devices only: a CPU's autocast has other rules")
    family = family_of(config)
    meter = Meter(flop_rate, byte_rate)
    model = empty_model(config) if model is None else model
    model.to(weights).train()
    model.gradient_checkpointing = config.activation_checkpointing
    batch = batch_of(config, counts)
    shares = [max(float(n), 1.0) for n in family.counts(batch, config)]
    normalizers = family.normalizers(shares, config.accumulation)
    scales = {name: weight for name, weight in config.objectives.weights().items() if weight}
    low = torch.bfloat16 if bf16 else None
    with ExitStack() as stack:
        stack.enter_context(in_place_of_kernels(meter, kind, low))
        stack.enter_context(meter)
        stack.enter_context(meter.watching(model))
        losses = family.forward(model, batch, config.objectives, normalizers, None)
        total = torch.stack([scales[name] * loss for name, loss in losses.items()]).sum()
        total.backward()
        del losses, total
    model.zero_grad(set_to_none=True)
    return Traced(
        sum(counts.values()),
        meter.counts,
        meter.peak,
        meter.peak_with_gradients,
        meter.gradients,
        meter.logits,
    )


def empty_model(config: PretrainConfig) -> Any:
    """The run's model on the meta device; nothing is drawn."""
    names = [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]
    places = [(nn.init, name, lambda tensor, *_, **__: tensor) for name in names]
    with torch.device("meta"), replaced(places):
        return family_of(config).model(config)


def plain(config: PretrainConfig, checkpointing: bool) -> PretrainConfig:
    """The same run with or without activation checkpointing."""
    return replace(config, activation_checkpointing=checkpointing)
