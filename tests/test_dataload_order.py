"""The loader's order: of an epoch, over ranks, and after a resume."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs import ALONE, PAIRS, config, data, equal, numbers, take, tokenizer

from dataload import order
from dataload.pipeline import Batch, Loader
from dataload.tokenizer import Tokenizer, train_tokenizer

__all__ = ["data", "tokenizer"]  # fixtures


def join(parts: list[Batch]) -> tuple[list[str], list[str], list[torch.Tensor]]:
    """The global micro-batch of some ranks: keys of the pairs, keys of the others, and all tensors."""
    pairs = [key for part in parts for key in part.keys[: len(part.pair_images)]]
    alone = [key for part in parts for key in part.keys[len(part.pair_images) :]]
    names = ("pair_images", "tokens", "mlm_tokens", "mlm_targets", "mim_images", "mim_mask")
    return pairs, alone, [torch.cat([getattr(part, name) for part in parts]) for name in names]


# order


def test_every_sample_once_per_epoch(data: Path, tokenizer: Tokenizer) -> None:
    seen = [n for batch in take(Loader(config(data), tokenizer), 21) for n in numbers(batch)]
    for epoch in range(3):
        pairs = [n for n in seen if n < PAIRS][epoch * PAIRS : (epoch + 1) * PAIRS]
        alone = [n for n in seen if n >= PAIRS][epoch * ALONE : (epoch + 1) * ALONE]
        assert sorted(pairs) == list(range(PAIRS)) and sorted(alone) == list(range(PAIRS, PAIRS + ALONE))
    assert seen[:56] != seen[56:112], "another order in another epoch"


def test_order_of_many_shards_is_a_shuffle_of_groups() -> None:
    sizes = [7, 0, 3, 11, 1] * 20  # 100 shards, 20 of them empty
    ends = np.cumsum(sizes)
    shards = [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    source = order.Source(shards, seed=3, kind=0)
    drawn = [source.at(position) for position in range(2 * len(source))]
    assert [epoch for epoch, _ in drawn] == [0] * 440 + [1] * 440
    first, second = [n for _, n in drawn[:440]], [n for _, n in drawn[440:]]
    assert sorted(first) == sorted(second) == list(range(440)) and first != second
    # a group's samples come together, from 16 shards that do not lie together
    shard_of = np.searchsorted(ends, np.array(first), side="right")
    groups: list[set[int]] = [set()]
    for shard in shard_of.tolist():
        if shard not in groups[-1] and len(groups[-1]) == order.GROUP:
            groups.append(set())
        groups[-1].add(shard)
    assert [len(group) for group in groups] == [16] * 5
    assert np.ptp(sorted(groups[0])) > 40
    # any place is found directly, in any direction
    other = order.Source(shards, seed=3, kind=0)
    for position in (879, 0, 440, 439, 17):
        assert other.at(position) == drawn[position]
    for different in (order.Source(shards, seed=4, kind=0), order.Source(shards, seed=3, kind=1)):
        assert [different.at(i)[1] for i in range(440)] != first
    one_shard = [order.Source([np.arange(99)], seed=3, kind=kind) for kind in (0, 1)]
    assert len({tuple(source.at(i) for i in range(99)) for source in one_shard}) == 2


def test_order_is_uniform() -> None:
    """Chi-square of where the first sample of 8 lands over 4000 epochs; the 99.9% point for 7 degrees is
    24.3."""
    source = order.Source([np.arange(4), np.arange(4, 8)], seed=0, kind=0)
    counts = Counter(source.at(8 * epoch)[1] for epoch in range(4000))
    assert sum((counts[n] - 500) ** 2 / 500 for n in range(8)) < 24.3


def test_generators_are_independent_and_known() -> None:
    draws = {
        key: tuple(order.generator(*key).random(4))
        for key in itertools.product((0, 1, 2**63 - 1), (0, 1), (0, 1, 10**12), range(6))
    }
    assert len(set(draws.values())) == len(draws)
    plain = np.random.Generator(np.random.Philox(key=[5, 6], counter=[0, 0, 7, 3])).random(9)
    assert (order.generator(5, 6, 7, 3).random(9) == plain).all()


def test_batches_do_not_depend_on_threads(data: Path, tokenizer: Tokenizer) -> None:
    settings = config(data, tokenizer_sampling=0.3)
    expected = take(Loader(dataclasses.replace(settings, workers=0), tokenizer), 12)
    for workers, prefetch in ((1, 1), (2, 4), (5, 3)):
        batches = take(
            Loader(dataclasses.replace(settings, workers=workers, prefetch=prefetch), tokenizer), 12
        )
        assert all(map(equal, expected, batches))
    other = take(Loader(dataclasses.replace(settings, seed=1), tokenizer), 1)[0]
    assert other.keys != expected[0].keys


# ranks


@pytest.mark.parametrize("fraction", [None, 0.25, 0.5])
def test_global_batches_do_not_depend_on_the_ranks(
    data: Path, tokenizer: Tokenizer, fraction: float | None
) -> None:
    def global_batches(ranks: int) -> list[tuple[list[str], list[str], list[torch.Tensor]]]:
        settings = config(data, batch_size=8 // ranks, uncaptioned_fraction=fraction)
        each = [take(Loader(settings, tokenizer, rank=rank, world_size=ranks), 9) for rank in range(ranks)]
        for batch in itertools.chain(*each):
            assert len(batch.keys) == 8 // ranks
        return [join(list(parts)) for parts in zip(*each, strict=True)]

    one = global_batches(1)
    for ranks in (2, 4):
        for (pairs, alone, tensors), (pairs_1, alone_1, tensors_1) in zip(
            global_batches(ranks), one, strict=True
        ):
            assert pairs == pairs_1 and alone == alone_1
            assert all(map(torch.equal, tensors, tensors_1))


def test_elastic_resume_loses_and_repeats_nothing(data: Path, tokenizer: Tokenizer) -> None:
    """1 rank, then 2, then 4, with the state of any rank handed on; then every sample was seen equally
    often."""
    state: dict[str, Any] | None = None
    seen: list[int] = []
    for ranks, batches in ((1, 5), (2, 7), (4, 4)):  # 40 + 112 + 128 samples = 5 epochs of 56
        states = []
        for rank in range(ranks):
            with Loader(config(data), tokenizer, rank=rank, world_size=ranks) as loader:
                if state is not None:
                    loader.load_state_dict(state)
                for batch in itertools.islice(loader, batches):
                    seen += numbers(batch)
                states.append(loader.state_dict())
        assert all(other == states[0] for other in states)
        state = states[-1]
    assert Counter(seen) == dict.fromkeys(range(PAIRS + ALONE), 5)


def test_shares_are_exact_over_time() -> None:
    position, share = order.Position(), order.Fraction(1, 10)
    for _ in range(1000):
        parts = [order.split(position, 7, rank, 3, share) for rank in range(3)]
        assert all(len(part.pairs) + len(part.uncaptioned) == 7 for part in parts)
        pairs = [i for part in parts for i in part.pairs]
        alone = [i for part in parts for i in part.uncaptioned]
        after = parts[0].after
        assert all(part.after == after for part in parts)
        assert pairs == list(range(position.captioned, after.captioned))
        assert alone == list(range(position.uncaptioned, after.uncaptioned))
        assert len(alone) in (2, 3)
        position = after
    assert position == order.Position(18_900, 2_100, 1000)


# resume


def test_resume_is_exact_and_breaks_when_the_state_is_broken(data: Path, tokenizer: Tokenizer) -> None:
    settings = config(data, tokenizer_sampling=0.3)
    expected = take(Loader(settings, tokenizer), 16)
    with Loader(settings, tokenizer) as first:
        for _ in range(9):
            next(first)
        state = json.loads(json.dumps(first.state_dict()))
    assert (state["captioned"], state["uncaptioned"], state["batches"]) == (52, 20, 9)

    def continued(changes: dict[str, int]) -> list[bool]:
        with Loader(settings, tokenizer) as loader:
            loader.load_state_dict({**state, **changes})
            return [equal(next(loader), batch) for batch in expected[9:]]

    assert continued({}) == [True] * 7
    # The same test has to fail when the state is wrong: by one sample, or by what was prefetched but not
    # handed out.
    assert not any(continued({"captioned": 53}))
    assert not any(continued({"uncaptioned": 19}))
    assert not any(continued({"captioned": 52 + 23, "uncaptioned": 20 + 9}))


def test_state_counts_what_was_handed_out(data: Path, tokenizer: Tokenizer) -> None:
    with Loader(config(data, prefetch=7), tokenizer) as loader:
        assert loader.state_dict()["batches"] == 0
        next(loader)
        time.sleep(0.3)  # the pool runs ahead
        state = loader.state_dict()
        assert state["batches"] == 1 and state["captioned"] + state["uncaptioned"] == 8
        second = next(loader)
        loader.load_state_dict(state)  # also in the middle of an iteration
        assert equal(next(loader), second)
        assert loader.epoch == loader.state_dict()["captioned"] / PAIRS


def test_pickle_goes_on_where_the_loader_was(data: Path, tokenizer: Tokenizer) -> None:
    with Loader(config(data), tokenizer) as loader:
        next(loader)
        with pickle.loads(pickle.dumps(loader)) as copy:  # noqa: S301
            assert equal(next(copy), next(loader))


def test_another_share_holds_from_the_resume_on(data: Path, tokenizer: Tokenizer) -> None:
    """No burst of one kind to catch up, no sample lost: 2 of 7 for 7 batches, then 1 of 4."""
    with Loader(config(data), tokenizer) as loader:
        keys = [key for _ in range(7) for key in next(loader).keys]
        state = json.loads(json.dumps(loader.state_dict()))
    assert (state["captioned"], state["uncaptioned"]) == (40, 16)
    with Loader(config(data, uncaptioned_fraction=0.25), tokenizer) as loader:
        loader.load_state_dict(state)
        batches = list(itertools.islice(loader, 6))
        again = json.loads(json.dumps(loader.state_dict()))
        expected = next(loader)
    assert [len(batch.mim_images) for batch in batches] == [2] * 6
    assert len(set(keys)) == PAIRS + ALONE  # one epoch; the next begins where it ended
    assert len({n for batch in batches for n in numbers(batch) if n < PAIRS}) == 36
    with Loader(config(data, uncaptioned_fraction=0.25), tokenizer) as loader:
        loader.load_state_dict(again)
        assert equal(next(loader), expected)


def test_states_of_other_data_are_refused(data: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with Loader(config(data), tokenizer) as loader:
        next(loader)
        state = loader.state_dict()
    other_tokenizer = train_tokenizer(["some other words"] * 9, tmp_path / "o.model", 300)
    three = config(data, shards=tuple(str(data / f"train-{i}.tar") for i in range(3)))
    swapped = config(data, shards=tuple(str(data / f"train-{i}.tar") for i in (1, 0, 2, 3)))
    refusals = [
        (Loader(config(data, seed=5), tokenizer), "seed was 0, is 5"),
        (Loader(config(data), other_tokenizer), "tokenizer was .*, is "),
        (Loader(three, tokenizer), "shards 4 -> 3, captioned 40 -> 30, uncaptioned 16 -> 12, bytes"),
        (Loader(swapped, tokenizer), "other names, order or contents"),
    ]
    for loader, message in refusals:
        with pytest.raises(ValueError, match=message):
            loader.load_state_dict(state)
    with pytest.raises(ValueError, match="version 7; supported is 1"):
        loader.load_state_dict({**state, "version": 7})
    # what may change: batch size, size of the pictures, augmentation
    Loader(config(data, batch_size=3, image_size=64, flip=0.0), tokenizer).load_state_dict(state)
