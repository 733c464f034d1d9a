"""Runs a model of several modalities over the held-out pairs of one kind and collects what scores and report are made of.

Letters: B samples, S texts, T tokens of the longest, M latents, D their width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataload.audio import log_mel
from dataload.multimodal import PairBatch
from dataload.packed import pack
from dataload.tokenizer import MASK, Tokenizer
from models.generation import generate
from models.perceiver import PerceiverIO, Piece
from train.evaluate.collect import mean_embedding, thumbnails
from train.evaluate.result import Material
from train.families import pieces_of
from train.generate.writing import KnownPieces
from train.scores.perplexity import IGNORE, Perplexity, evaluation_mask
from train.scores.shuffle import derangement


@dataclass(frozen=True)
class PairsWanted:
    """What a pass is to find out; see train.evaluate.pairs.score_pairs."""

    tasks: frozenset[str]
    generate: int
    keep_images: bool
    asked: int | None
    captions: str
    blind_mlm: bool
    seed: int


class PairCollector:
    """`add` batches in order, then read the fields, or `material()`. modality: what the pairs are named for."""

    def __init__(
        self,
        model: PerceiverIO,
        tokenizer: Tokenizer,
        modality: str,
        device: torch.device,
        wanted: PairsWanted,
    ) -> None:
        self.model, self.tokenizer, self.modality = model, tokenizer, modality
        self.device, self.wanted = device, wanted
        self.keys: list[str] = []
        self.captions: list[list[str]] = []
        self.embeddings: list[Tensor] = []
        self.text_embeddings: list[Tensor] = []
        self.sample_of_text: list[Tensor] = []
        self.generated: list[str] = []
        self.thumbnails: list[Tensor] = []
        self.true, self.shuffled = Perplexity(), Perplexity()
        self.targets: list[Tensor] = []

    def add(self, batch: PairBatch) -> None:
        """One batch: its samples are read once for embeddings and captions, and once with each text that is asked."""
        wanted, start = self.wanted, len(self.keys)
        if wanted.captions == "first":
            batch = first_captions(batch)
        media = batch.media.to(self.device)
        pieces = pieces_of(media, text=False)
        if "retrieval" in wanted.tasks or start < wanted.generate:
            latents = self.model.encode(pieces, len(media))
        if "retrieval" in wanted.tasks:
            seen = self.model.embedding(latents, self.modality)
            self.embeddings.append(mean_embedding(seen, batch.crops, self._embed).cpu())
            packed = batch.texts.to(self.device)
            piece = Piece(packed.values, batch.sample_of_text.to(self.device), packed.cu_seqlens)
            self.text_embeddings.append(self.model.text_embedding(piece).float().cpu())
            self.sample_of_text.append(batch.sample_of_text + start)
        if start < wanted.generate:
            self._caption(latents[: wanted.generate - start])
        if "perplexity" in wanted.tasks and len(media) > 1:
            self._ask_words(batch, pieces, start)
        self.keys += batch.media.keys
        self.captions += batch.captions
        if wanted.keep_images:
            self.thumbnails.append(thumbnails(look(batch, self.modality)))

    def _embed(self, images: Tensor) -> Tensor:
        number = torch.arange(len(images), device=self.device)
        latents = self.model.encode({"image": Piece(images.to(self.device), number)}, len(images))
        return self.model.embedding(latents, "image")

    def _caption(self, latents: Tensor) -> None:
        speaker = KnownPieces(self.model, self.tokenizer)
        ids = generate(speaker, latents, max_length=self.model.config.text_length)
        self.generated += [self.tokenizer.decode(tokens) for tokens in ids]

    def _ask_words(self, batch: PairBatch, pieces: dict[str, Piece], start: int) -> None:
        """Hidden words, with the right sample's media and with another one's. (A last batch of one sample has no other:
        it is not asked.)"""
        hidden, targets, owner = self._hide_words(batch, start)
        other = derangement(len(batch.media), self.wanted.seed + start)
        for rows in torch.arange(len(hidden)).split(len(batch.media)):
            packed = pack([hidden[i] for i in rows.tolist()]).to(self.device)
            text = Piece(packed.values, torch.arange(len(rows), device=self.device), packed.cu_seqlens)
            wanted = torch.nn.utils.rnn.pad_sequence(
                [targets[i] for i in rows.tolist()], batch_first=True, padding_value=IGNORE
            ).to(self.device)
            self.targets.append(wanted[wanted != IGNORE].cpu())
            for of, perplexity in ((owner[rows], self.true), (other[owner[rows]], self.shuffled)):
                logits = self.model.word_logits(
                    repeated(pieces, of.to(self.device)), text, len(rows), blind=self.wanted.blind_mlm
                )
                perplexity.add(logits, wanted)

    def _hide_words(self, batch: PairBatch, start: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Of the captions that are asked: hidden tokens, targets, and whose they are int64 [S]. Which ones, goes round from
        sample to sample."""
        hidden, targets, owners, first = [], [], [], 0
        for sample, captions in enumerate(batch.captions):
            count = len(captions)
            asked = count if self.wanted.asked is None else min(self.wanted.asked, count)
            for caption in sorted((start + sample + i) % count for i in range(asked)):
                begin, end = batch.texts.cu_seqlens[first + caption : first + caption + 2].tolist()
                one = evaluation_mask(
                    batch.texts.values[begin:end], self.tokenizer.is_word_start, MASK,
                    seed=self.wanted.seed, image=start + sample, caption=caption,
                )  # fmt: skip
                hidden.append(one[0])
                targets.append(one[1])
                owners.append(sample)
            first += count
        return hidden, targets, torch.tensor(owners)

    def material(self) -> Material:
        """Everything collected, joined over the batches."""
        none = torch.empty(0)
        return Material(
            keys=self.keys,
            captions=self.captions,
            image_embeddings=torch.cat(self.embeddings or [none]),
            text_embeddings=torch.cat(self.text_embeddings or [none]),
            image_of_text=torch.cat(self.sample_of_text or [none.long()]),
            generated=self.generated,
            thumbnails=torch.cat(self.thumbnails) if self.thumbnails else None,
            masks=none.bool(),
            restored=none.byte(),
        )


def repeated(pieces: dict[str, Piece], samples: Tensor) -> dict[str, Piece]:
    """The pieces of these samples (int64 [S], repeats allowed), which become samples 0..S-1. A sample has at most one piece
    of a modality."""
    found = {}
    for name, piece in pieces.items():
        last = int(max(samples.max(), piece.sample.max() if len(piece.sample) else 0))
        place = torch.full((last + 1,), -1, device=samples.device)
        place[piece.sample] = torch.arange(len(piece.sample), device=samples.device)
        rows = place[samples]
        found[name] = piece.select(rows[rows >= 0], (rows >= 0).nonzero()[:, 0])
    return found


def first_captions(batch: PairBatch) -> PairBatch:
    """The batch with the first caption of each sample alone."""
    of = batch.sample_of_text
    first = torch.cat([torch.ones(1, dtype=torch.bool), of[1:] != of[:-1]]).nonzero()[:, 0].tolist()
    ends = batch.texts.cu_seqlens.tolist()
    texts = pack([batch.texts.values[ends[i] : ends[i + 1]] for i in first])
    return PairBatch(
        batch.media, [captions[:1] for captions in batch.captions], texts, of[first], batch.crops
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
