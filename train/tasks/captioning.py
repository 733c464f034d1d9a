"""Captioning: the text stack writes, by beam search; COCO's official scores."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataload.annotated import Item, Items, Maker, TaskBatch
from dataload.annotations import Annotations
from dataload.images import mirror_caption, normalize
from dataload.tokenizer import BOS, EOS, MASK, PAD, Tokenizer
from dataload.views import squashed_view, training_view
from models.base import new_base
from models.generation import generate
from models.tokens import IGNORE
from models.writing import Writer
from train.config import ConfigError
from train.evaluate.result import Score
from train.generate.writing import KnownPieces
from train.scores.captioning import METRICS, CaptionScorer, Plan, Split, check
from train.scores.cider import SIGMA, CiderD, Gram
from train.scores.shuffle import derangement
from train.tasks.base import Example, Prediction, TaskResult, item_of
from train.tasks.config import FinetuneConfig, TaskConfig
from train.tasks.detection import view_of
from train.tasks.reward import CiderReward

QUICK = ("Bleu_4", "ROUGE_L", "CIDEr")
CONSTANTS = (
    50  # of the best candidates for the one caption that is said of every picture, so many are scored in full
)


class Captioning:
    """An item is a picture with its captions."""

    name, media = "captioning", "image"
    families: tuple[str, ...] = ("Aurora", "PerceiverIO")
    needs: tuple[str, ...] = ("captions",)
    ragged: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    def __init__(self, spice_jars: Path | None = None, metrics: Sequence[str] = METRICS) -> None:
        """spice_jars: a directory of jars for SPICE, which does not come with its package."""
        self.spice_jars, self.metrics = spice_jars, tuple(metrics)
        self.reward: CiderReward | None = None

    def parts(self, one: Annotations) -> int:
        return 1

    def plan(self) -> Plan:
        """What can be scored here; asked before any compute is spent. Raises ImportError without pycocoevalcap."""
        return check(self.metrics, spice_jars=self.spice_jars)

    def complete(self, task: TaskConfig, items: Items) -> TaskConfig:
        return task

    def attach(self, config: FinetuneConfig, items: Items, tokenizer: Tokenizer) -> None:
        """Before the first step of a run: reads the training captions where the losses need all of them."""
        if samples := config.objectives.self_critical:
            self.reward = CiderReward(items, tokenizer, samples, prompt_of(config, tokenizer))

    def model(self, config: FinetuneConfig) -> nn.Module:
        return Writer(new_base(config.model))

    def maker(self, config: FinetuneConfig, tokenizer: Tokenizer) -> Maker:
        size, length, view_config = config.model.image_size, config.model.text_length, view_of(config)
        prompt = prompt_of(config, tokenizer)

        def make(items: Items, item: Item, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
            encoded = items.index.image(item.sample)
            if rng is None:
                return {"images": squashed_view(encoded, size, config.data.interpolation).pixels}
            view = training_view(encoded, view_config, rng)
            if config.objectives.self_critical:
                return {"images": view.pixels, "mirrored": np.asarray(view.flipped)}
            captions = items.index.captions(item.sample)
            picks = rng.permutation(len(captions))
            rows, targets = [], []
            for i in range(config.data.captions_per_image):
                caption = captions[picks[i % len(picks)]]
                ids = tokenizer.encode(mirror_caption(caption) if view.flipped else caption)
                row = tokenizer.row([*prompt, *ids], length)
                target = np.where(row == PAD, IGNORE, row)
                target[: len(prompt) + 1] = IGNORE
                words = (row > MASK) & (rng.random(length) < config.objectives.word_dropout)
                rows.append(np.where(words, MASK, row))
                targets.append(target)
            return {"images": view.pixels, "tokens": np.stack(rows), "targets": np.stack(targets)}

        return make

    def counts(self, batch: TaskBatch, config: FinetuneConfig) -> Sequence[float]:
        if config.objectives.self_critical:
            return [float(len(batch) * config.objectives.self_critical)]
        return [float((batch["targets"] != IGNORE).sum())]

    def forward(
        self, module: nn.Module, batch: TaskBatch, config: FinetuneConfig, shares: Sequence[float]
    ) -> dict[str, Tensor]:
        images = normalize(batch["images"])
        if config.objectives.self_critical:
            assert self.reward is not None, "attach() comes first"
            critic = self.reward.of(batch.items, batch["mirrored"].tolist())
            judged: dict[str, Tensor] = module(images, None, None, shares[0], critic=critic)
            return judged
        losses: dict[str, Tensor] = module(
            images, batch["tokens"].flatten(0, 1), batch["targets"].flatten(0, 1),
            shares[0], config.objectives.label_smoothing,
        )  # fmt: skip
        return losses

    def predict(
        self, model: Any, batch: TaskBatch, items: Items, config: FinetuneConfig, tokenizer: Tokenizer
    ) -> list[Prediction]:
        captions = caption(getattr(model, "base", model), normalize(batch["images"]), config, tokenizer)
        return [Prediction(number, text) for number, text in zip(batch.items, captions, strict=True)]

    def score(
        self, predictions: Sequence[Prediction], items: Items, config: FinetuneConfig, tokenizer: Tokenizer
    ) -> TaskResult:
        known = [items.annotations(item_of(items, one)) for one in predictions]
        references: dict[int | str, Sequence[str]] = {
            one.item: list(k.captions) for one, k in zip(predictions, known, strict=True)
        }
        said: dict[int | str, str] = {one.item: str(one.value) for one in predictions}
        plan = self.plan()
        scorer, quick = CaptionScorer(plan), CaptionScorer(replace(plan, metrics=QUICK, reasons={}))
        split = scorer.split(said, references)  # Java splits all captions at once, those of the baselines too
        scored = scorer.score_split(split)
        baselines = {"the best single caption": best_single(split, quick)}
        if len(predictions) > 1:
            order = derangement(len(predictions), config.seed).tolist()
            numbers, tokens = list(said), dict(zip(split.ids, split.candidates, strict=True))
            other = {numbers[i]: tokens[numbers[j]] for i, j in enumerate(order)}
            baselines["captions of other pictures"] = quick.score_split(
                split.saying([other[i] for i in split.ids])
            ).scores
        scores = {
            name: Score(
                value,
                {which: v for which, part in baselines.items() if (v := part.get(name)) is not None},
            )
            for name, value in scored.scores.items()
            if value is not None
        }
        examples = [
            Example(
                one.item,
                scored.per_image[one.item].get("CIDEr", 0.0),
                [("said", said[one.item]), *(("people", text) for text in k.captions[:3])],
            )
            for one, k in zip(predictions, known, strict=True)
        ]
        examples.sort(key=lambda one: one.score)
        submission = [
            {"image_id": k.key if k.image_id is None else k.image_id, "caption": said[one.item]}
            for one, k in zip(predictions, known, strict=True)
        ]
        about = {
            "prompt": config.task.prompt, "beams": config.task.beams, "length_penalty": config.task.length_penalty,
            "caption_tokenizer": scored.tokenizer, "not_scored": scored.reasons, "notes": list(scored.notes),
            "different_captions": len(set(said.values())),
        }  # fmt: skip
        return TaskResult(
            self.name, scores, dict(scored.counts), examples, {}, about, {"caption_results.json": submission}
        )


def prompt_of(config: FinetuneConfig, tokenizer: Tokenizer) -> list[int]:
    """The tokens of the task's prompt, without the begin token. Raises ConfigError where no caption has room behind it."""
    ids, length = tokenizer.encode(config.task.prompt) if config.task.prompt else [], config.model.text_length
    if len(ids) + 3 > length:  # the begin token, a word, the end token
        raise ConfigError(
            f"task.prompt {config.task.prompt!r} is {len(ids)} tokens long; model.text_length is {length}, which has room for "
            f"{length - 3} and a caption"
        )
    return ids


@torch.no_grad()
def caption(
    base: Any, images: Tensor, config: FinetuneConfig, tokenizer: Tokenizer, longest: int | None = None
) -> list[str]:
    """A caption of each normalised image, by beam search as the task says. longest: tokens of a caption at most, its end
    included (None: what the model was made for, the prompt included)."""
    prompt, room = None, config.model.text_length
    if config.task.prompt:
        ids = [BOS, *prompt_of(config, tokenizer)]
        prompt = torch.tensor([ids], device=images.device).expand(len(images), -1)
    if longest is not None:
        room = min(room, longest + (1 if prompt is None else prompt.shape[1]))
    found = generate(
        KnownPieces(base, tokenizer),
        base.image_memory(images),
        method="beam" if config.task.beams > 1 else "greedy",
        beams=config.task.beams,
        length_penalty=config.task.length_penalty,
        max_length=room,
        prompt=prompt,
    )
    return [tokenizer.decode([token for token in ids if token != EOS]) for ids in found]


def best_single(split: Split, scorer: CaptionScorer) -> dict[str, float | None]:
    """Scores of the one caption that does best (by CIDEr) when it is said of every picture: what a model has to beat. All
    captions that people gave are candidates."""
    texts = list(dict.fromkeys(text for several in split.references for text in several))
    best = best_constant(texts, split.references)
    return scorer.score_split(split.saying([best] * len(split.references))).scores


def best_constant(texts: Sequence[str], references: Sequence[Sequence[str]]) -> str:
    """Which of the texts has the best mean CIDEr when it is said of every picture.

    All are ordered by CIDEr without its clipping, which is linear, so that sums over the references do for each length; the
    first ones are scored in full. Clipping only matters to texts with a word more often than a reference has it.
    """
    cider = CiderD(references)
    given = [[cider.weigh(text) for text in several] for several in references]
    sums: dict[int, defaultdict[Gram, float]] = {}
    for several in given:
        for one in several:
            of_length = sums.setdefault(one.length, defaultdict(float))
            for weights, norm in zip(one.weights, one.norms, strict=True):
                for gram, weight in weights.items() if norm else ():
                    of_length[gram] += weight / norm / len(several)

    def unclipped(text: str) -> float:
        mine = cider.weigh(text)
        total = 0.0
        for length, of_length in sums.items():
            found = sum(
                weight / norm * of_length.get(gram, 0.0)
                for weights, norm in zip(mine.weights, mine.norms, strict=True)
                if norm
                for gram, weight in weights.items()
            )
            total += found * math.exp(-((mine.length - length) ** 2) / (2 * SIGMA**2))
        return total

    tried = sorted(texts, key=unclipped, reverse=True)[:CONSTANTS]
    return max(tried, key=lambda text: float(np.mean(cider([text] * len(given), given))))
