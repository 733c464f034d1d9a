"""FLOPs of a training step in closed form, part by part: the sum over stages of what each does to its own tokens.

6 x parameters x tokens is wrong for these models: a stage's weights meet a sixteenth, a quarter or all of the tokens. A
multiply-add is two FLOPs; only matrix products count. `train.plan.trace` finds the same by running the model.

Letters: n tokens, d width, f hidden width of a SwiGLU, T tokens of a text, D decoder width, M memory or latents, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from dataload.multimodal import PAIRS
from models import AuroraConfig
from models.layers import swiglu_width
from models.perceiver import PerceiverConfig
from models.perceiver.adapters.audio import SpectrumStem
from models.perceiver.adapters.image import ConvStem
from train.config import PretrainConfig
from train.multimodal.config import CONTRASTS, PerceiverPretrainConfig
from train.plan.batches import UNIT

Parts = dict[str, float]


@dataclass
class Flops:
    """Of one sample, by part of the model: forward, and backward (twice it, but where no gradient flows on)."""

    forward: Parts = field(default_factory=dict)
    backward: Parts = field(default_factory=dict)

    def add(self, part: str, forward: float, *, times: float = 1.0, backward: float = 2.0) -> None:
        """`times` runs of a part that takes `forward` FLOPs."""
        self.forward[part] = self.forward.get(part, 0.0) + times * forward
        self.backward[part] = self.backward.get(part, 0.0) + times * forward * backward

    @property
    def total(self) -> float:
        """Forward and backward."""
        return sum(self.forward.values()) + sum(self.backward.values())

    def by_part(self) -> Parts:
        """Forward and backward of each part."""
        return {part: self.forward[part] + self.backward[part] for part in self.forward}


def flops_of(config: PretrainConfig, kind: str, others: int = 0) -> Flops:
    """Of one sample of this kind (`train.plan.batches.kinds`); others: texts that it is contrasted with, itself included."""
    if isinstance(config, PerceiverPretrainConfig):
        return _perceiver(config, kind, others)
    return _aurora(config, kind, others)


def mean_flops(config: PretrainConfig, shares: Mapping[str, float], others: int = 0) -> Flops:
    """Of a sample of the mixture."""
    mean = Flops()
    for kind, share in shares.items():
        found = flops_of(config, kind, others)
        for part in found.forward:
            mean.forward[part] = mean.forward.get(part, 0.0) + share * found.forward[part]
            mean.backward[part] = mean.backward.get(part, 0.0) + share * found.backward[part]
    return mean


def linear(n: float, *widths: float) -> float:
    """n rows through matrices of these numbers of elements."""
    return 2.0 * n * sum(widths)


def attention(queries: float, keys: float, width: float) -> float:
    """Every query meets so many keys: two products."""
    return 4.0 * queries * keys * width


def self_block(n: float, d: float, keys: float | None = None) -> float:
    """Self-attention and SwiGLU; keys: how many each token sees, where not all n."""
    return linear(n, 4 * d * d, 3 * d * swiglu_width(int(d))) + attention(n, n if keys is None else keys, d)


def cross_part(n: float, d: float, memory: float, width: float) -> float:
    """n tokens read `memory` rows of `width`."""
    return linear(n, 2 * d * d) + linear(memory, 2 * d * width) + attention(n, memory, d)


def read_block(n: float, d: float, memory: float, width: float) -> float:
    """Cross-attention and SwiGLU."""
    return cross_part(n, d, memory, width) + linear(n, 3 * d * swiglu_width(int(d)))


# ---- Aurora


def _encoder(model: AuroraConfig, flops: Flops) -> None:
    side = model.image_size // 4
    if model.stem == "patch":
        flops.add("stem", linear(side * side, 48 * model.width), backward=1)  # pixels want no gradient
    else:
        half, c = (2 * side) ** 2, model.width
        flops.add("stem", linear(half, 27 * c), backward=1)
        flops.add("stem", linear(half, 9 * c * c) + linear(side * side, 18 * c * c, 2 * c * c))
    for i, (depth, d) in enumerate(zip(model.depths, model.stage_widths, strict=True)):
        rows = side // 2**i
        n, window = rows * rows, min(model.windows[i], rows)
        covered = (-(-rows // window) * window) ** 2
        hidden = 3 * swiglu_width(d) if model.mlp == "swiglu" else 8 * d
        if i:
            flops.add(f"stage {i + 1}", linear(n, 2 * d * d))  # 4 (d / 2) -> d
        block = linear(n, 4 * d * d, hidden * d) + attention(covered, window * window, d)
        flops.add(f"stage {i + 1}", block, times=depth)


def _aurora(config: PretrainConfig, kind: str, others: int) -> Flops:
    model, goals, data, flops = config.model, config.objectives, config.data, Flops()
    last = (model.image_size // UNIT) ** 2
    d4 = model.stage_widths[3]
    if kind == "uncaptioned":
        if goals.mim:
            _encoder(model, flops)
            flops.add("pixels", linear(last, d4 * 3 * UNIT * UNIT))
        return flops
    if not (goals.itc or goals.caption or goals.mlm):
        return flops
    _encoder(model, flops)
    texts, length, width = data.captions_per_image, model.text_length, model.decoder_width
    read = 2 * length if goals.itc_mix else length  # mixed captions, and the others filled up
    cross = sum((model.image_size // 16 // 2**i) ** 2 for i in (0, 1))  # memory: stages 3 and 4
    if goals.itc:
        if model.image_pooling == "attention":
            flops.add("pools", read_block(1, d4, last, d4) + linear(1, d4 * model.embedding_width))
        else:
            flops.add("pools", linear(1, d4 * model.embedding_width))
        if model.text_pooling == "attention":
            pool = read_block(1, width, read, width) + linear(1, width * model.embedding_width)
            flops.add("pools", pool, times=texts)
        # Captions of one image among themselves are as many products again.
        among = bool(goals.itc_captions and texts > 1)
        flops.add("contrast", 2.0 * (1 + among) * texts * others * model.embedding_width)
    reads = self_block(read, width)
    shared = not goals.itc_word_dropout and model.text_pooling == "attention"
    runs = float(bool(goals.caption or (goals.itc and shared)))
    runs += bool(goals.itc and model.text_pooling == "attention" and goals.itc_word_dropout)
    flops.add("text", reads, times=texts * model.unimodal_layers * runs)
    if goals.caption or goals.mlm:
        for i, hidden in zip((2, 3), model.projector_hidden, strict=True):
            n, d = (model.image_size // 4 // 2**i) ** 2, model.stage_widths[i]
            flops.add("projector", linear(n, 2 * d * hidden, hidden * width))
    for goal, tokens, share in (("caption", length - 1, 1.0), ("mlm", length, data.mlm_share)):
        if not getattr(goals, goal):
            continue
        again = goal == "mlm" or bool(goals.parallel_caption)
        block = self_block(tokens, width) + cross_part(tokens, width, cross, width)
        flops.add(goal, self_block(tokens, width), times=texts * share * model.unimodal_layers * again)
        flops.add(goal, block, times=texts * share * model.crossmodal_layers)
        asked = tokens if goal == "caption" else int(length * data.mlm_probability)
        flops.add("logits", linear(asked, width * model.vocabulary), times=texts * share)
    return flops


# ---- PerceiverIO


def _perceiver(config: PerceiverPretrainConfig, kind: str, others: int) -> Flops:
    model, goals, flops = config.model, config.objectives, Flops()
    weights = goals.weights()
    masked = any(weights[name] for name in ("mim", "mvm", "mam", "mlm"))
    hidden = goals.masked_share if masked else 0.0
    whole = float(any(weights[name] for name in (*CONTRASTS.values(), "caption", "label")))
    if not goals.masked_twice:
        whole = max(whole - hidden, 0.0)
    grids = {"image": model.image_grid, "audio": model.audio_grid, "video": model.video_grid}
    tokens = {name: math.prod(grids[name]) for name in PAIRS[kind] if name != "text"}
    text, width, latents, wide = model.text_length, model.encoder_width, model.latents, model.latent_width
    texts = config.data.captions_per_sample

    for name, n in tokens.items():
        keys = model.image_window**2 if name == "image" and model.image_window else n
        _stem(model, name, n, whole + hidden, flops)
        flops.add(
            f"{name} encoder", self_block(n, width, keys), times=(whole + hidden) * model.encoder_layers
        )
    reads = self_block(text, model.text_width)
    bag = model.text_pooling == "words"  # which reads the words themselves
    flops.add("text encoder", reads, times=texts * ((0 if bag else whole) + hidden) * model.text_layers)
    flops.add("text encoder", linear(text, model.text_width * width), times=texts * hidden)

    inputs = whole * sum(tokens.values()) + hidden * (sum(tokens.values()) + texts * text)
    for read in range(model.input_reads):
        flops.add("latents", linear(inputs, 2 * wide * width) + attention(latents, inputs, wide))
        # The first read's queries are the same for all samples: computed once in a micro-step.
        rest = linear(latents, wide * wide, 3 * wide * swiglu_width(wide), wide * wide if read else 0)
        flops.add("latents", rest, times=whole + hidden)
    flops.add("latents", self_block(latents, wide), times=(whole + hidden) * model.latent_layers)

    if any(weights[name] for name in CONTRASTS.values()):
        flops.add("embeddings", _queries(model, 4, model.embedding_width), times=whole)
        if not bag:
            pool = read_block(1, model.text_width, text, model.text_width)
            pool += linear(1, model.text_width * model.embedding_width)
            flops.add("embeddings", pool, times=texts * whole)
        among = bool(goals.agreement and texts > 1)
        contrast = 2.0 * (1 + among) * texts * others * model.embedding_width
        flops.add("embeddings", contrast, times=whole)
    for goal, length, share in (("caption", text - 1, whole), ("mlm", text, hidden)):
        if not weights[goal]:
            continue
        d = model.decoder_width
        block = self_block(length, d) + cross_part(length, d, latents, wide)
        flops.add("text decoder", block, times=texts * share * model.decoder_layers)
        asked = length if goal == "caption" else int(text * config.data.mlm_probability)
        flops.add("logits", linear(asked, d * model.vocabulary), times=texts * share)
    for goal, name in (("mim", "image"), ("mvm", "video"), ("mam", "audio")):
        if weights[goal] and name in tokens:
            found = _queries(model, math.prod(grids[name]), model.patch_widths[name])
            flops.add(f"{name} queries", found, times=hidden)
    return flops


def _stem(model: PerceiverConfig, name: str, n: int, times: float, flops: Flops) -> None:
    """What makes a modality's n tokens; nothing wants the gradient of the pixels."""
    part, width = f"{name} encoder", model.encoder_width
    if name == "image" and model.image_stem == "conv":
        with torch.device("meta"):  # initial values would be drawn from the run's own random numbers
            stem: nn.Module = ConvStem(model.image_patch, width)
    elif name == "audio" and model.audio_kind == "mel" and model.audio_stem == "conv":
        with torch.device("meta"):
            stem = SpectrumStem(model.audio_patch[::-1], width)
    else:
        return flops.add(part, linear(n, model.patch_widths[name] * width), times=times, backward=1)
    layers = [layer for layer in stem.modules() if isinstance(layer, nn.Conv2d)]
    places = n * math.prod(math.prod(layer.stride) for layer in layers)
    for i, layer in enumerate(layers):
        places //= math.prod(layer.stride)
        flops.add(part, linear(places, layer.weight.numel()), times=times, backward=1 if i == 0 else 2)


def _queries(model: PerceiverConfig, queries: int, out: int) -> float:
    block = read_block(queries, model.query_width, model.latents, model.latent_width)
    return model.query_layers * block + linear(queries, model.query_width * out)
