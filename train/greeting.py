"""The lines a run begins with: what is used, what it learns from, and what to expect."""

from __future__ import annotations

from pathlib import Path

import torch

import kernels
from models import AuroraConfig
from models.parameters import count_aurora, count_perceiver
from models.perceiver import PerceiverConfig
from train.config import PretrainConfig, micro_batch
from train.data import Data
from train.engine import Ranks
from train.engines.choice import in_words as engine_in_words
from train.engines.choice import optimizer_of
from train.machine import Precision, device_name
from train.multimodal.config import PerceiverPretrainConfig
from train.multimodal.data import MultimodalData
from train.optimizers import in_words
from train.tasks.config import FinetuneConfig
from train.tasks.data import TaskData
from train.tasks.running import greet_task


def greeting(
    config: PretrainConfig,
    device: torch.device,
    precision: Precision,
    ranks: Ranks,
    data: Data | MultimodalData | TaskData,
    out: Path,
) -> list[str]:
    """Lines for rank 0 to say."""
    if isinstance(config, FinetuneConfig):
        assert isinstance(data, TaskData)
        return greet_task(config, device, precision, ranks, data, out)
    processes = f", {ranks.size} processes" if ranks.size > 1 else ""
    if isinstance(config, PerceiverPretrainConfig):
        assert isinstance(data, MultimodalData)
        return [
            f"device      {device_name(device)}{processes}; {precision.name}: {precision.why}",
            f"model       {_perceiver(config.model)}",
            f"engine      {engine_in_words(config, ranks.size)}",
            f"optimizer   {in_words(optimizer_of(config, ranks.size), device)}",
            *pair_lines(data),
            f"steps       {config.steps:,} of {config.batch_size:,} samples: {config.steps * config.batch_size:,}"
            + (f", each in {config.accumulation} micro-steps" if config.accumulation > 1 else ""),
            _pair_contrast(config, data, ranks.size),
            f"output      {out}",
        ]
    assert isinstance(data, Data)
    return [
        f"device      {device_name(device)}{processes}; {precision.name}: {precision.why}",
        f"kernels     {_kernels(config.model, device, precision)}",
        f"model       {_model(config.model)}",
        f"engine      {engine_in_words(config, ranks.size)}",
        f"optimizer   {in_words(optimizer_of(config, ranks.size), device)}",
        *_data(config, data),
        f"steps       {_steps(config, data)}",
        *_contrast(config, data, ranks.size),
        f"output      {out}",
    ]


def _kernels(model: AuroraConfig, device: torch.device, precision: Precision) -> str:
    """The backend that stage 1 of the encoder gets."""
    side, heads = model.image_size // 4, model.width // model.head_dim
    dtype = precision.autocast or torch.float32
    qkv = torch.empty(1, side, side, 3, heads, model.head_dim, dtype=dtype, device=device)
    logit_scale = torch.zeros(heads, device=device)
    window = min(model.windows[0], side)
    choice = kernels.explain(kernels.window_attention, qkv, window=window, logit_scale=logit_scale)
    return f"{choice.function}: {choice.backend} ({choice.reason}); python -m kernels lists them all"


def _model(model: AuroraConfig) -> str:
    parts = count_aurora(model)
    total = parts.pop("total")
    shares = ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in parts.items())
    return f"{total / 1e6:.1f}M parameters ({shares}), {model.image_size} px"


def _perceiver(model: PerceiverConfig) -> str:
    parts = count_perceiver(model)
    total = parts.pop("total")
    shares = ", ".join(f"{name.replace('_', ' ')} {count / 1e6:.1f}M" for name, count in parts.items())
    return (
        f"{total / 1e6:.1f}M parameters ({shares}); images {model.image_size} px, sounds {model.audio_seconds:g} s "
        f"({model.audio_kind}), {model.video_frames} frames of {model.video_size} px; {model.latents} latents"
    )


def pair_lines(data: MultimodalData) -> list[str]:
    """A line per kind of pair, and the tokenizer's."""
    lines = []
    for kind, counter in data.loader.counters.items():
        pairs = (data.heldout or {}).get(kind)
        held = f"{len(pairs):,} held out" if pairs else "none held out: not scored"
        lines.append(
            f"data        {kind}: {counter['samples']:,} samples, {100 * counter['share']:.1f}% of each batch; {held}"
        )
    return [*lines, f"tokenizer   {data.tokenizer.vocab_size:,} pieces"]


def _pair_contrast(config: PerceiverPretrainConfig, data: MultimodalData, world_size: int) -> str:
    """How many texts of other samples each is contrasted with, by the kind of pair."""
    whole = config.itc_negatives == "global"
    samples = config.batch_size // (1 if whole else config.accumulation)
    found = [
        f"{samples * counter['share'] * config.data.captions_per_sample:,.0f} ({kind})"
        for kind, counter in data.loader.counters.items()
    ]
    step = "step" if whole or config.accumulation == 1 else "micro-step"
    over = " over all processes" if world_size > 1 else ""
    return f"contrast    each sample is contrasted with about {', '.join(found)} texts, those of its kind in a {step}{over}"


def _data(config: PretrainConfig, data: Data) -> list[str]:
    counts = data.loader.counts
    heldout = (
        f"{len(data.heldout):,} held-out pictures"
        if data.heldout
        else "no held-out data: nothing will be scored"
    )
    lines = [
        f"data        {counts['captioned']:,} captioned and {counts['uncaptioned']:,} uncaptioned "
        f"pictures in {len(data.sources.train)} shards, decoded by {data.loader.backend}; {heldout}"
    ]
    pieces, rows = data.tokenizer.vocab_size, config.model.vocabulary
    unused = f" ({rows - pieces:,} of the model's {rows:,} rows stay unused)" if pieces < rows else ""
    return [*lines, f"tokenizer   {pieces:,} pieces{unused}"]


def _steps(config: PretrainConfig, data: Data) -> str:
    samples, size = (
        config.steps * config.batch_size,
        sum(data.loader.counts[name] for name in ("captioned", "uncaptioned")),
    )
    text = (
        f"{config.steps:,} of {config.batch_size:,} samples: {samples:,}, about {samples / size:.3g} passes"
    )
    if config.accumulation > 1:
        text += f", each in {config.accumulation} micro-steps"
    return text


def negatives(config: PretrainConfig, pairs: int, world_size: int) -> int:
    """Texts of other pictures that each picture is contrasted with, for `pairs` pictures per rank and
    micro-step.
    """
    micro_steps = config.accumulation if config.itc_negatives == "global" else 1
    return (pairs * world_size * micro_steps - 1) * config.data.captions_per_image


def _contrast(config: PretrainConfig, data: Data, world_size: int) -> list[str]:
    if not config.objectives.itc:
        return []
    others = negatives(config, data.pairs, world_size)
    over = " over all processes" if world_size > 1 else ""
    line = f"contrast    each image is contrasted with {others:,} texts of other images, those of its "
    if config.accumulation == 1:
        return [line + ("batch" if not over else f"step{over}")]
    if config.itc_negatives == "global":
        return [f"{line}whole step{over}, all {config.accumulation} micro-steps (itc_negatives global)"]
    return [
        f"{line}micro-step{over} (itc_negatives microstep: accumulation adds none, a micro-batch has "
        f"{micro_batch(config, world_size):,} samples)"
    ]
