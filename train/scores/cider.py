"""CIDEr-D with a document frequency that is kept: a reward for captions that are sampled while training.

CIDEr weighs an n-gram by how few images' references have it. The official score (captioning.py) counts that in the very
references which it scores against, so it changes with the set; a reward must not change from batch to batch, and takes
the counts of the whole training set once:

    cider = CiderD([tokenize(texts) for texts in training_references])
    rewards = cider(sampled, references)            # float64 [B], as the official score is scaled: 0 to 10

Where the counts come from the references that are scored, the values are those of pycocoevalcap 1.2, which calls the
same thing CIDEr. Vedantam et al., CIDEr, https://arxiv.org/abs/1411.5726; Rennie et al., https://arxiv.org/abs/1612.00563.

Texts are tokens with spaces between them. Letters: B captions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

N = 4
"""n-grams of 1 to 4 words"""
SIGMA = 6.0
"""of the penalty for another length, in words"""
Gram = tuple[str, ...]


@dataclass(frozen=True)
class Weighed:
    """One text as CIDEr sees it."""

    weights: tuple[dict[Gram, float], ...]
    """by n: term frequency times inverse document frequency"""
    norms: tuple[float, ...]
    length: int
    """bigrams, which is what the official code measures the length in"""


def grams(text: str) -> Counter[Gram]:
    """How often each n-gram of 1 to 4 tokens stands in a text."""
    words = text.split()
    return Counter(
        tuple(words[start : start + n]) for n in range(1, N + 1) for start in range(len(words) - n + 1)
    )


class CiderD:
    """Scores captions against references by document frequencies that it was given once."""

    def __init__(self, references: Iterable[Sequence[str]]) -> None:
        """references: of each image, its tokenised references. ValueError where there is no image."""
        self.frequency: Counter[Gram] = Counter()
        """images whose references have the n-gram"""
        self.images = 0
        for texts in references:
            self.images += 1
            self.frequency.update({gram for text in texts for gram in grams(text)})
        if not self.images:
            raise ValueError("CIDEr's document frequencies need references of at least one image")
        self._log_images = math.log(self.images)

    def weigh(self, text: str) -> Weighed:
        """Prepares a text; references that come again need this once."""
        weights: tuple[dict[Gram, float], ...] = tuple({} for _ in range(N))
        length = 0
        for gram, count in grams(text).items():
            # An n-gram that no reference has counts as if one image had it.
            rare = self._log_images - math.log(max(1.0, self.frequency.get(gram, 0)))
            weights[len(gram) - 1][gram] = count * rare
            length += count if len(gram) == 2 else 0
        norms = tuple(math.sqrt(sum(weight * weight for weight in part.values())) for part in weights)
        return Weighed(weights, norms, length)

    def __call__(self, captions: Sequence[str], references: Sequence[Sequence[str | Weighed]]) -> np.ndarray:
        """float64 [B]: the score of each caption against its own references, which are texts or `weigh`ed ones.

        ValueError where the numbers differ, or where a caption has no reference.
        """
        if len(captions) != len(references):
            raise ValueError(f"{len(captions)} captions, but references for {len(references)}")
        if bare := [number for number, texts in enumerate(references) if not texts]:
            raise ValueError(f"{len(bare)} captions have no reference, the first is number {bare[0]}")
        scores = np.empty(len(captions))
        for number, (caption, texts) in enumerate(zip(captions, references, strict=True)):
            mine = self.weigh(caption)
            theirs = [self.weigh(text) if isinstance(text, str) else text for text in texts]
            scores[number] = 10 * sum(_similarity(mine, one) for one in theirs) / len(theirs)
        return scores


def _similarity(mine: Weighed, theirs: Weighed) -> float:
    """Cosine with clipped weights, the mean over n, less where the lengths differ."""
    total = 0.0
    for n in range(N):
        other = theirs.weights[n]
        shared = sum(
            min(w, other[gram]) * other[gram] for gram, w in mine.weights[n].items() if gram in other
        )
        if mine.norms[n] and theirs.norms[n]:
            total += shared / (mine.norms[n] * theirs.norms[n])
    return total / N * math.exp(-((mine.length - theirs.length) ** 2) / (2 * SIGMA**2))
