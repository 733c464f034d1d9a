"""Retrieval: pictures by captions and back, fine-tuned, the first ones re-ranked by the cross-attention decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataload.annotated import Item, Items, Maker, TaskBatch
from dataload.annotations import Annotations
from dataload.images import mirror_caption, normalize
from dataload.tokenizer import PAD, Tokenizer
from dataload.views import squashed_view, training_view
from models.base import new_base
from models.matching import Matcher
from train.evaluate.result import Score
from train.scores.retrieval import KS, retrieval_chance, retrieval_scores
from train.tasks.base import Example, Prediction, TaskResult
from train.tasks.config import FinetuneConfig, TaskConfig
from train.tasks.detection import view_of

PAIRS = 256  # of picture and caption that the decoder reads at once


class Retrieval:
    """An item is a picture with its captions."""

    name, media = "retrieval", "image"
    families: tuple[str, ...] = ("Aurora", "PerceiverIO")
    needs: tuple[str, ...] = ("captions",)
    ragged: tuple[str, ...] = ("captions",)
    fresh: tuple[str, ...] = ()

    def __init__(self, pool: str = "all") -> None:
        """pool: "all" captions of a scored picture are looked among, or its "first" alone."""
        self.pool = pool

    def parts(self, one: Annotations) -> int:
        return 1

    def complete(self, task: TaskConfig, items: Items) -> TaskConfig:
        return task

    def model(self, config: FinetuneConfig) -> nn.Module:
        return Matcher(new_base(config.model))

    def maker(self, config: FinetuneConfig, tokenizer: Tokenizer) -> Maker:
        size, length, view_config = config.model.image_size, config.model.text_length, view_of(config)

        def make(items: Items, item: Item, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
            encoded = items.index.image(item.sample)
            captions = items.index.captions(item.sample)
            if rng is None:
                view = squashed_view(encoded, size, config.data.interpolation)
                captions = captions[:1] if self.pool == "first" else captions
            else:
                view = training_view(encoded, view_config, rng)
                caption = captions[int(rng.integers(len(captions)))]
                captions = [mirror_caption(caption) if view.flipped else caption]
            rows = [tokenizer.row(tokenizer.encode(caption), length) for caption in captions]
            return {"images": view.pixels, "captions": np.stack(rows)}

        return make

    def counts(self, batch: TaskBatch, config: FinetuneConfig) -> Sequence[float]:
        return [float(len(batch)), 1.0]

    def forward(
        self, module: nn.Module, batch: TaskBatch, config: FinetuneConfig, shares: Sequence[float]
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = module(normalize(batch["images"]), batch["captions"], *shares)
        return losses

    def predict(
        self, model: Any, batch: TaskBatch, items: Items, config: FinetuneConfig, tokenizer: Tokenizer
    ) -> list[Prediction]:
        """Embeddings of a picture and its captions, and the memory from which pairs are judged later."""
        base = model.base
        images, memory = (found.float().cpu() for found in base.features(normalize(batch["images"])))
        texts = base.text_embedding(batch["captions"]).float().cpu()
        owner, tokens = batch["captions_sample"].cpu(), batch["captions"].cpu()
        self._model = model  # the same on every rank
        return [
            Prediction(number, (images[i], texts[owner == i], tokens[owner == i], memory[i]))
            for i, number in enumerate(batch.items)
        ]

    @torch.no_grad()
    def score(
        self, predictions: Sequence[Prediction], items: Items, config: FinetuneConfig, tokenizer: Tokenizer
    ) -> TaskResult:
        images = torch.stack([one.value[0] for one in predictions])
        texts = torch.cat([one.value[1] for one in predictions])
        tokens = torch.cat([one.value[2] for one in predictions])
        owner = torch.cat([torch.full((len(one.value[1]),), i) for i, one in enumerate(predictions)])
        chance = retrieval_chance(owner, len(images))
        plain = retrieval_scores(images, texts, owner)
        found, first = plain, (texts @ images.T)
        if config.task.rerank > 0:  # an earlier version took less
            memory = torch.stack([one.value[3] for one in predictions])
            first = rerank(self._model, texts @ images.T, memory, tokens, config.task.rerank)
            back = rerank(self._model, images @ texts.T, memory, tokens, config.task.rerank, by_image=True)
            found = {
                **recalls(first, owner[:, None] == torch.arange(len(images))[None], "text_to_image"),
                **recalls(back, torch.arange(len(images))[:, None] == owner[None], "image_to_text"),
            }
        scores = {
            name: Score(
                value,
                {
                    **({"chance": chance[name]} if name in chance else {}),
                    **({"embeddings alone": plain[name]} if config.task.rerank > 0 and name in plain else {}),
                },
            )
            for name, value in found.items()
        }
        examples = worst(first, owner, predictions, items)
        counts = {"pictures": len(images), "captions": len(texts)}
        about = {"reranked": config.task.rerank, "captions_per_picture": len(texts) / len(images)}
        return TaskResult(self.name, scores, counts, examples, about=about)


def rerank(
    model: Any, scores: Tensor, memory: Tensor, tokens: Tensor, most: int, *, by_image: bool = False
) -> Tensor:
    """Scores [Q, N] whose first `most` places per row are ordered by the decoder instead; all others stay behind them.

    Rows are captions and columns pictures, or the other way round. memory [P, M, D], tokens int64 [C, T].
    """
    device = next(model.parameters()).device
    most = min(most, scores.shape[1])
    best = scores.topk(most, dim=1).indices
    rows = torch.arange(len(scores)).repeat_interleave(most)
    columns = best.flatten()
    picture, caption = (rows, columns) if by_image else (columns, rows)
    judged = []
    for some in torch.arange(len(rows)).split(PAIRS):
        pair = tokens[caption[some]]
        pair = pair[:, : int((pair != PAD).sum(1).max())]
        judged.append(model.match(memory[picture[some]].to(device), pair.to(device)).cpu())
    new = torch.cat(judged).view(-1, most)
    # the contrast still counts among those that the decoder thinks alike
    new = new.sigmoid() + 1e-3 * scores.gather(1, best)
    lifted = scores.max() + 1 + new
    return scores.scatter(1, best, lifted)


def recalls(scores: Tensor, right: Tensor, way: str) -> dict[str, float]:
    """R@K and median rank of rows [Q, N] with right answers bool [Q, N]; ties count against the model."""
    asked = right.any(1)
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    ranks = ((~(scores < best) & ~right).sum(1) + 1)[asked]
    found = {f"{way}/R@{k}": (ranks <= k).double().mean().item() for k in KS}
    return {**found, f"{way}/median_rank": ranks.double().quantile(0.5).item()}


def worst(scores: Tensor, owner: Tensor, predictions: Sequence[Prediction], items: Items) -> list[Example]:
    """Captions by the rank of their picture, the last first; scores [captions, pictures]."""
    right = scores.gather(1, owner[:, None])
    ranks = (~(scores < right)).sum(1)
    shown = []
    for caption in ranks.argsort(descending=True)[:24].tolist():
        picture = int(owner[caption])
        texts = items.index.captions(items.items[predictions[picture].item].sample)
        number = caption - int((owner < picture).sum())
        top = predictions[int(scores[caption].argmax())].item
        lines = [
            ("caption", texts[number]),
            ("rank of this picture", f"{int(ranks[caption]):,} of {scores.shape[1]:,}"),
            ("first was", items.index.key(items.items[top].sample)),
        ]
        shown.append(Example(predictions[picture].item, 1 / float(ranks[caption]), lines))
    return shown
