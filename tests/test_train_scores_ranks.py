"""Scores of tasks over ranks: the same numbers from one and from three."""

from __future__ import annotations

import math
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
from truths import boxes_truth, found_box, maps

from train.scores import audio, detection, segmentation, vqa
from train.scores.captioning import check, score_captions
from train.scores.gather import gather_samples, score_over_ranks

SAMPLES = 11
WORDS = "a red blue dog cat runs sits on the bus".split()


def answers_of(number: int) -> dict[str, Any]:
    """What a model "found" for a sample; the same on every rank."""
    rng = np.random.default_rng(number)
    predicted, truth = maps(SAMPLES)
    return {
        "caption": " ".join(rng.choice(WORDS, 6)),
        "answer": str(rng.choice(["yes", "no"])),
        "scores": rng.normal(size=3),
        "pairs": segmentation.pair_counts(predicted[number], truth[number], 4),
        "boxes": [found_box("ab"[number % 2], rng.uniform(5, 40, 4).tolist(), 0.5) for _ in range(3)],
    }


def all_scores(found: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    """Every score of what was gathered."""
    rng = np.random.default_rng(5)
    references = {number: [" ".join(rng.choice(WORDS, 7)) for _ in range(3)] for number in range(SAMPLES)}
    people = {number: vqa.Truth(tuple(rng.choice(["yes", "no"], 10))) for number in range(SAMPLES)}
    truth = rng.random((SAMPLES, 3)) < 0.4
    matrix = segmentation.ConfusionMatrix(list("abcd"))
    for one in found.values():
        matrix.add_counts(one["pairs"])
    captions = {number: one["caption"] for number, one in found.items()}
    scored = score_captions(captions, references, check(["CIDEr", "Bleu_4"], tokenizer="none"))
    return {
        "captions": scored.scores,
        "vqa": vqa.score_vqa({number: one["answer"] for number, one in found.items()}, people).accuracy,
        "mAP": audio.label_scores(
            np.stack([o["scores"] for o in found.values()]), truth, list("abc")
        ).to_json(),
        "mIoU": matrix.scores().to_json(),
        "AP": detection.score_detections(
            [b for one in found.values() for b in one["boxes"]], boxes_truth()
        ).to_json(),
    }


def over_ranks(rank: int, size: int, store: str, out: Any) -> None:
    """What each process does: every third sample, and as many as any other by beginning anew."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    each = math.ceil(SAMPLES / size)
    numbers = [(rank + size * place) % SAMPLES for place in range(each)]
    mine = {number: answers_of(number) for number in numbers}
    found = score_over_ranks(mine, all_scores, expected=range(SAMPLES))
    gathered = gather_samples({f"{rank}/{number}": rank for number in numbers} | {"double": rank})
    errors = []
    for task in (
        lambda: score_over_ranks(mine, all_scores, expected=range(SAMPLES + 2)),
        lambda: score_over_ranks(mine, fail),
    ):
        try:
            task()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    out.put((rank, found, gathered, errors))
    dist.destroy_process_group()


class Odd(Exception):
    """An error that cannot be rebuilt elsewhere."""

    def __init__(self) -> None:
        super().__init__(lambda: None)

    def __str__(self) -> str:
        return "odd"


def fail(found: Any) -> None:
    raise Odd


def test_one_rank_and_three_give_the_same_numbers(tmp_path: Path) -> None:
    wanted = score_over_ranks(
        {n: answers_of(n) for n in reversed(range(SAMPLES))}, all_scores, range(SAMPLES)
    )
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    ranks = [
        context.Process(target=over_ranks, args=(rank, 3, str(tmp_path / "store"), out), daemon=True)
        for rank in range(3)
    ]
    for process in ranks:
        process.start()
    results = {rank: rest for rank, *rest in (out.get(timeout=240) for _ in ranks)}
    for process in ranks:
        process.join(60)
    for rank, (found, gathered, errors) in results.items():
        assert found == wanted, rank
        assert errors == [
            "ValueError: 2 of 13 samples were answered by no rank, 0 answers are for no sample that is asked; the first is 11",
            "RuntimeError: Odd: odd",
        ]
        assert (gathered is None) == (rank > 0)
    assert results[0][1]["double"] == 0 and len(results[0][1]) == 13
    assert wanted["captions"]["CIDEr"] > 0
