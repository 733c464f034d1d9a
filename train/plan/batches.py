"""A micro-batch of a given size for the meta device: pictures, sounds and frames without values, real tokens and masks.

Every caption has the full text length, every sound and clip its longest: what a step must have room for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dataload.batch import IGNORE, Batch
from dataload.multimodal import MIXTURES, PAIRS, MultimodalBatch
from dataload.packed import Packed
from train.config import PretrainConfig
from train.multimodal.config import CELL, PerceiverPretrainConfig

WORD = 9  # a token that is no special one
UNIT = 32  # pixels of a unit of masked image modelling


def kinds(config: PretrainConfig) -> dict[str, float]:
    """The kinds of samples that a run mixes, and their shares, which add up to 1."""
    if isinstance(config, PerceiverPretrainConfig):
        given = {kind: pair for kind, pair in config.data.pairs().items() if pair.train}
        weights = {
            kind: pair.weight or MIXTURES[config.data.mixture][kind]
            for kind, pair in (given or config.data.pairs()).items()
        }
    else:
        uncaptioned = config.data.uncaptioned_fraction or 0.0
        weights = {"pair": 1 - uncaptioned, "uncaptioned": uncaptioned}
    total = sum(weights.values())
    return {kind: weight / total for kind, weight in weights.items() if weight}


def split(samples: int, shares: Mapping[str, float]) -> dict[str, int]:
    """`samples` by kind, as near to the shares as whole numbers come; the largest remainders are rounded up."""
    exact = {kind: samples * share for kind, share in shares.items()}
    counts = {kind: int(value) for kind, value in exact.items()}
    by_rest = sorted(exact, key=lambda kind: counts[kind] - exact[kind])
    for kind in by_rest[: samples - sum(counts.values())]:
        counts[kind] += 1
    return counts


def batch_of(config: PretrainConfig, counts: Mapping[str, int]) -> Batch | MultimodalBatch:
    """A micro-batch with so many samples of each kind."""
    if isinstance(config, PerceiverPretrainConfig):
        return _mixed(config, counts)
    return _pictures(config, counts.get("pair", 0), counts.get("uncaptioned", 0))


def _pictures(config: PretrainConfig, pairs: int, uncaptioned: int) -> Batch:
    size, length, data = config.model.image_size, config.model.text_length, config.data
    captions = pairs * data.captions_per_image
    masked = round(captions * data.mlm_share)
    tokens, targets = _texts(captions, length, data.mlm_probability)
    side = size // UNIT
    hidden = (torch.arange(side * side) < round(data.mim_ratio * side * side)).view(1, side, side)
    return Batch(
        _meta(pairs, size, size, 3), tokens, tokens[:masked], targets[:masked],
        _meta(uncaptioned, size, size, 3), hidden.expand(uncaptioned, side, side).contiguous(), ("",) * (pairs + uncaptioned),
    )  # fmt: skip


def _mixed(config: PerceiverPretrainConfig, counts: Mapping[str, int]) -> MultimodalBatch:
    model, total = config.model, sum(counts.values())
    source = torch.cat([torch.full((counts.get(kind, 0),), i) for i, kind in enumerate(PAIRS)])
    owner = {
        modality: torch.cat(
            [(source == i).nonzero()[:, 0] for i, read in enumerate(PAIRS.values()) if modality in read]
        )
        .sort()
        .values
        for modality in ("image", "audio", "video", "text")
    }
    cells = model.image_size // (CELL if model.image_size >= 4 * CELL else CELL // 2)
    hidden = torch.arange(cells * cells) < round(config.objectives.mask_ratio * cells * cells)
    images, clips = len(owner["image"]), len(owner["video"])
    each = config.data.captions_per_sample
    tokens, targets = _texts(total * each, model.text_length, config.data.mlm_probability)
    frames = clips * model.video_frames
    return MultimodalBatch(
        images=_meta(images, model.image_size, model.image_size, 3),
        image_sample=owner["image"],
        image_mask=hidden.view(1, cells, cells).expand(images, cells, cells).contiguous(),
        audio=_packed(len(owner["audio"]), round(model.audio_seconds * 16_000), torch.float32),
        audio_sample=owner["audio"],
        video=_packed(clips, model.video_frames, torch.uint8, model.video_size, model.video_size, 3),
        video_times=torch.empty(frames, device="meta"),
        video_sample=owner["video"],
        text=Packed(tokens.flatten(), _ends(total * each, model.text_length), model.text_length),
        mlm_tokens=tokens.flatten(),
        mlm_targets=targets.flatten(),
        text_sample=owner["text"].repeat_interleave(each),
        sources=source,
        keys=("",) * total,
    )


def _texts(count: int, length: int, asked: float) -> tuple[Tensor, Tensor]:
    """Tokens and masked-language targets, int64 [count, length]; `asked` of the places of each have a target."""
    tokens = torch.full((count, length), WORD)
    place = torch.arange(length, dtype=torch.float64)
    wanted = ((place + 1) * asked).floor() > (place * asked).floor()
    return tokens, torch.where(wanted, WORD, IGNORE).expand(count, length).contiguous()


def _ends(count: int, length: int) -> Tensor:
    return (torch.arange(count + 1) * length).to(torch.int32)


def _packed(count: int, length: int, dtype: torch.dtype, *more: int) -> Packed:
    values = torch.empty(count * length, *more, dtype=dtype, device="meta")
    return Packed(values, _ends(count, length), length if count else 0)


def _meta(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.uint8, device="meta")
