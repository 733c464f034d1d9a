"""F1 of the color and shape words in generated captions: does the model name what is in the picture?

Only for the built-in corpus (dataload.scenes), whose captions always name color and shape: the true captions
give the truth. Micro-averaged: words are counted over all pictures first, then F1 = 2 TP / (2 TP + FP + FN).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

KINDS = ("color", "shape")


def scene_scores(
    generated: Sequence[str],
    truths: Sequence[Sequence[str]],
    words_of: Callable[[str], tuple[set[str], set[str]]],
) -> dict[str, float]:
    """{"f1": .., "color_f1": .., "shape_f1": ..}. A word counts once per picture, however often it is said.

    generated: one caption per picture.
    truths: the true captions of the same pictures; their words together are the truth.
    words_of: a caption's (colors, shapes) under their canonical names (dataload.scenes.words_of).
    Raises ValueError when lengths differ or when there is nothing to compare.
    """
    if not generated or len(generated) != len(truths):
        raise ValueError(
            f"one generated caption per picture is needed; got {len(generated)} for {len(truths)} pictures"
        )
    hits, sizes = (
        dict.fromkeys(KINDS, 0),
        dict.fromkeys(KINDS, 0),
    )  # size: words said + words true, F1's denominator
    for said_caption, true_captions in zip(generated, truths, strict=True):
        for i, kind in enumerate(KINDS):
            said = words_of(said_caption)[i]
            true = set().union(*(words_of(caption)[i] for caption in true_captions))
            hits[kind] += len(true & said)
            sizes[kind] += len(true) + len(said)
    if not any(sizes.values()):
        raise ValueError("neither the generated nor the true captions hold a color or shape word")
    scores = {"f1": 2 * sum(hits.values()) / sum(sizes.values())}
    return scores | {f"{kind}_f1": 2 * hits[kind] / sizes[kind] if sizes[kind] else 0.0 for kind in KINDS}
