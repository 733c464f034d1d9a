"""Masked-language-model perplexity of captions: between how many words the model wavers, given the picture.

Perplexity is per token of the tokenizer in use: figures of two vocabularies do not compare.
The masks are a function of (seed, image, caption): two models, or one model twice, are asked the same words.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
SPECIAL = (0, 2, 3, 4)  # PAD BOS EOS MASK: never asked. UNK (1) is an ordinary token here


def evaluation_mask(
    tokens: Tensor,
    is_word_start: Callable[[int], bool],
    mask_id: int,
    *,
    seed: int,
    image: int,
    caption: int,
    probability: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Hide whole words of one caption: (mlm_tokens [T], targets [T] with -100 where nothing is asked).

    Every hidden token becomes the mask token. Training leaves some as they are or swaps them (80/10/10); here
    that would give answers away. At least one word is hidden in every caption that has one.
    """
    words: list[list[int]] = []  # positions of the tokens of each word
    for position, token in enumerate(tokens.tolist()):
        if token in SPECIAL:
            continue
        if not words or is_word_start(token):
            words.append([])
        words[-1].append(position)
    hidden, targets = tokens.clone(), torch.full_like(tokens, IGNORE)
    if words:
        rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, image, caption]))
        chosen = np.flatnonzero(rng.random(len(words)) < probability)
        if len(chosen) == 0:
            chosen = rng.integers(0, len(words), size=1)
        positions = torch.tensor([p for w in chosen for p in words[w]])
        targets[positions] = tokens[positions]
        hidden[positions] = mask_id
    return hidden, targets


@dataclass
class Perplexity:
    """Running sum of negative log-likelihoods (nats): add batches, read `.value`."""

    nll: float = 0.0
    tokens: int = 0

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """logits [..., V] in any float dtype, targets int64 [...] with -100 where nothing is asked."""
        asked = (
            targets != IGNORE
        )  # picked out first: all logits in fp32 would be gigabytes at a large vocabulary
        nll = F.cross_entropy(logits[asked].float(), targets[asked], reduction="none")
        self.nll += nll.double().sum().item()
        self.tokens += len(nll)

    @property
    def value(self) -> float:
        """exp(mean negative log-likelihood), infinity if it overflows. ValueError if nothing was asked."""
        if self.tokens == 0:
            raise ValueError("perplexity of nothing: no token was masked")
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


def unigram_perplexity(counts: Tensor, targets: Tensor) -> float:
    """Perplexity that token frequencies alone give on int64 targets [...], -100 where nothing is asked.

    counts: int64 [V], how often each token stands in the training captions. One is added to every id that can
    be asked, seen or not (add-one smoothing); PAD, BOS, EOS and MASK, never asked, get no probability.
    """
    smoothed = counts.double() + 1
    smoothed[list(SPECIAL)] = 0
    nll = -(smoothed / smoothed.sum()).log()[targets[targets != IGNORE]]
    return Perplexity(nll.sum().item(), len(nll)).value
