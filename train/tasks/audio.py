"""Classes of sounds, by PerceiverIO: one per sound (accuracy), or several (mean average precision, AudioSet)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataload import audio, sandbox
from dataload.annotated import Item, Items, Maker, TaskBatch
from dataload.annotations import Annotations, read_classes
from dataload.tokenizer import Tokenizer
from models.perceiver.classify import SoundClassifier
from train.config import ConfigError
from train.evaluate.result import Score
from train.scores.audio import accuracy_scores, label_scores
from train.tasks.base import Example, Prediction, TaskResult, item_of
from train.tasks.classes import with_ids
from train.tasks.config import FinetuneConfig, TaskConfig, TaskDataConfig
from train.tasks.data import classes_beside

LOUDNESS = 0.05  # root mean square that every sound is brought to
GAIN = 0.3  # deviation of the loudness in training, as a power of e
SHIFT = 0.15  # in training a sound begins so much later at most, in shares of the longest
MIX = 0.4  # of the beta distribution of what a sound counts that is mixed with another


class AudioClassification:
    """An item is one sound."""

    name, media = "audio", "audio"
    families: tuple[str, ...] = ("PerceiverIO",)
    needs: tuple[str, ...] = ("labels",)
    ragged: tuple[str, ...] = ("audio",)
    fresh: tuple[str, ...] = ()

    def parts(self, one: Annotations) -> int:
        return 1

    def complete(self, task: TaskConfig, items: Items) -> TaskConfig:
        """The classes of classes.json, or the labels that the training sounds have, or those of them that the task names;
        several of them at once where a sound has several."""
        several = task.several_labels or max(len(one.labels) for one in items.all()) > 1
        try:
            listed = read_classes(classes_beside(items)).labels
        except (OSError, ValueError):
            listed = {}
        counts = Counter(label for one in items.all() for label in one.labels)
        if not set(counts) <= set(listed.values()):
            listed = {name: name for name in sorted(counts)}
        task = with_ids(task, listed, "the labels of the training sounds")
        if len(names := task.classes) < 2:
            raise ConfigError(f"the training sounds have {len(names)} class: {names}; two or more are needed")
        return replace(task, several_labels=several)

    def model(self, config: FinetuneConfig) -> nn.Module:
        return SoundClassifier(config.model, len(config.task.classes))  # type: ignore[arg-type]

    def maker(self, config: FinetuneConfig, tokenizer: Tokenizer) -> Maker:
        seconds, data = config.model.audio_seconds, config.data  # type: ignore[attr-defined]
        numbers = {name: i for i, name in enumerate(config.task.classes)}

        def make(items: Items, item: Item, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
            sound, labels = read(items, item, rng)
            if rng is not None and rng.random() < data.mix_sounds:
                other, theirs = read(items, items.items[int(rng.integers(len(items)))], rng)
                share = np.float32(rng.beta(MIX, MIX))
                length = min(len(sound), len(other))
                sound = share * sound
                sound[:length] += (1 - share) * other[:length]
                both = np.maximum(labels, theirs) if config.task.several_labels else labels * share
                labels = both if config.task.several_labels else both + (1 - share) * theirs
            return {"audio": sound.astype(np.float32), "labels": labels.astype(np.float32)}

        def read(items: Items, item: Item, rng: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray]:
            encoded = items.index.media(item.sample, "audio")
            factor = 1.0 if rng is None else 1 + data.speed * (2 * rng.random() - 1)
            place = 0.5 if rng is None else rng.random()
            found = audio.decode(
                encoded, seconds=seconds * max(factor, 1.0), place=place, sandbox=sandbox.shared(1)
            )
            sound = equally_loud(found.samples)
            if rng is not None:
                sound = varied(sound, factor, data, seconds, rng)
            known = [numbers[label] for label in items.annotations(item).labels if label in numbers]
            labels = np.zeros(len(numbers), np.float32)
            labels[known] = 1
            return sound[: round(seconds * audio.RATE)], labels

        return make

    def counts(self, batch: TaskBatch, config: FinetuneConfig) -> Sequence[float]:
        return [float(len(batch))]

    def forward(
        self, module: nn.Module, batch: TaskBatch, config: FinetuneConfig, shares: Sequence[float]
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = module(
            batch["audio"], offsets(batch), batch["labels"], shares[0],
            several=config.task.several_labels, smoothing=config.objectives.label_smoothing,
        )  # fmt: skip
        return losses

    def predict(
        self, model: Any, batch: TaskBatch, items: Items, config: FinetuneConfig, tokenizer: Tokenizer
    ) -> list[Prediction]:
        logits = model.classes(batch["audio"], offsets(batch)).float().cpu().numpy()
        return [Prediction(number, row) for number, row in zip(batch.items, logits, strict=True)]

    def score(
        self, predictions: Sequence[Prediction], items: Items, config: FinetuneConfig, tokenizer: Tokenizer
    ) -> TaskResult:
        classes = config.task.classes
        numbers = {name: i for i, name in enumerate(classes)}
        known = [items.annotations(item_of(items, one)) for one in predictions]
        unknown = Counter(label for one in known for label in one.labels if label not in numbers)
        logits = np.stack([one.value for one in predictions])
        truth = np.zeros(logits.shape, bool)
        for row, k in zip(truth, known, strict=True):
            row[[numbers[label] for label in k.labels if label in numbers]] = True
        about: dict[str, Any] = {"unknown_labels": dict(unknown)}
        if config.task.several_labels:
            found = label_scores(logits, truth, classes)
            scores = {"mAP": Score(found.mean_average_precision, {"chance": found.chance})}
            table, counts = found.average_precision, dict(found.counts)
            about["skipped_classes"] = list(found.skipped)
        else:
            asked = truth.any(1)  # a sound of a class that training did not have is wrong whatever is said
            right = accuracy_scores(logits[asked].argmax(1), truth[asked].argmax(1), classes)
            share = float(asked.mean())
            scores = {"accuracy": Score(right.accuracy * share, {"the most frequent class": right.majority})}
            table, counts = right.per_class, {**right.counts, "sounds": len(predictions)}
            about["confusion"] = right.confusion.tolist()
        examples = []
        for one, k, row in zip(predictions, known, truth, strict=True):
            order = np.argsort(-one.value)[:3]
            odds = np.exp(one.value - one.value.max())
            said = ", ".join(f"{classes[i]} {odds[i] / odds.sum():.2f}" for i in order)
            value = float(odds[row].sum() / odds.sum()) if row.any() else 0.0
            examples.append(Example(one.item, value, [("said", said), ("true", ", ".join(k.labels))]))
        examples.sort(key=lambda one: one.score)
        return TaskResult(self.name, scores, counts, examples, table, about)


def offsets(batch: TaskBatch) -> Tensor:
    """int32 [B+1]: where each sound begins in the packed ones."""
    lengths = torch.bincount(batch["audio_sample"], minlength=len(batch))
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).to(torch.int32)


def equally_loud(sound: np.ndarray) -> np.ndarray:
    """A sound [S] at the loudness of all: recordings differ in it, classes do not."""
    loudness = np.sqrt(np.mean(np.square(sound, dtype=np.float64)))
    return sound * np.float32(LOUDNESS / (loudness + 1e-5))


def varied(
    sound: np.ndarray, factor: float, data: TaskDataConfig, seconds: float, rng: np.random.Generator
) -> np.ndarray:
    """A sound [S] as it may also have been: played `factor` times as fast (and higher), with a band and a moment missing,
    softer or louder, with noise, a little later."""
    if factor != 1.0:
        places = np.arange(0, len(sound) - 1, factor)
        sound = np.interp(places, np.arange(len(sound)), sound).astype(np.float32)
    if data.hide_sound and len(sound) > 1:
        spectrum = np.fft.rfft(sound)
        _gap(spectrum, data.hide_sound / 2, rng)
        sound = np.fft.irfft(spectrum, len(sound)).astype(np.float32)
        _gap(sound, data.hide_sound, rng)
    sound = equally_loud(sound) * np.float32(np.exp(GAIN * rng.standard_normal()))
    level = np.float32(data.noise * rng.random() * LOUDNESS)
    sound = sound + level * rng.standard_normal(len(sound), dtype=np.float32)
    spare = min(round(SHIFT * seconds * audio.RATE), max(round(seconds * audio.RATE) - len(sound), 0))
    before = level * rng.standard_normal(int(rng.integers(spare + 1)), dtype=np.float32)
    return np.concatenate([before, sound])


def _gap(values: np.ndarray, most: float, rng: np.random.Generator) -> None:
    """Set a random stretch of at most this share to 0, in place."""
    width = int(len(values) * most * rng.random())
    start = int(rng.integers(len(values) - width + 1))
    values[start : start + width] = 0
