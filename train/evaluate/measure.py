"""Scores of a model on held-out pictures, beside what chance, word frequencies and shuffled pictures give.

A batch's way: EvalSet -> train/evaluate/collect.py (the model runs here) -> train/scores/* -> EvalResult.
Pictures are resized and centre-cropped, never augmented; all captions of a picture are in the pool unless
captions="first" asks for one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dataload import shards
from dataload.batch import EvalBatch
from dataload.pipeline import EvalSet
from dataload.scenes import words_of
from dataload.squares import check_views
from dataload.tokenizer import Tokenizer
from models import Aurora
from train.evaluate.collect import Collector, Wanted
from train.evaluate.result import EvalResult, Material, Score
from train.scores.perplexity import unigram_perplexity
from train.scores.retrieval import retrieval_chance, retrieval_scores
from train.scores.scenes import scene_scores
from train.scores.shuffle import derangement


def evaluate_model(
    model: Aurora,
    eval_set: EvalSet,
    tokenizer: Tokenizer,
    *,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    max_images: int | None = None,
    tasks: Collection[str] = ("retrieval", "perplexity"),
    generate: int = 0,
    reconstruct: int = 0,
    keep_images: bool = False,
    unigram: Tensor | None = None,
    scenes: bool = False,
    captions: str = "all",
    asked: int | None = None,
    views: int = 1,
    seed: int = 0,
) -> EvalResult:
    """Score `model` on the first `max_images` pictures of `eval_set`.

    autocast: dtype of torch.autocast, None = fp32.
    generate, reconstruct: how many pictures to caption, to restore.
    keep_images: keep small copies of the pictures, for the report.
    unigram: int64 [V] token counts of the training captions (unigram_counts), for the perplexity baseline.
    scenes: captions name color and shape (built-in corpus): score the generated ones for it (needs generate).
    captions: "all" of a picture, or the "first" only.
    asked: for the perplexity, hide words in this many captions of a picture (None: in all); which ones, goes
    round from picture to picture. With 1 of 5, an evaluation during training takes a third of the time.
    views: of each picture (1, 5 or 14, `dataload.images.views`); retrieval takes the mean of their embeddings.
    seed: of masks and shuffles; the global generators stay untouched.

    The model is in eval mode meanwhile and back in its former mode afterwards.
    Raises ValueError below two pictures, for an unknown task and for another number of views.
    """
    images = min(len(eval_set), max_images or len(eval_set))
    _check_request(images, tasks, scenes, generate, captions)
    check_views(views)
    wanted = Wanted(frozenset(tasks), generate, reconstruct, keep_images, asked, seed)
    collector = Collector(model, tokenizer, torch.device(device), wanted)
    was_training = model.training
    model.eval()
    try:
        # no_grad, not inference_mode: a table that the model caches here must still serve training later.
        kind = collector.device.type
        with torch.no_grad(), torch.autocast(kind, dtype=autocast, enabled=autocast is not None):
            for batch in _batches(eval_set, images, captions, views if "retrieval" in tasks else 1):
                collector.add(batch)
    finally:
        model.train(was_training)
    return _result(collector, unigram, scenes)


def unigram_counts(
    patterns: Sequence[str | shards.Address], tokenizer: Tokenizer, most: int = 100_000
) -> Tensor:
    """Token counts int64 [V] of the captions in the shards (no picture is read), for the unigram baseline.

    Of more than `most` captioned pictures, every n-th is read: word frequencies need no billion captions.
    """
    index = shards.index(shards.expand([str(pattern) for pattern in patterns]))
    captioned = np.flatnonzero(index.captioned)
    counts = [0] * tokenizer.vocab_size
    for sample in captioned[:: max(1, -(-len(captioned) // most))]:
        for text in index.captions(int(sample)):
            for token in tokenizer.encode(text):
                counts[token] += 1
    return torch.tensor(counts)


def _check_request(images: int, tasks: Collection[str], scenes: bool, generate: int, captions: str) -> None:
    if unknown := set(tasks) - {"retrieval", "perplexity"}:
        raise ValueError(f"unknown tasks {sorted(unknown)}; supported: retrieval, perplexity")
    if images < 2:
        raise ValueError(f"evaluation needs at least 2 pictures (shuffling swaps them); got {images}")
    if scenes and generate < 2:
        raise ValueError(f"scenes=True scores generated captions: generate must be 2 or more; got {generate}")
    if captions not in ("all", "first"):
        raise ValueError(f"captions is 'all' or 'first'; got {captions!r}")


def _batches(eval_set: EvalSet, images: int, captions: str, views: int) -> Iterator[EvalBatch]:
    """The set's batches, cut to the first `images` pictures and, on request, to the first caption of each."""
    left = images
    for batch in eval_set.batches(views):
        of = batch.image_of_caption
        keep = of < left
        if captions == "first":
            keep &= torch.cat([torch.ones(1, dtype=torch.bool), of[1:] != of[:-1]])
        yield EvalBatch(
            images=batch.images[:left],
            captions=[texts[: 1 if captions == "first" else None] for texts in batch.captions[:left]],
            tokens=batch.tokens[keep],
            image_of_caption=of[keep],
            keys=batch.keys[:left],
            crops=None if batch.crops is None else batch.crops[:left],
        )
        left -= len(batch.images)
        if left <= 0:
            return


def _result(collector: Collector, unigram: Tensor | None, scenes: bool) -> EvalResult:
    wanted, material = collector.wanted, collector.material()
    scores: dict[str, dict[str, Score]] = {}
    counts = {"images": len(collector.keys), "captions": sum(map(len, collector.captions))}
    if "retrieval" in wanted.tasks:
        scores["retrieval"] = retrieval(material, wanted.seed)
    if "perplexity" in wanted.tasks:
        baselines = {"shuffled": collector.shuffled.value}
        if unigram is not None:
            baselines["unigram"] = unigram_perplexity(unigram, torch.cat(collector.targets))
        scores["perplexity"] = {"perplexity": Score(collector.true.value, baselines)}
        counts["masked_tokens"] = collector.true.tokens
    if scenes:
        scores["scenes"] = scenes_found(material, wanted.seed)
    if collector.generated:
        counts["generated"] = len(collector.generated)
    if collector.error:
        baseline = {"mean_color": torch.cat(collector.mean_color_error).mean().item()}
        scores["mim"] = {"error": Score(torch.cat(collector.error).mean().item(), baseline)}
        counts["reconstructed"] = len(material.masks)
    return EvalResult(scores, counts, material)


def retrieval(material: Material, seed: int) -> dict[str, Score]:
    """Recall and median rank both ways, beside chance and what other pictures' embeddings give."""
    images, texts, owner = material.image_embeddings, material.text_embeddings, material.image_of_text
    chance = retrieval_chance(owner, len(images))
    shuffled = retrieval_scores(images[derangement(len(images), seed)], texts, owner)
    baselines = {name: {"shuffled": value} for name, value in shuffled.items()}
    baselines |= {name: {"chance": value, **baselines[name]} for name, value in chance.items()}
    return {
        name: Score(value, baselines[name]) for name, value in retrieval_scores(images, texts, owner).items()
    }


def scenes_found(material: Material, seed: int) -> dict[str, Score]:
    """Color and shape words of the generated captions, beside what other pictures' captions give."""
    said, true = material.generated, material.captions[: len(material.generated)]
    other = derangement(len(true), seed).tolist()
    shuffled = scene_scores(said, [true[i] for i in other], words_of)
    return {k: Score(v, {"shuffled": shuffled[k]}) for k, v in scene_scores(said, true, words_of).items()}
