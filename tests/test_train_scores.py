from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dataload.scenes import words_of
from train.scores.perplexity import IGNORE, Perplexity, evaluation_mask, unigram_perplexity
from train.scores.retrieval import retrieval_chance, retrieval_scores
from train.scores.scenes import scene_scores
from train.scores.shuffle import derangement

# Retrieval


def test_retrieval_agrees_with_the_oracle(real_data: Path) -> None:
    """Embeddings and scores made with clip_benchmark; WRONG_* are what common mistakes give."""
    arrays = np.load(real_data / "oracles" / "retrieval_embeddings.npz")
    expected = json.loads((real_data / "oracles" / "expected.json").read_text())["retrieval_embeddings"]
    image, text, owner = (torch.from_numpy(arrays[name]) for name in ("image", "text", "text_to_image"))
    scores = retrieval_scores(image, text, owner)
    for k in (1, 5, 10):
        assert scores[f"text_to_image/R@{k}"] == pytest.approx(expected[f"t2i_R@{k}"], abs=1e-7)
        assert scores[f"image_to_text/R@{k}"] == pytest.approx(expected[f"i2t_R@{k}"], abs=1e-7)
        for wrong in (f"WRONG_true_recall_i2t@{k}", f"WRONG_first_caption_only_i2t_R@{k}"):
            assert abs(scores[f"image_to_text/R@{k}"] - expected[wrong]) > 0.1


def test_retrieval_by_hand() -> None:
    """Three pictures on the axes; captions 0 and 1 belong to picture 0, one of them points to picture 2."""
    image = torch.eye(3)
    text = torch.tensor([[1.0, 0, 0], [0.1, 0.2, 0.9], [0.3, 0.8, 0], [0, 0.1, 0.9]])
    owner = torch.tensor([0, 0, 1, 2])
    scores = retrieval_scores(image, text, owner, ks=(1, 2))
    # captions: 0 -> first; 1 -> picture 0 is last of three; 2 -> first; 3 -> first
    assert scores["text_to_image/R@1"] == 3 / 4
    assert scores["text_to_image/R@2"] == 3 / 4
    assert scores["text_to_image/median_rank"] == 1
    # pictures: 0 -> its caption 0 first; 1 -> caption 2 first; 2 -> its caption 3 ties with the foreign 1
    assert scores["image_to_text/R@1"] == 2 / 3
    assert scores["image_to_text/R@2"] == 1


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan])
def test_a_collapsed_model_scores_nothing(value: float) -> None:
    """All embeddings alike, or NaN: every comparison is a tie, and ties must not count for the model."""
    flat = torch.full((12, 4), value)
    scores = retrieval_scores(flat, flat, torch.arange(12))
    assert scores["text_to_image/R@10"] == scores["image_to_text/R@10"] == 0
    assert scores["text_to_image/median_rank"] == scores["image_to_text/median_rank"] == 12


def test_pictures_without_captions_distract_but_do_not_ask() -> None:
    image = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1.0]])
    text = torch.tensor([[0.9, 0.1], [0, 1.0]])
    owner = torch.tensor([1, 2])
    scores = retrieval_scores(image, text, owner, ks=(1,))
    assert scores["text_to_image/R@1"] == 0.5  # picture 0, which has no caption, takes caption 0
    assert scores["image_to_text/R@1"] == 1.0


def test_large_pools_are_scored_in_parts_alike() -> None:
    """More queries than one part holds: the same ranks as a plain sort of everything."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(1100).repeat_interleave(2)
    image = torch.randn(1100, 8, generator=generator)
    text = image[owner] + torch.randn(2200, 8, generator=generator)
    scores = retrieval_scores(image, text, owner)
    order = (text @ image.T).argsort(dim=1, descending=True)
    rank = (order == owner[:, None]).int().argmax(1)
    assert scores["text_to_image/R@5"] == pytest.approx((rank < 5).double().mean().item())
    best = (image @ text.T).argsort(dim=1, descending=True)
    found = (owner[best[:, :5]] == torch.arange(1100)[:, None]).any(1)
    assert scores["image_to_text/R@5"] == pytest.approx(found.double().mean().item())


def test_chance_is_what_counting_all_orders_gives() -> None:
    """Two pictures with one and three captions: all 4! orders of the captions, both of the pictures."""
    owner = torch.tensor([0, 1, 1, 1])
    chance = retrieval_chance(owner, images=2, ks=(1, 2, 10))
    orders = list(itertools.permutations(owner.tolist()))
    for k in (1, 2):
        found = [picture in order[:k] for picture in (0, 1) for order in orders]
        assert chance[f"image_to_text/R@{k}"] == pytest.approx(sum(found) / len(found))
    assert chance["text_to_image/R@1"] == 0.5
    assert chance["text_to_image/R@10"] == chance["image_to_text/R@10"] == 1


def test_retrieval_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="0 images"):
        retrieval_scores(torch.empty(0, 4), torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="3 text embeddings, but image_of_text names 2"):
        retrieval_scores(torch.eye(3), torch.eye(3), torch.tensor([0, 1]))


# Shuffling


@pytest.mark.parametrize("count", [2, 3, 10, 501])
def test_a_derangement_leaves_nothing_in_place(count: int) -> None:
    for seed in range(20):
        order = derangement(count, seed)
        assert sorted(order.tolist()) == list(range(count))
        assert not (order == torch.arange(count)).any()
    assert torch.equal(derangement(count, 3), derangement(count, 3))


def test_one_picture_cannot_be_shuffled() -> None:
    with pytest.raises(ValueError, match="at least 2 images.*got 1"):
        derangement(1, 0)


# Perplexity

WORDS = torch.tensor([2, 10, 31, 32, 11, 12, 33, 3, 0, 0])  # bos | 10 31 32 | 11 | 12 33 | eos pad pad


def is_word_start(token: int) -> bool:
    return token < 30


def ask(seed: int = 0, image: int = 0, caption: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return evaluation_mask(WORDS, is_word_start, 4, seed=seed, image=image, caption=caption)


def test_masks_hide_whole_words_and_nothing_special() -> None:
    seen = set()
    for image in range(200):
        hidden, targets = ask(image=image)
        asked = targets != IGNORE
        assert asked.any()  # every caption is asked something
        assert (hidden[asked] == 4).all() and torch.equal(hidden[~asked], WORDS[~asked])
        assert torch.equal(targets[asked], WORDS[asked])
        for word in ((1, 2, 3), (4,), (5, 6)):
            assert len({bool(asked[p]) for p in word}) == 1
        assert not asked[[0, 7, 8, 9]].any()
        seen.add(tuple(asked.tolist()))
    assert len(seen) > 3


def test_masks_depend_on_seed_image_and_caption_alone() -> None:
    first = [ask(image=i)[1].tolist() for i in range(50)]
    assert first == [ask(image=i)[1].tolist() for i in range(50)]
    assert first != [ask(image=i, caption=1)[1].tolist() for i in range(50)]
    assert first != [ask(image=i, seed=1)[1].tolist() for i in range(50)]


def test_a_caption_without_words_asks_nothing() -> None:
    hidden, targets = evaluation_mask(torch.tensor([2, 3, 0]), is_word_start, 4, seed=0, image=0, caption=0)
    assert hidden.tolist() == [2, 3, 0] and targets.tolist() == [IGNORE] * 3


def test_perplexity_of_known_models() -> None:
    uniform, certain, mixed = Perplexity(), Perplexity(), Perplexity()
    targets = torch.tensor([[5, IGNORE, 7], [IGNORE, 6, IGNORE]])
    uniform.add(torch.zeros(2, 3, 50), targets)
    assert uniform.value == pytest.approx(50) and uniform.tokens == 3
    certain.add(100 * torch.nn.functional.one_hot(targets.clamp(min=0), 50).float(), targets)
    assert certain.value == pytest.approx(1)
    mixed.add(
        torch.zeros(2, 3, 50, dtype=torch.bfloat16), targets
    )  # batches add up by tokens, not by batches
    mixed.add(torch.zeros(1, 2, 8), torch.tensor([[1, IGNORE]]))
    assert mixed.value == pytest.approx(math.exp((3 * math.log(50) + math.log(8)) / 4))


def test_perplexity_at_its_ends() -> None:
    with pytest.raises(ValueError, match="no token was masked"):
        _ = Perplexity().value
    hopeless = Perplexity(nll=1e6, tokens=1)
    assert hopeless.value == math.inf
    assert Perplexity(nll=math.nan, tokens=1).value == math.inf


def test_the_unigram_model_is_add_one_smoothing() -> None:
    counts = torch.tensor([9, 0, 9, 9, 9, 6, 1, 0])  # counts of special tokens must not matter
    for token, probability in ((1, 1 / 11), (5, 7 / 11), (6, 2 / 11), (7, 1 / 11)):  # seen 0, 6, 1, 0 times
        assert unigram_perplexity(counts, torch.tensor([token, IGNORE])) == pytest.approx(1 / probability)
    both = unigram_perplexity(counts, torch.tensor([[5, IGNORE], [IGNORE, 6]]))
    assert both == pytest.approx(math.sqrt(11 / 7 * 11 / 2))


# Color and shape words


def test_scene_words_by_hand() -> None:
    """4 words said, all of them right, 6 true: F1 = 2 x 4 / (4 + 6)."""
    said = ["a red circle", "a blue square and a blue square"]
    true = [
        ["a big red star at left and a green circle", "a red star, a green circle"],
        ["a small blue square"],
    ]
    scores = scene_scores(said, true, words_of)
    assert scores["f1"] == pytest.approx(2 * 4 / (4 + 6))  # red, circle; blue, square
    assert scores["color_f1"] == pytest.approx(2 * 2 / (2 + 3))
    assert scores["shape_f1"] == pytest.approx(2 * 2 / (2 + 3))


def test_scene_words_are_micro_averaged() -> None:
    """A picture with much to say weighs more: the mean of per-picture F1 would be 0.5."""
    true = [["a red star"], ["a red star and a blue ring and a green cross"]]
    scores = scene_scores(["", "a red star and a blue ring and a green cross"], true, words_of)
    assert scores["f1"] == pytest.approx(2 * 6 / (6 + 8))


def test_scene_words_refuse_nothing() -> None:
    with pytest.raises(ValueError, match="got 1 for 2 pictures"):
        scene_scores(["a red star"], [["a red star"], ["a blue ring"]], words_of)
    with pytest.raises(ValueError, match="hold a color or shape word"):
        scene_scores(["dogs"], [["cats"]], words_of)
