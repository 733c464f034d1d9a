"""Weights from transformers' Perceiver into this model: same numbers, so that training can start from them.

Its encoder (latents, cross-attention, self-attention blocks) becomes a `LatentTransformer`, a basic decoder of its a
`QueryDecoder`, both of classic blocks. Input preprocessors are not taken over: inputs are tokens of its d_model channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.perceiver.config import ClassicBlocks, PerceiverConfig
from models.perceiver.latents import LatentTransformer
from models.perceiver.queries import QueryDecoder

BLOCK = (
    (r"attention\.self\.layernorm1\.", "norm."),
    (r"attention\.self\.layernorm2\.", "memory_norm."),
    (r"attention\.self\.query\.", "attention.q."),
    (r"attention\.self\.key\.", "attention.k."),
    (r"attention\.self\.value\.", "attention.v."),
    (r"attention\.output\.dense\.", "attention.proj."),
    (r"(?<=\.)layernorm\.", "feed_norm."),
    (r"mlp\.dense1\.", "up."),
    (r"mlp\.dense2\.", "out."),
)
ENCODER = (
    (r"^embeddings\.latents$", "latents"),
    (r"^encoder\.cross_attention\.", "reads.0."),
    (r"^encoder\.self_attends\.(\d+)\.", r"blocks.\1."),
    *BLOCK,
)
DECODER = (
    (r"^output_position_encodings\.position_embeddings$", "queries"),
    (r"^decoding_cross_attention\.", "blocks.0."),
    (r"^final_layer\.", "out."),
    *BLOCK,
)
OTHERS = re.compile(r"^(decoder|input_preprocessor|output_postprocessor)\.")


def config_from_transformers(model: Any) -> PerceiverConfig:
    """The configuration of a transformers `PerceiverModel`; what it does not have keeps its defaults.

    Raises ValueError for another class of model, or one whose activation is not "gelu".
    """
    if type(model).__name__ != "PerceiverModel":
        raise ValueError(f"cannot read a {type(model).__name__}; supported: transformers' PerceiverModel")
    theirs = model.config
    if theirs.hidden_act != "gelu":
        raise ValueError(f"its activation is {theirs.hidden_act!r}; supported: 'gelu'")
    read = model.encoder.cross_attention.attention.self
    inputs = read.key.in_features
    classic = ClassicBlocks(
        heads=theirs.num_self_attention_heads, read_heads=theirs.num_cross_attention_heads,
        qk_width=theirs.qk_channels, v_width=theirs.v_channels, read_qk_width=read.qk_channels,
        widening=theirs.self_attention_widening_factor, read_widening=theirs.cross_attention_widening_factor,
        repeats=theirs.num_blocks, query_residual=theirs.use_query_residual,
    )  # fmt: skip
    query_width = PerceiverConfig.query_width
    decoder = getattr(model.decoder, "decoder", model.decoder)  # a classification decoder wraps a basic one
    if decoder is not None and getattr(decoder, "decoding_cross_attention", None) is not None:
        layer = decoder.decoding_cross_attention
        inner = layer.attention.self
        if inner.v_channels != inner.qk_channels:
            raise ValueError(
                f"its decoder has {inner.qk_channels} channels in queries, {inner.v_channels} in values; supported: equal"
            )
        classic = ClassicBlocks(**{
            **vars(classic), "decoder_heads": inner.num_heads, "decoder_qk_width": inner.qk_channels,
            "decoder_widening": layer.mlp.dense1.out_features // layer.mlp.dense1.in_features,
            "decoder_query_residual": layer.attention.use_query_residual,
        })  # fmt: skip
        query_width = inner.query.in_features
    return PerceiverConfig(
        latents=theirs.num_latents, latent_width=theirs.d_latents, latent_layers=theirs.num_self_attends_per_block,
        encoder_width=inputs, encoder_head_dim=math.gcd(inputs, 64), text_width=3 * math.gcd(inputs, 64),
        classic=classic, query_width=query_width, query_layers=1,
    )  # fmt: skip


def load_encoder(latent: LatentTransformer, weights: Mapping[str, Tensor]) -> None:
    """Copy the state dict of a transformers `PerceiverModel` into the latent transformer; decoder and preprocessors of it
    are passed over. Raises ValueError naming every parameter that is missing, left over or of another shape."""
    _load(latent, {name: tensor for name, tensor in weights.items() if not OTHERS.search(name)}, ENCODER)


def load_decoder(decoder: QueryDecoder, weights: Mapping[str, Tensor]) -> None:
    """The same for the state dict of a transformers `PerceiverBasicDecoder` with learned queries."""
    _load(decoder, weights, DECODER)


def _load(module: nn.Module, weights: Mapping[str, Tensor], renames: tuple[tuple[str, str], ...]) -> None:
    own = module.state_dict()
    found, unknown, wrong = set(), [], []
    for name, tensor in weights.items():
        target = name
        for pattern, replacement in renames:
            target = re.sub(pattern, replacement, target)
        if target not in own:
            unknown.append(name)
        elif tensor.shape != own[target].shape:
            wrong.append(f"{name} {tuple(tensor.shape)} for {target} {tuple(own[target].shape)}")
        else:
            own[target].copy_(tensor)  # a state dict's tensors share memory with the module's parameters
            found.add(target)
    missing = sorted(set(own) - found)
    if unknown or wrong or missing:
        raise ValueError(
            f"these weights do not fit. Not known here: {unknown}; other shapes: {wrong}; missing: {missing}. "
            "Build the model with config_from_transformers(model)."
        )
