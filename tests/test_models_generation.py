"""Generation on a toy language whose best sentences are known by brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from models.generation import generate, nucleus
from models.tokens import BOS, EOS

VOCABULARY = 9


class Bigram:
    """A language model with a table of log-probabilities of the next token, one table per row of memory."""

    class State:
        def __init__(self, tables: torch.Tensor) -> None:
            self.tables = tables

        def select(self, rows: torch.Tensor) -> None:
            self.tables = self.tables[rows]

    def start(self, memory: torch.Tensor) -> State:
        return self.State(memory)

    def step(self, tokens: torch.Tensor, state: State) -> torch.Tensor:
        return state.tables[torch.arange(len(tokens)), tokens].clone()


def tables(rows: int = 4, seed: int = 0) -> torch.Tensor:
    logits = 2 * torch.randn(rows, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    logits[..., [0, 1, 2, 4]] = -torch.inf
    return logits.log_softmax(-1)


def best_by_hand(table: torch.Tensor, max_length: int, length_penalty: float) -> list[int]:
    """The finished sentence with the highest log-probability / length**penalty, by trying all."""
    best, found = -float("inf"), []
    for length in range(max_length - 1):
        for words in itertools.product(range(5, VOCABULARY), repeat=length):
            path = [BOS, *words, EOS]
            score = (
                sum(table[a, b].item() for a, b in itertools.pairwise(path)) / (length + 1) ** length_penalty
            )
            if score > best:
                best, found = score, list(words)
    return found


def test_beam_search_finds_the_best_sentence() -> None:
    memory = tables()
    wide = generate(Bigram(), memory, method="beam", beams=64, max_length=5, length_penalty=1.0)
    assert wide == [best_by_hand(table, 5, 1.0) for table in memory]


def test_a_row_of_a_batch_is_searched_as_if_alone() -> None:
    memory = tables(rows=48, seed=5)
    options = {"method": "beam", "beams": 3, "max_length": 12, "length_penalty": 1.0}
    together = generate(Bigram(), memory, **options)
    assert together == [generate(Bigram(), row[None], **options)[0] for row in memory]


def test_one_beam_without_penalty_is_greedy_where_greedy_ends() -> None:
    memory = tables(rows=16, seed=3)
    greedy = generate(Bigram(), memory, max_length=30)
    beam = generate(Bigram(), memory, method="beam", beams=1, length_penalty=0.0, max_length=30)
    ended = [row for row, ids in enumerate(greedy) if len(ids) < 29]
    assert len(ended) > 3
    assert [beam[row][: len(greedy[row])] for row in ended] == [greedy[row] for row in ended]


def test_sampling_follows_the_distribution_and_the_seed() -> None:
    memory = tables(rows=1).expand(4000, -1, -1)
    first = generate(
        Bigram(), memory, method="sample", max_length=2, generator=torch.Generator().manual_seed(1)
    )
    again = generate(
        Bigram(), memory, method="sample", max_length=2, generator=torch.Generator().manual_seed(1)
    )
    assert first == again
    wanted = memory[0, BOS].exp()
    for token in range(5, VOCABULARY):
        share = sum(ids == [token] for ids in first) / len(first)
        assert share == pytest.approx(wanted[token].item(), abs=0.03)


def test_top_k_and_top_p_cut_the_tail() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    torch.testing.assert_close(nucleus(logits, 2, 1.0), torch.tensor([[0.625, 0.375, 0.0, 0.0]]))
    torch.testing.assert_close(nucleus(logits, 0, 0.6), torch.tensor([[0.625, 0.375, 0.0, 0.0]]))
    torch.testing.assert_close(nucleus(logits, 0, 0.4), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


@pytest.mark.parametrize(
    "options", [{"method": "magic"}, {"method": "sample", "temperature": 0.0}, {"method": "beam", "beams": 0}]
)
def test_wrong_options_are_refused(options: dict) -> None:
    with pytest.raises(ValueError):
        generate(Bigram(), tables(), **options)
