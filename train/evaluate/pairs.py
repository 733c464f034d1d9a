"""Scores of a model that knows several modalities: each kind of held-out pair among its own.

A sample is read as training reads it, all but its text: a clip with its sound. Retrieval both ways is named
"text_to_video/R@5" and so on; "naming" is there for sets whose captions are labels; perplexity is that of hidden words.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from dataload.multimodal import PairSet
from dataload.squares import check_views
from dataload.tokenizer import Tokenizer
from models.perceiver import PerceiverIO
from train.evaluate.collect_pairs import PairCollector, PairsWanted
from train.evaluate.measure import retrieval, scenes_found
from train.evaluate.result import NOTHING, EvalResult, Material, Score
from train.scores.naming import labels_of, naming_chance, naming_scores
from train.scores.perplexity import unigram_perplexity
from train.scores.shuffle import derangement

NAMES = {
    "image-text": ("image", "images"),
    "video-text": ("video", "videos"),
    "audio-text": ("audio", "sounds"),
}
"""Of each kind of pair: the modality, and what many are called."""
TASKS = ("retrieval", "perplexity")


def score_pairs(
    model: PerceiverIO,
    sets: Mapping[str, PairSet],
    tokenizer: Tokenizer,
    *,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    most: int | None = None,
    tasks: Collection[str] = ("retrieval",),
    generate: int = 0,
    keep_images: bool = False,
    unigram: Mapping[str, Tensor] | None = None,
    scenes: bool = False,
    captions: str = "all",
    asked: int | None = None,
    blind_mlm: bool = False,
    views: int = 1,
    seed: int = 0,
) -> EvalResult:
    """Score `model` on the first `most` samples of each set.

    tasks: "retrieval" (and naming, where captions are labels), "perplexity". generate: how many samples of each kind are
    captioned. keep_images: small pictures of them, for the report. unigram: token counts of the training captions by the
    kind of pair. scenes, captions, asked, views: as in `train.evaluate.measure.evaluate_model`. blind_mlm: as in training.

    The model is in eval mode meanwhile and back in its former mode afterwards. Raises ValueError for a set of fewer than two.
    """
    if unknown := sorted(set(tasks) - set(TASKS)):
        raise ValueError(f"unknown tasks {unknown}; supported: {', '.join(TASKS)}")
    check_views(views)
    wanted = PairsWanted(frozenset(tasks), generate, keep_images, asked, captions, blind_mlm, seed)
    scores: dict[str, dict[str, Score]] = {}
    counts: dict[str, int] = {}
    materials: dict[str, Material] = {}
    device = torch.device(device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            for kind, pairs in sets.items():
                collector = PairCollector(model, tokenizer, NAMES[kind][0], device, wanted)
                looks = views if kind == "image-text" and "retrieval" in tasks else 1
                for batch in pairs.first(most or len(pairs), looks):
                    collector.add(batch)
                if len(collector.keys) < 2:
                    raise ValueError(
                        f"{kind}: scores need 2 held-out samples or more; got {len(collector.keys)}"
                    )
                materials[kind] = collector.material()
                found = of_kind(collector, kind, materials[kind], (unigram or {}).get(kind), counts)
                found |= naming(collector, materials[kind])
                for task, part in found.items():
                    scores.setdefault(task, {}).update(part)
    finally:
        model.train(was_training)
    pictures = materials.get("image-text", NOTHING)
    if scenes and pictures.generated:
        scores["scenes"] = scenes_found(pictures, seed)
    return EvalResult(scores, counts, pictures, materials)


def of_kind(
    collector: PairCollector, kind: str, material: Material, unigram: Tensor | None, counts: dict[str, int]
) -> dict[str, dict[str, Score]]:
    """Retrieval and perplexity of one kind of pair; what they were measured on is added to `counts`."""
    modality, many = NAMES[kind]
    scores: dict[str, dict[str, Score]] = {}
    counts[many] = len(collector.keys)
    counts[f"captions_of_{many}"] = sum(map(len, collector.captions))
    if "retrieval" in collector.wanted.tasks:
        found = retrieval(material, collector.wanted.seed)
        scores["retrieval"] = {name.replace("image", modality): score for name, score in found.items()}
    if "perplexity" in collector.wanted.tasks and collector.true.tokens:
        baselines = {"shuffled": collector.shuffled.value}
        if unigram is not None:
            baselines["unigram"] = unigram_perplexity(unigram, torch.cat(collector.targets))
        name = "perplexity" if kind == "image-text" else f"perplexity_of_{many}"
        scores["perplexity"] = {name: Score(collector.true.value, baselines)}
        counts[f"masked_tokens_of_{many}"] = collector.true.tokens
    if collector.generated:
        counts[f"generated_of_{many}"] = len(collector.generated)
    return scores


def naming(collector: PairCollector, material: Material) -> dict[str, dict[str, Score]]:
    """Where captions are labels: how many samples are closest to their own among all of them. Shuffled: the embedding of
    another sample stands in for each."""
    labels = labels_of(material.captions) if len(material.text_embeddings) else None
    if labels is None:
        return {}
    number = {label: i for i, label in enumerate(labels)}
    own = torch.tensor([number[texts[0]] for texts in material.captions])
    first = [own.tolist().index(i) for i in range(len(labels))]
    texts = material.text_embeddings[first]  # equal texts have equal embeddings
    values = naming_scores(material.image_embeddings, texts, own)
    other = derangement(len(own), collector.wanted.seed)
    shuffled = naming_scores(material.image_embeddings[other], texts, own)
    chance = naming_chance(own, len(labels))
    modality = collector.modality
    return {
        "naming": {
            f"{modality}/{name}": Score(value, {"chance": chance[name], "shuffled": shuffled[name]})
            for name, value in values.items()
        }
    }


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
    parts = ["R@1/5/10 " + "; ".join(said)] if said else []
    for modality, many in NAMES.values():
        if (right := scores.get(f"naming/{modality}/accuracy")) is not None:
            parts.append(f"{100 * right:.1f}% of the {many} named right")
    if "perplexity" in scores:
        parts.append(
            f"masked-word perplexity {scores['perplexity']:.1f} "
            f"({scores['perplexity/shuffled']:.1f} with shuffled pictures)"
        )
    return f"held out at step {step}: " + ("; ".join(parts) or "no contrast is trained, nothing to score")
