"""Runs a model over held-out batches and collects what scores and report are made of.

Legend: B batch, C captions, H W pixels, M memory tokens, D decoder width, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataload.batch import EvalBatch
from dataload.images import denormalize, normalize
from dataload.masking import mim_mask
from dataload.tokenizer import MASK, Tokenizer
from models import Aurora
from models.generation import generate
from train.evaluate.result import Material
from train.generate.writing import KnownPieces
from train.scores.perplexity import Perplexity, evaluation_mask
from train.scores.shuffle import derangement

THUMBNAIL = 192  # pixels kept of a picture for the report
MIM_RATIO = 0.6  # share of a picture that is hidden when it is to be restored
MIM_UNIT = 32  # pixels


@dataclass(frozen=True)
class Wanted:
    """What a pass is to find out; see train.evaluate.measure.evaluate_model."""

    tasks: frozenset[str]
    generate: int
    reconstruct: int
    keep_images: bool
    asked: int | None
    seed: int


class Collector:
    """`add` batches in order, then read the fields, or `material()` for all that goes into the result."""

    def __init__(self, model: Aurora, tokenizer: Tokenizer, device: torch.device, wanted: Wanted) -> None:
        self.model, self.tokenizer, self.device, self.wanted = model, tokenizer, device, wanted
        self.keys: list[str] = []
        self.captions: list[list[str]] = []
        self.image_embeddings: list[Tensor] = []
        self.text_embeddings: list[Tensor] = []
        self.image_of_text: list[Tensor] = []
        self.generated: list[str] = []
        self.thumbnails: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.restored: list[Tensor] = []
        self.error: list[Tensor] = []  # mean absolute error per restored picture, of the model
        self.mean_color_error: list[Tensor] = []  # ... and of painting the mean color of what is visible
        self.true, self.shuffled = Perplexity(), Perplexity()
        self.targets: list[Tensor] = []
        self.first_memory: Tensor | None = None

    def add(self, batch: EvalBatch) -> None:
        """One batch: its pictures are encoded once, its captions as many at a time as there are pictures."""
        start, wanted = len(self.keys), self.wanted
        images = normalize(batch.images.to(self.device))  # [B, 3, H, W]
        maps = self.model.encode_image(images)
        memory = self.model.memory(maps)  # [B, M, D]
        self.keys += batch.keys
        self.captions += batch.captions
        if "retrieval" in wanted.tasks:
            seen = self.model.image_embedding(maps)
            self.image_embeddings.append(mean_embedding(seen, batch.crops, self._embed).cpu())
            for tokens in batch.tokens.to(self.device).split(len(images)):
                self.text_embeddings.append(self.model.text_embedding(tokens).float().cpu())
            self.image_of_text.append(batch.image_of_caption + start)
        if "perplexity" in wanted.tasks:
            self._ask_words(batch, memory, start)
        if start < wanted.generate:
            self._caption(memory[: wanted.generate - start])
        if start < wanted.reconstruct:
            self._restore(images[: wanted.reconstruct - start], start)
        if wanted.keep_images:
            self.thumbnails.append(thumbnails(batch.images))

    def _embed(self, images: Tensor) -> Tensor:
        maps = self.model.encode_image(normalize(images.to(self.device)))
        return self.model.image_embedding(maps)

    def _ask_words(self, batch: EvalBatch, memory: Tensor, start: int) -> None:
        """Hidden words, with the true picture and with another one."""
        if self.first_memory is None:
            self.first_memory = memory[:1]
        if len(memory) > 1:
            other = memory[derangement(len(memory), self.wanted.seed + start)]
        else:  # a last batch of one picture: the set's first picture stands in
            other = self.first_memory
        hidden, targets, image_of = self._hide_words(batch, start)
        self.targets.append(targets)
        for rows in torch.arange(len(hidden)).split(len(memory)):
            tokens, of = hidden[rows].to(self.device), image_of[rows].to(self.device)
            for pictures, perplexity in ((memory, self.true), (other, self.shuffled)):
                logits = self.model.mlm_logits(pictures[of], tokens)
                perplexity.add(logits, targets[rows].to(self.device))

    def _hide_words(self, batch: EvalBatch, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the captions that are asked: hidden tokens [C, T], targets [C, T], and whose they are [C]."""
        owners: list[int] = []
        pairs: list[tuple[Tensor, Tensor]] = []
        first = 0
        for image, captions in enumerate(batch.captions, start):
            count = len(captions)
            asked = count if self.wanted.asked is None else min(self.wanted.asked, count)
            for caption in sorted((image + i) % count for i in range(asked)):
                owners.append(image - start)
                pairs.append(
                    evaluation_mask(
                        batch.tokens[first + caption],
                        self.tokenizer.is_word_start,
                        MASK,
                        seed=self.wanted.seed,
                        image=image,
                        caption=caption,
                    )
                )
            first += count
        hidden, targets = (torch.stack(column) for column in zip(*pairs, strict=True))
        return hidden, targets, torch.tensor(owners)

    def _caption(self, memory: Tensor) -> None:
        speaker = KnownPieces(self.model, self.tokenizer)
        ids = generate(speaker, memory, max_length=self.model.config.text_length)
        self.generated += [self.tokenizer.decode(tokens) for tokens in ids]

    def _restore(self, images: Tensor, start: int) -> None:
        """Hide 32-pixel units, restore them, and measure the mean absolute error where they were hidden."""
        grid = (images.shape[2] // MIM_UNIT, images.shape[3] // MIM_UNIT)
        seeds = [
            np.random.Philox(key=self.wanted.seed, counter=[0, 1, start + i, 0]) for i in range(len(images))
        ]
        drawn = [mim_mask(grid, np.random.Generator(seed), MIM_RATIO) for seed in seeds]
        masks = torch.from_numpy(np.stack(drawn)).to(self.device)
        hidden = masks.repeat_interleave(MIM_UNIT, 1).repeat_interleave(MIM_UNIT, 2)[:, None]  # [B, 1, H, W]
        restored = self.model.reconstruct(images, masks).float()
        visible = (~hidden).sum((2, 3), keepdim=True).clamp(min=1)
        mean_color = images.masked_fill(hidden, 0).sum((2, 3), keepdim=True) / visible  # [B, 3, 1, 1]
        for guess, errors in ((restored, self.error), (mean_color, self.mean_color_error)):
            wrong = (guess - images).abs().masked_fill(~hidden, 0).sum((1, 2, 3))
            errors.append((wrong / (3 * hidden.sum((1, 2, 3)))).cpu())
        self.masks.append(masks.cpu())
        self.restored.append(thumbnails(denormalize(torch.where(hidden, restored, images))))

    def material(self) -> Material:
        """Everything collected, joined over the batches."""
        none = torch.empty(0)
        return Material(
            keys=self.keys,
            captions=self.captions,
            image_embeddings=torch.cat(self.image_embeddings or [none]),
            text_embeddings=torch.cat(self.text_embeddings or [none]),
            image_of_text=torch.cat(self.image_of_text or [none.long()]),
            generated=self.generated,
            thumbnails=torch.cat(self.thumbnails) if self.thumbnails else None,
            masks=torch.cat(self.masks or [none.bool()]),
            restored=torch.cat(self.restored or [none.byte()]),
        )


def mean_embedding(whole: Tensor, crops: Tensor | None, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """The direction of the mean of a picture's views: embeddings [B, E] of the whole pictures, and what `embed` makes of uint8
    [B, H, W, 3], view by view, of crops [B, views - 1, H, W, 3]. fp32 [B, E] of unit length."""
    if crops is None:
        return whole.float()
    total = whole.float()
    for view in crops.unbind(1):
        total = total + embed(view).float()
    return F.normalize(total, dim=-1)


def thumbnails(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> the same, at most THUMBNAIL pixels high and wide: the report needs no more."""
    scale = THUMBNAIL / max(images.shape[1:3])
    if scale >= 1:
        return images.cpu()
    chw = images.permute(0, 3, 1, 2).float()
    small = F.interpolate(chw, scale_factor=scale, mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
