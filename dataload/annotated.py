"""Batches for tasks: samples with annotations, as training views and as they are scored.

    Items            which samples a task has (or which of their questions), found once
    order.Source.at  which of them comes next: a function of (seed, position)
    maker (threads)  an item -> arrays by name: what a task wants to see of it (train/tasks)
    collate          arrays -> TaskBatch; what varies in length lies one behind the other

It shares the pool, the order, the random numbers and the report of broken samples with `pipeline.Loader`. `TaskSet` gives each
item once, and to each rank its own batches.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from dataload import order, shards, substitute
from dataload.annotations import Annotations, read_annotations
from dataload.broken import Broken, BrokenReport, BrokenSample
from dataload.prefetch import Limits, Prefetch, Work
from dataload.shards import ShardIndex
from dataload.stages import Stages
from dataload.stream import Stream
from dataload.substitute import describe
from dataload.threads import Threads
from dataload.tokenizer import Tokenizer
from dataload.workers import Workers

STATE_VERSION = 1
STAGES = {"make": "fetch, decode, crop, resize, targets", "collect": "arrays to one TaskBatch"}
Arrays = Mapping[str, np.ndarray]


class Item(NamedTuple):
    """One thing to learn from or to score: a sample of the index, and which of its questions (0 where there are none)."""

    sample: int
    part: int


Maker = Callable[["Items", Item, np.random.Generator | None], Arrays]
"""(items, item, the item's own random numbers; None: as it is scored) -> arrays by name. Raises BrokenSample or OSError."""


class Items:
    """The items of some shards: every sample that states what is needed. Raises what `shards.expand` and `shards.index`
    raise, and ValueError where there is none."""

    def __init__(
        self,
        patterns: Sequence[str],
        needs: Sequence[str],
        *,
        media: str = "image",
        each: Callable[[Annotations], int] = lambda _: 1,
        most: int | None = None,
        keep: Callable[[Annotations], bool] = lambda _: True,
        usable: Callable[[Annotations, int], bool] = lambda *_: True,
        exclude: Sequence[str] = (),
    ) -> None:
        """needs: of `annotations.KINDS`, or "captions". each: parts of a sample. most: only the first samples. keep: which
        samples count; it is asked in order, once. usable: which parts (0, 1, ...) are items."""
        self.index: ShardIndex = shards.index(shards.expand(patterns), exclude=exclude)
        self.lacking = 0
        """samples without what is needed, and those without any item"""
        self.unusable = 0
        """parts of the other samples that are no items"""
        self.broken: list[Broken] = []
        """samples whose annotations cannot be read"""
        able, found = self.index.has(media), 0
        samples: list[Item] = []
        for sample in range(len(self.index)):
            if most is not None and found >= most:
                break
            if not able[sample] or (one := self._read(sample)) is None:
                self.lacking += not able[sample]
                continue
            has = one.has | ({"captions"} if one.captions else frozenset())
            if not has.issuperset(needs):
                self.lacking += 1
            elif keep(one):
                all_parts = range(each(one))
                parts = [part for part in all_parts if usable(one, part)]
                self.unusable += len(all_parts) - len(parts) if parts else 0
                self.lacking += not parts
                found += bool(parts)
                samples += [Item(sample, part) for part in parts]
        self.items = samples
        self.samples = found
        if not samples:
            raise ValueError(
                f"none of the {len(self.index):,} samples of {list(map(str, patterns))} has {media} and "
                f"{' and '.join(needs) or 'anything'} that can be used; python -m dataload.pack writes it"
            )

    def _read(self, sample: int) -> Annotations | None:
        try:
            return read_annotations(self.index, sample, label_map=False)
        except BrokenSample as error:
            self.broken.append(describe(self.index, sample, str(error), "decode"))
            return None

    def __len__(self) -> int:
        return len(self.items)

    def first(self, samples: int | None) -> int:
        """How many items the first so many samples have together (None: all)."""
        if samples is None or samples >= self.samples:
            return len(self.items)
        chosen = list(dict.fromkeys(item.sample for item in self.items))[:samples]
        return sum(item.sample <= chosen[-1] for item in self.items) if chosen else 0

    def annotations(self, item: Item, *, label_map: bool = False) -> Annotations:
        """What is known of the item's sample. Errors as for `read_annotations`."""
        return read_annotations(self.index, item.sample, label_map=label_map)

    def all(self) -> Iterator[Annotations]:
        """The annotations of each sample once, in order."""
        for sample in dict.fromkeys(item.sample for item in self.items):
            yield read_annotations(self.index, sample, label_map=False)

    def per_shard(self) -> list[np.ndarray]:
        """Numbers of the items (0..len-1) of each shard, as `order.Source` wants them."""
        ends = np.cumsum([len(shard) for shard in self.index.shards])
        of_item = np.searchsorted(ends, [item.sample for item in self.items], side="right")
        return [np.flatnonzero(of_item == number) for number in range(len(self.index.shards))]


@dataclass(frozen=True)
class TaskBatch:
    """One micro-batch of one rank. Arrays that vary in length are packed along their first axis, and NAME_sample int64 says
    which row of the batch each of their entries belongs to."""

    values: dict[str, torch.Tensor]
    items: tuple[int, ...]
    """numbers of the items"""
    keys: tuple[str, ...]
    """'shard-name/sample-key' of each row"""

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.values[name]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TaskBatch:
        """The same batch with its tensors on `device`."""
        return replace(
            self, values={name: x.to(device, non_blocking=non_blocking) for name, x in self.values.items()}
        )

    def pin_memory(self) -> TaskBatch:
        """The same batch in page-locked memory."""
        return replace(self, values={name: x.pin_memory() for name, x in self.values.items()})


def collate(
    rows: Sequence[Arrays], ragged: Iterable[str], items: Sequence[int], keys: Sequence[str]
) -> TaskBatch:
    """Rows of a batch -> the batch; `ragged` names what varies in length."""
    values: dict[str, torch.Tensor] = {}
    packed = frozenset(ragged)
    for name in rows[0]:
        arrays = [row[name] for row in rows]
        if name in packed:
            values[name] = torch.from_numpy(np.concatenate(arrays))
            lengths = torch.tensor([len(array) for array in arrays])
            values[f"{name}_sample"] = torch.arange(len(arrays)).repeat_interleave(lengths)
        else:
            values[name] = torch.from_numpy(np.stack(arrays))
    return TaskBatch(values, tuple(items), tuple(keys))


@dataclass(frozen=True)
class LoadingConfig:
    """How a `TaskLoader` works; what a view looks like is its maker's affair."""

    batch_size: int
    """items per rank and micro-step"""
    seed: int = 0
    workers: int = 2
    """threads; 0 = in the calling thread"""
    prefetch: int = 4
    """batches prepared ahead"""
    max_broken: float = 0.05
    """the run stops when more than this share of the samples is broken (judged from 20 on)"""
    quarantine: str = ""
    """file to which broken samples are appended; empty = none"""
    stall_warning: float = 60.0
    stall_limit: float = 600.0
    """seconds, as in `samples.LoaderConfig`"""


class _Drawn(NamedTuple):
    item: int
    arrays: Arrays
    broken: list[Broken]


class _Plan(NamedTuple):
    after: order.Position


class _Attempt(substitute.Attempt):
    """Items in place of samples: a broken one is described by its sample, its substitute is another item."""

    def __init__(
        self, items: Items, wanted: int, source: order.Source, rng: Callable[[], np.random.Generator]
    ) -> None:
        super().__init__(wanted, source, rng, items.index)
        self._items = items

    def fail(self, error: BrokenSample | OSError) -> None:
        item = self.sample
        self.sample = self._items.items[item].sample
        super().fail(error)


class _Backend:
    """Each thread makes a share of the batch."""

    def __init__(
        self, items: Items, source: order.Source, maker: Maker, config: LoadingConfig, stages: Stages
    ) -> None:
        self._items, self._source, self._maker, self._seed, self._stages = (
            items,
            source,
            maker,
            config.seed,
            stages,
        )
        self._threads = Threads(config.workers, "dataload-task")
        self.dead, self.close, self.abandon = self._threads.dead, self._threads.close, self._threads.abandon

    def submit(self, jobs: Sequence[tuple[int, int]]) -> Work[_Drawn]:
        return Work(self._threads.share(self._draw, jobs))

    def _draw(self, jobs: Sequence[tuple[int, int]]) -> list[_Drawn]:
        drawn = []
        with self._stages.idle():
            for epoch, number in jobs:
                self._threads.check()
                drawn.append(self._one(epoch, number))
        return drawn

    def _one(self, epoch: int, number: int) -> _Drawn:
        attempt = _Attempt(
            self._items,
            number,
            self._source,
            lambda: order.generator(self._seed, epoch, number, order.SUBSTITUTE),
        )
        while True:
            item = self._items.items[attempt.sample]
            self._stages.begin(self._items.index.key(item.sample))
            try:
                with self._stages("make"):
                    rng = order.generator(self._seed, epoch, attempt.sample, order.IMAGE)
                    return _Drawn(attempt.sample, self._maker(self._items, item, rng), attempt.broken)
            except (BrokenSample, OSError) as error:
                attempt.fail(error)


class TaskLoader(Stream[TaskBatch]):
    """Endless training batches of `items` as `maker` makes them: see `stream.Stream`."""

    def __init__(
        self,
        config: LoadingConfig,
        items: Items,
        maker: Maker,
        tokenizer: Tokenizer,
        *,
        ragged: Iterable[str] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(tokenizer, rank, world_size)
        self.config, self.items, self.ragged = config, items, frozenset(ragged)
        self.stages = Stages(STAGES)
        self.broken = BrokenReport(config.max_broken, config.quarantine)
        source = order.Source(items.per_shard(), config.seed, 0, self._ahead.of(items.index.shards))

        def plan(start: order.Position) -> tuple[_Plan, list[tuple[int, int]]]:
            part = order.split(start, config.batch_size, rank, world_size, Fraction(0))
            return _Plan(part.after), [source.at(place) for place in part.pairs]

        self._prefetch: Prefetch[tuple[int, int], _Plan, Work[_Drawn], order.Position] = Prefetch(
            order.Position(),
            plan,
            _Backend(items, source, maker, config, self.stages),
            self.stages,
            ahead=config.prefetch if config.workers else 0,
            limits=Limits(config.stall_warning, config.stall_limit),
        )

    @property
    def counts(self) -> dict[str, int]:
        """Items, the samples that they belong to, and shards."""
        return {
            "items": len(self.items),
            "samples": self.items.samples,
            "shards": len(self.items.index.shards),
        }

    def _collect(self, plan: _Plan, work: Work[_Drawn], drawn: Sequence[_Drawn]) -> TaskBatch:
        numbers = [one.item for one in drawn]
        keys = [self.items.index.key(self.items.items[number].sample) for number in numbers]
        return collate([one.arrays for one in drawn], self.ragged, numbers, keys)

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "manifest": dict(self.items.index.manifest),
            "items": len(self.items),
            "tokenizer": self.tokenizer.sha,
            "seed": self.config.seed,
            **asdict(self._prefetch.position),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        now = self.state_dict()
        fixed = ("version", "manifest", "items", "tokenizer", "seed")
        if wrong := [
            f"{name} was {state.get(name)}, is {now[name]}" for name in fixed if state.get(name) != now[name]
        ]:
            raise ValueError("the loader's state belongs to other data: " + "; ".join(wrong))
        self._prefetch.drop()
        self._prefetch.position = order.Position(
            state["captioned"], state["uncaptioned"], state["batches"], tuple(state["since"])
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("a TaskLoader cannot be pickled: its maker is a function of the task")


class TaskSet:
    """All items once, in order, as they are scored. Iterate as often as wanted. Broken ones are left out and listed."""

    def __init__(
        self, items: Items, maker: Maker, *, ragged: Iterable[str] = (), batch_size: int = 32, workers: int = 2
    ) -> None:  # fmt: skip
        self.items, self.maker, self.ragged = items, maker, frozenset(ragged)
        self.batch_size, self.workers = batch_size, max(1, workers)
        self.broken: list[Broken] = list(items.broken)  # whose annotations cannot be read; pictures follow
        """samples that could not be read, each once"""

    def __len__(self) -> int:
        return len(self.items)

    def batches(self, rank: int = 0, world_size: int = 1, most: int | None = None) -> Iterator[TaskBatch]:
        """This rank's batches of the first `most` items. Which items share a batch does not depend on the number of ranks,
        so that neither do scores."""
        count = min(len(self.items), most if most is not None else len(self.items))
        starts = deque(range(0, count, self.batch_size))
        starts = deque(start for i, start in enumerate(starts) if i % world_size == rank)
        pending: deque[tuple[range, list[Future[Arrays | Broken]]]] = deque()
        workers = Workers(self.workers, threading.Event(), "dataload-task-eval")
        try:
            while starts or pending:
                while starts and len(pending) < 3:
                    start = starts.popleft()
                    numbers = range(start, min(start + self.batch_size, count))
                    pending.append((numbers, [workers.submit(self._one, number) for number in numbers]))
                numbers, futures = pending.popleft()
                whole, kept = [], []
                for number, future in zip(numbers, futures, strict=True):
                    made = future.result()
                    if not isinstance(made, Broken):
                        whole.append(made)
                        kept.append(number)
                    elif made not in self.broken:
                        self.broken.append(made)
                if whole:
                    keys = [self.items.index.key(self.items.items[number].sample) for number in kept]
                    yield collate(whole, self.ragged, kept, keys)
        finally:  # also when the reader stops half way
            workers.close()

    def _one(self, number: int) -> Arrays | Broken:
        item = self.items.items[number]
        try:
            return self.maker(self.items, item, None)
        except (BrokenSample, OSError) as error:
            return describe(self.items.index, item.sample, str(error), "decode")
