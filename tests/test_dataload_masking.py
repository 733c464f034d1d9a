from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dataload.batch import IGNORE
from dataload.masking import mim_mask, mlm_mask
from dataload.tokenizer import BOS, EOS, MASK, PAD

VOCABULARY = 105
WORD_STARTS = np.arange(VOCABULARY) >= 55  # pieces 5..54 continue a word, 55..104 begin one


def caption(words: list[list[int]], length: int) -> np.ndarray:
    ids = [token for word in words for token in word]
    row = np.full(length, PAD)
    row[: len(ids) + 2] = [BOS, *ids, EOS]
    return row


def random_words(rng: np.random.Generator, longest: int, count: int) -> list[list[int]]:
    words = []
    for _ in range(count):
        tail = rng.integers(5, 55, rng.integers(0, longest)).tolist()
        words.append([int(rng.integers(55, VOCABULARY)), *tail])
    return words


@pytest.mark.parametrize(
    ("grid", "ratio", "count"),
    [((7, 7), 0.6, 29), ((14, 14), 0.6, 118), ((2, 3), 0.6, 4), ((2, 2), 0.0, 1), ((2, 2), 1.0, 3)]
    + [((1, 1), 0.6, 1), ((1, 2), 0.9, 1)],
)
def test_mim_masks_exactly_the_share(grid: tuple[int, int], ratio: float, count: int) -> None:
    for seed in range(20):
        mask = mim_mask(grid, np.random.default_rng(seed), ratio)
        assert mask.shape == grid and mask.dtype == np.bool_
        assert mask.sum() == count


def test_mim_masks_every_cell_equally_often() -> None:
    rng = np.random.default_rng(0)
    share = np.mean([mim_mask((4, 4), rng, 0.6) for _ in range(4000)], axis=0)
    # 10 of 16 cells: mean 0.625, standard deviation of a cell's share sqrt(.625 * .375 / 4000) = 0.0077
    assert np.abs(share - 10 / 16).max() < 4 * 0.0077


def test_mlm_statistics() -> None:
    rng = np.random.default_rng(1)
    asked = masked = kept = swapped = ordinary = 0
    for _ in range(2000):
        words = random_words(rng, longest=3, count=20)
        row = caption(words, 80)
        tokens, targets = mlm_mask(row, rng, WORD_STARTS, 0.15)
        at = targets != IGNORE
        ordinary += int((row >= 5).sum())
        asked += int(at.sum())
        masked += int((tokens[at] == MASK).sum())
        kept += int((tokens[at] == row[at]).sum())
        swapped += int(((tokens[at] != row[at]) & (tokens[at] != MASK)).sum())
        assert (tokens[~at] == row[~at]).all()
        assert (targets[at] == row[at]).all()
    assert asked / ordinary == pytest.approx(0.15, abs=0.003)
    assert masked / asked == pytest.approx(0.8, abs=0.015)
    assert kept / asked == pytest.approx(0.1 + 0.1 / 100, abs=0.01)  # a random piece may be the same one
    assert swapped / asked == pytest.approx(0.1 * 99 / 100, abs=0.01)


def test_mlm_asks_for_whole_words_and_never_for_special_tokens() -> None:
    rng = np.random.default_rng(2)
    seen: set[int] = set()
    for _ in range(500):
        words = random_words(rng, longest=4, count=int(rng.integers(1, 9)))
        row = caption(words, 48)
        _, targets = mlm_mask(row, rng, WORD_STARTS, 0.15)
        place = 1
        for word in words:
            asked = targets[place : place + len(word)] != IGNORE
            assert asked.all() or not asked.any()
            place += len(word)
        assert (targets[row < 5] == IGNORE).all()
        assert (targets != IGNORE).any(), "every caption has at least one target"
        seen |= set(np.flatnonzero(targets != IGNORE).tolist())
    assert set(range(1, 20)) <= seen


def test_short_captions_get_one_word() -> None:
    rng = np.random.default_rng(3)
    for words in ([[60]], [[60, 6, 7, 8]]):
        _, targets = mlm_mask(caption(words, 10), rng, WORD_STARTS, 0.15)
        assert (targets != IGNORE).sum() == len(words[0])


def test_a_caption_that_was_cut_inside_its_first_word_still_has_a_target() -> None:
    row = np.array([BOS, 6, 7, EOS])  # no piece begins a word
    _, targets = mlm_mask(row, np.random.default_rng(0), WORD_STARTS)
    assert targets.tolist() == [IGNORE, 6, 7, IGNORE]


def test_a_caption_without_ordinary_tokens_has_no_target() -> None:
    row = np.array([BOS, EOS, PAD, PAD])
    tokens, targets = mlm_mask(row, np.random.default_rng(0), WORD_STARTS)
    assert (tokens == row).all() and (targets == IGNORE).all()


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: mim_mask((7, 7), rng),
        lambda rng: np.stack(mlm_mask(caption([[60, 6], [70], [80], [90]], 12), rng, WORD_STARTS, 0.5)),
    ],
)
def test_masks_are_functions_of_the_generator(draw: Callable[[np.random.Generator], np.ndarray]) -> None:
    same = [draw(np.random.default_rng(5)) for _ in range(2)]
    assert (same[0] == same[1]).all()
    assert any((draw(np.random.default_rng(seed)) != same[0]).any() for seed in range(6, 12))
