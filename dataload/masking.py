"""Masks for masked image modelling and masked language modelling, drawn from the sample's own generator."""

from __future__ import annotations

import numpy as np

from dataload.batch import IGNORE
from dataload.tokenizer import FIRST_PIECE, MASK


def mim_mask(grid: tuple[int, int], rng: np.random.Generator, ratio: float = 0.6) -> np.ndarray:
    """bool `grid`, True = masked: cells chosen at random as SimMIM does (arXiv:2111.09886, 32-pixel cells,
    0.6).

    Exactly round(ratio * cells) cells are masked, but at least one, and one stays visible unless there is
    only one.
    """
    cells = grid[0] * grid[1]
    count = max(1, min(round(ratio * cells), cells - 1))
    mask = np.zeros(cells, dtype=bool)
    mask[rng.permutation(cells)[:count]] = True
    return mask.reshape(grid)


def mlm_mask(
    tokens: np.ndarray,
    rng: np.random.Generator,
    word_starts: np.ndarray,
    probability: float = 0.15,
) -> tuple[np.ndarray, np.ndarray]:
    """Masks whole words of one caption. Returns (mlm_tokens, mlm_targets), both int64 [T].

    `tokens` is int64 [T] (BOS ids EOS PAD...), `word_starts` bool [vocabulary] (`Tokenizer.word_starts`). Of
    the caption's ordinary tokens a share of `probability` is asked for, in the mean exactly, always in whole
    words, and at least one word. Of the tokens asked for, 80% become MASK, 10% a random ordinary piece, 10%
    stay (BERT, arXiv:1810.04805, with its later whole words). Special tokens are never asked for; a caption
    without any ordinary token has no target.
    """
    masked = tokens.copy()
    targets = np.full_like(tokens, IGNORE)
    # A caption is short: plain numbers are quicker than arrays.
    places = [place for place, token in enumerate(tokens.tolist()) if token >= FIRST_PIECE]
    if not places:
        return masked, targets
    # The first ordinary token opens a word even where a cut or a byte piece hides the mark.
    starts = word_starts[tokens[places[1:]]].tolist()
    first = [0, *(at for at, opens in enumerate(starts, 1) if opens), len(places)]
    words = _choose_words(first, probability * len(places), rng)
    asked = [places[at] for word in words for at in range(first[word], first[word + 1])]
    targets[asked] = tokens[asked]
    for place, fate in zip(asked, rng.random(len(asked)).tolist(), strict=True):
        if fate < 0.8:
            masked[place] = MASK
        elif fate >= 0.9:
            masked[place] = rng.integers(FIRST_PIECE, len(word_starts))
    return masked, targets


def _choose_words(first: list[int], budget: float, rng: np.random.Generator) -> list[int]:
    """Words, in random order, until `budget` tokens are covered.

    `first` has each word's first place, and the end. The word that would go over the budget is taken with the
    probability that makes the expected count equal to it.
    """
    chosen: list[int] = []
    covered = 0
    for word in rng.permutation(len(first) - 1).tolist():
        length = first[word + 1] - first[word]
        if covered + length > budget:
            if not chosen or rng.random() < (budget - covered) / length:
                chosen.append(word)
            break
        chosen.append(word)
        covered += length
    return chosen
