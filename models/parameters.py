"""Counting a model's parameters, and sorting them for the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models.aurora import Aurora, AuroraConfig
from models.perceiver import PerceiverConfig, PerceiverIO

LEARNED_ROWS = (".query", ".mask_token", ".queries", ".latents", ".positions")
"""Endings of the names of learned tokens, which do not decay."""


def count_aurora(config: AuroraConfig, model: Aurora | None = None) -> dict[str, int]:
    """Parameters by part, counted on the meta device: "encoder", "decoder", "heads" (all the rest) and
    "total". model: where there is one already."""
    if model is None:
        with torch.device("meta"):
            model = Aurora(config)
    total, encoder, decoder = (
        sum(p.numel() for p in module.parameters()) for module in (model, model.encoder, model.decoder)
    )
    return {"encoder": encoder, "heads": total - encoder - decoder, "decoder": decoder, "total": total}


def count_perceiver(config: PerceiverConfig, model: PerceiverIO | None = None) -> dict[str, int]:
    """Parameters by part, counted on the meta device: "encoders", "latent", "text_decoder", "query_decoders" (with text's
    pool) and "total". An embedding that text encoder and decoder share counts in the first. model: where
    there is one."""
    if model is None:
        with torch.device("meta"):
            model = PerceiverIO(config)
    encoders = {id(p): p.numel() for module in (model.adapters, model.text) for p in module.parameters()}
    decoder = {id(p): p.numel() for p in model.decoder.parameters() if id(p) not in encoders}
    latent = sum(p.numel() for p in model.latent.parameters())
    total = sum(p.numel() for p in model.parameters())
    parts = {"encoders": sum(encoders.values()), "latent": latent, "text_decoder": sum(decoder.values())}
    return {**parts, "query_decoders": total - sum(parts.values()), "total": total}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: matrices decay; gains, biases, scales, embeddings and learned tokens do not.

    An embedding row, query or mask token is looked up rather than multiplied into a stream at every step,
    and decay would
    shrink rows in proportion to how rarely they are used.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            still = parameter.ndim < 2 or id(parameter) in embeddings or name.endswith(LEARNED_ROWS)
            (kept if still else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
