"""What the training loaders share: an endless stream of batches with a position that can be saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from dataload.broken import BrokenReport, TooManyBroken
from dataload.prefetch import Prefetch
from dataload.shards.ahead import ReadAhead
from dataload.stages import Stages
from dataload.tokenizer import Tokenizer

B = TypeVar("B")
"""a batch"""


class Stream(ABC, Generic[B]):
    """Endless, deterministic batches of one rank.

    The batches depend on the shards, the tokenizer, the config and (rank, world_size), never on threads or timing. The
    global micro-batch (all ranks' batches together) does not depend on how many ranks share it. Iterate, or use it as a
    context manager, which closes it. It can be pickled: the copy goes on from the same position.
    """

    config: Any
    stages: Stages
    broken: BrokenReport
    _prefetch: Prefetch[Any, Any, Any, Any]

    def __init__(self, tokenizer: Tokenizer, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of world_size {world_size}; it must be 0 to {world_size - 1}")
        self.tokenizer, self.rank, self.world_size = tokenizer, rank, world_size
        self._ahead = ReadAhead()

    @abstractmethod
    def _collect(self, plan: Any, work: Any, drawn: Sequence[Any]) -> B:
        """One batch of the samples that were drawn."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last batch that was handed out: a few numbers, good for JSON, the
        same on every rank. `load_state_dict` of a fresh loader then gives exactly the batches that would have
        come next."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken. The number of ranks and the batch size may differ from then:
        positions count samples of all ranks. ValueError where the state belongs to other data."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> B:
        """The next batch. What a worker raised is raised here, and TooManyBroken where `max_broken` is
        exceeded; the position then stays before the batch, so that nothing is skipped by asking again.
        Raises WorkerStuck where no batch comes within `stall_limit`."""
        plan, work, drawn = self._prefetch.oldest()
        try:
            self.broken.add(len(drawn), [broken for one in drawn for broken in one.broken])
        except TooManyBroken:
            self._prefetch.drop()
            raise
        with self.stages("collect"):
            batch = self._collect(plan, work, drawn)
        self._prefetch.taken()
        return batch

    def _costs(self) -> str:
        """The end of `str()`: the stages with what they have cost, and how long the reader waited."""
        batches = self._prefetch.position.batches
        wait = 1e3 * self._prefetch.waited / max(batches, 1)
        return (
            f"{self.stages}\n  {batches:,} batches; the reader waited {wait:.1f} ms for each; {self.broken}"
        )

    def close(self) -> None:
        """Stops the workers; what was prefetched is dropped. The state can still be read."""
        self._ahead.close()
        self._prefetch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (
            type(self), self.config, self.tokenizer, self.rank, self.world_size, self.state_dict()
        )  # fmt: skip


def _rebuild(
    kind: type[Any], config: Any, tokenizer: Tokenizer, rank: int, world_size: int, state: dict[str, Any]
) -> Any:
    loader = kind(config, tokenizer, rank=rank, world_size=world_size)
    loader.load_state_dict(state)
    return loader
