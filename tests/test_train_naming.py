"""Naming by retrieved label: the score, and which sets it is for."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from train.scores.naming import labels_of, naming_chance, naming_scores, nearest_label


def test_scores_count_the_closest_label() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = normalize(torch.randn(5, 8, generator=generator), dim=1)
    own = torch.randint(0, 5, (60,), generator=generator) % 4  # one label has no sample
    samples = normalize(labels[own] + 0.6 * torch.randn(60, 8, generator=generator), dim=1)
    said = torch.cdist(samples, labels).argmin(1)  # of unit vectors, the closest is the most alike
    right = [a == b for a, b in zip(own.tolist(), said.tolist(), strict=True)]
    assert 0.3 < sum(right) / 60 < 0.95
    found = naming_scores(samples, labels, own)
    assert found["accuracy"] == pytest.approx(sum(right) / 60)
    of = [[hit for hit, label in zip(right, own.tolist(), strict=True) if label == one] for one in range(4)]
    assert found["mean_recall"] == pytest.approx(sum(sum(hits) / len(hits) for hits in of) / 4)


def test_always_the_same_answer_is_chance() -> None:
    labels = torch.eye(3)
    own = torch.tensor([0, 0, 0, 0, 1, 2])
    assert naming_scores(labels[:1].expand(6, -1), labels, own) == pytest.approx(naming_chance(own, 3))
    assert naming_chance(own, 3) == {"accuracy": pytest.approx(4 / 6), "mean_recall": pytest.approx(1 / 3)}


def test_what_is_not_finite_is_wrong() -> None:
    labels = torch.eye(2)
    assert nearest_label(torch.tensor([[1.0, 0.0], [torch.nan, 0.0]]), labels).tolist() == [0, -1]
    assert nearest_label(labels, torch.full((2, 2), torch.nan)).tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("captions", "labels"),
    [
        ([["one"], ["two"], ["one"], ["two"]], ["one", "two"]),
        ([["a dog"], ["a cat"], ["a cow"]], None),  # captions of their own
        ([["one"], ["one"], ["one"]], None),  # nothing to tell apart
        ([["one", "a one"], ["two"], ["one"], ["two"]], None),
        ([], None),
    ],
)
def test_which_captions_are_labels(captions: list[list[str]], labels: list[str] | None) -> None:
    assert labels_of(captions) == labels


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="2 labels or more"):
        naming_scores(torch.eye(2), torch.eye(2)[:1], torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="2 samples, but label_of_sample names 3"):
        naming_scores(torch.eye(2), torch.eye(2), torch.zeros(3, dtype=torch.long))
