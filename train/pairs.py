"""Retrieval of a model that knows several modalities: each kind of held-out pair among its own, both ways.

A sample is read as training reads it, all but its text: a clip with its sound. Scores are named "text_to_video/R@5" and so on.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dataload.audio import log_mel
from dataload.multimodal import PairBatch, PairSet
from models.perceiver import PerceiverIO, Piece
from train.collect import thumbnails
from train.families import pieces_of
from train.measure import retrieval
from train.result import NOTHING, EvalResult, Material, Score

NAMES = {
    "image-text": ("image", "images"),
    "video-text": ("video", "videos"),
    "audio-text": ("audio", "sounds"),
}
"""Of each kind of pair: the modality, and what many are called."""


def score_pairs(
    model: PerceiverIO,
    sets: Mapping[str, PairSet],
    *,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    most: int | None = None,
    keep_images: bool = False,
    seed: int = 0,
) -> EvalResult:
    """Score `model` on the first `most` samples of each set; keep_images: small pictures of them, for the report.

    The model is in eval mode meanwhile and back in its former mode afterwards. Raises ValueError for a set of fewer than two.
    """
    scores: dict[str, Score] = {}
    counts: dict[str, int] = {}
    materials: dict[str, Material] = {}
    device = torch.device(device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            for kind, pairs in sets.items():
                modality, many = NAMES[kind]
                found = embed_pairs(model, pairs, modality, device, most or len(pairs), keep_images)
                if len(found.keys) < 2:
                    raise ValueError(
                        f"{kind}: retrieval needs 2 held-out samples or more; got {len(found.keys)}"
                    )
                materials[kind] = found
                scores |= {name.replace("image", modality): s for name, s in retrieval(found, seed).items()}
                counts[many] = len(found.keys)
                counts[f"captions_of_{many}"] = sum(map(len, found.captions))
    finally:
        model.train(was_training)
    return EvalResult({"retrieval": scores}, counts, materials.get("image-text", NOTHING), materials)


def embed_pairs(
    model: PerceiverIO, pairs: PairSet, modality: str, device: torch.device, most: int, keep: bool
) -> Material:
    """Embeddings of the first samples of a set and of all their captions."""
    keys: list[str] = []
    captions: list[list[str]] = []
    media, texts, owners, small = [], [], [], []
    for batch in pairs.first(most):
        on_device = batch.media.to(device)
        latents = model.encode(pieces_of(on_device, text=False), len(on_device))
        media.append(model.embedding(latents, modality).float().cpu())
        packed = batch.texts.to(device)
        piece = Piece(packed.values, batch.sample_of_text.to(device), packed.cu_seqlens)
        texts.append(model.text_embedding(piece).float().cpu())
        owners.append(batch.sample_of_text + len(keys))
        keys += batch.media.keys
        captions += batch.captions
        if keep:
            small.append(thumbnails(look(batch, modality)))
    none = torch.empty(0)
    return Material(
        keys=keys,
        captions=captions,
        image_embeddings=torch.cat(media or [none]),
        text_embeddings=torch.cat(texts or [none]),
        image_of_text=torch.cat(owners or [none.long()]),
        generated=[],
        thumbnails=torch.cat(small) if small else None,
        masks=none.bool(),
        restored=none.byte(),
    )


def look(batch: PairBatch, modality: str) -> Tensor:
    """uint8 [B, H, W, 3]: the picture, the first frame, or the spectrogram of each sample."""
    media = batch.media
    if modality == "image":
        return media.images
    if modality == "video":
        return torch.stack([frames[0] for frames in media.video])
    return torch.stack([spectrogram(sound) for sound in media.audio])


def spectrogram(sound: Tensor, height: int = 64, width: int = 96) -> Tensor:
    """uint8 [height, width, 3]: log-mel energy of a waveform [S], time to the right, pitch upwards, loud is bright."""
    wave = torch.nn.functional.pad(sound, (0, max(0, 1024 - len(sound))))
    mel = log_mel(wave[None], height)[:, None]  # [1, 1, height, frames]
    mel = torch.nn.functional.interpolate(mel, size=(height, width), mode="bilinear")[0, 0].flip(0)
    share = ((mel - mel.max() + 8) / 8).clamp(0, 1).numpy()
    anchors = np.array([[13, 16, 45], [87, 32, 110], [203, 71, 79], [249, 160, 63], [252, 244, 180]])
    at = np.linspace(0, 1, len(anchors))
    colors = np.stack([np.interp(share, at, anchors[:, c]) for c in range(3)], axis=-1)
    return torch.from_numpy(colors.round().astype(np.uint8))


def summarize_pairs(step: int, result: EvalResult) -> str:
    """An evaluation during the run in one line."""
    scores, said = result.scalars(), []
    for modality, many in NAMES.values():
        if f"text_to_{modality}/R@1" in scores:
            ways = ", ".join(
                f"{way.replace('_', ' ')} "
                + "/".join(f"{100 * scores[f'{way}/R@{k}']:.1f}" for k in (1, 5, 10))
                + "%"
                for way in (f"text_to_{modality}", f"{modality}_to_text")
            )
            said.append(f"{ways} of {result.counts[many]} {many}")
    return f"held out at step {step}: " + (
        "R@1/5/10 " + "; ".join(said) if said else "no contrast is trained, nothing to score"
    )
