"""The training loader.

    shards.expand -> shards.index      which samples there are, with and without captions
    order.split   -> order.Source.at   which of them this rank needs next: a function of (seed, position)
    backends (threads)                 fetch -> decode -> crop -> flip -> caption, tokens, MLM mask | MIM mask
    Loader._collect                    arrays -> Batch

There is no thread but the backend's that draw: `__next__` keeps `prefetch` batches in the pool and waits for the
oldest. So the state is the position after the last batch that the consumer was given, and nothing has to be
drained or undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from dataload import backends, order, shards
from dataload.batch import Batch, EvalBatch
from dataload.broken import Broken, BrokenReport, TooManyBroken
from dataload.evalset import EvalSet
from dataload.order import Position
from dataload.prefetch import Limits, Prefetch, SlowWorkerWarning, WorkerStuck
from dataload.samples import PATCH, Drawn, Job, LoaderConfig, SampleMaker, Work
from dataload.stages import Stages
from dataload.stream import Stream
from dataload.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "Broken",
    "BrokenReport",
    "EvalBatch",
    "EvalSet",
    "Loader",
    "LoaderConfig",
    "SlowWorkerWarning",
    "TooManyBroken",
    "WorkerStuck",
]

STATE_VERSION = 1


STAGES = {
    "fetch": "encoded bytes and captions, by offset from the tar",
    "header": "size and orientation; formats other than JPEG are decoded here",
    "decode": "the crop of a JPEG (of a whole batch, with DALI)",
    "resize": "to a square, jitter, flip",
    "text": "caption, tokens, masked words",
    "mask": "cells hidden from masked image modelling",
    "collect": "arrays to one Batch",
}


@dataclass(frozen=True)
class _Plan:
    """A batch before it is made."""

    pairs: int
    asked: int
    """pairs whose captions masked language modelling reads; they come first"""
    after: Position


class _Planner:
    """What a rank's batches hold. (Apart from the loader, which it must not keep alive.)"""

    def __init__(
        self,
        config: LoaderConfig,
        sources: tuple[order.Source, order.Source],
        share: Fraction,
        rank: int,
        size: int,
    ) -> None:
        self._captioned, self._uncaptioned = sources
        self._batch_size, self._share, self._rank, self._size = config.batch_size, share, rank, size
        self._mlm_share = Fraction(config.mlm_share).limit_denominator(1000)

    def __call__(self, start: Position) -> tuple[_Plan, list[Job]]:
        """The batch that begins at `start`, and its samples: those asked for masked words first."""
        part = order.split(start, self._batch_size, self._rank, self._size, self._share)
        pairs = sorted(part.pairs, key=lambda at: not self._asked(at))
        jobs = [Job(self._captioned, *self._captioned.at(at), True) for at in pairs]
        jobs += [Job(self._uncaptioned, *self._uncaptioned.at(at), False) for at in part.uncaptioned]
        return _Plan(len(pairs), sum(map(self._asked, pairs)), part.after), jobs

    def _asked(self, at: int) -> bool:
        """Whether masked language modelling reads the captioned sample at this place of the stream: `mlm_share` of
        all places, evenly spread, the same on any number of ranks."""
        return int((at + 1) * self._mlm_share) > int(at * self._mlm_share)


class Loader(Stream[Batch]):
    """Training batches of pictures: see `stream.Stream`.

    Raises what `shards.expand` and `shards.index` raise, and ValueError where the data lacks what the config
    asks for.
    """

    def __init__(
        self, config: LoaderConfig, tokenizer: Tokenizer, *, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(tokenizer, rank, world_size)
        self.config = config
        self.index = shards.index(shards.expand(config.shards), exclude=config.exclude)
        self._captioned, self._uncaptioned = (
            order.Source(
                self.index.source(captioned=kind == 0), config.seed, kind, self._ahead.of(self.index.shards)
            )
            for kind in (0, 1)
        )
        self._share = _uncaptioned_share(config, len(self._captioned), len(self._uncaptioned))
        self.stages = Stages(STAGES)
        self._backend = backends.choose(config, SampleMaker(config, self.index, tokenizer, self.stages))
        self.broken = BrokenReport(config.max_broken, config.quarantine)
        self._prefetch: Prefetch[Job, _Plan, Work, Position] = Prefetch(
            Position(),
            _Planner(config, (self._captioned, self._uncaptioned), self._share, rank, world_size),
            self._backend,
            self.stages,
            ahead=config.prefetch if config.workers else 0,
            limits=Limits(config.stall_warning, config.stall_limit),
        )

    @property
    def counts(self) -> dict[str, int]:
        """Samples with and without captions, and shards."""
        return {
            "captioned": len(self._captioned),
            "uncaptioned": len(self._uncaptioned),
            "shards": len(self.index.shards),
        }

    @property
    def backend(self) -> str:
        """What decodes: "cpu", "dali (cpu)", "dali (cuda:0)"."""
        return self._backend.name

    @property
    def pairs(self) -> int:
        """Captioned pictures in this rank's batches: the mean, rounded; exact where the share divides it."""
        return round(self.config.batch_size * (1 - self._share))

    @property
    def epoch(self) -> float:
        """Passes over the captioned samples so far (over the uncaptioned ones where there are no others)."""
        if len(self._captioned):
            return self._prefetch.position.captioned / len(self._captioned)
        return self._prefetch.position.uncaptioned / len(self._uncaptioned)

    def _collect(self, plan: _Plan, work: Work, drawn: Sequence[Drawn]) -> Batch:
        images, pairs = work.images, plan.pairs
        size, length = self.config.image_size, self.config.text_length
        texts = np.empty((3, pairs, self.config.captions_per_image, length), dtype=np.int64)
        masks = np.empty((len(drawn) - pairs, size // PATCH, size // PATCH), dtype=bool)
        for i, one in enumerate(drawn):
            if one.text is not None:
                texts[:, i] = one.text
            else:
                masks[i - pairs] = one.mask
        tokens, mlm_tokens, mlm_targets = (torch.from_numpy(text.reshape(-1, length)) for text in texts)
        masked = plan.asked * self.config.captions_per_image
        return Batch(
            pair_images=images[:pairs],
            tokens=tokens,
            mlm_tokens=mlm_tokens[:masked],
            mlm_targets=mlm_targets[:masked],
            mim_images=images[pairs:],
            mim_mask=torch.from_numpy(masks),
            keys=tuple(self.index.key(one.sample) for one in drawn),
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last batch that was handed out: a few numbers, good for JSON, the
        same on every rank. `load_state_dict` of a fresh loader then gives exactly the batches that would have
        come next."""
        return {
            "version": STATE_VERSION,
            "manifest": dict(self.index.manifest),
            "tokenizer": self.tokenizer.sha,
            "seed": self.config.seed,
            "uncaptioned_share": str(self._share),
            **asdict(self._prefetch.position),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken. The number of ranks and the batch size may differ from then:
        positions count samples of all ranks. So may the share of uncaptioned pictures, which then holds from here
        on. ValueError where the shards, the tokenizer or the seed differ."""
        now = self.state_dict()
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"the loader's state has version {state.get('version')}; supported is {STATE_VERSION}"
            )
        if missing := [name for name in now if name not in state and name != "since"]:
            raise ValueError(f"the loader's state lacks {', '.join(missing)}")
        differences = [
            f"{name} was {state[name]}, is {now[name]}"
            for name in ("seed", "tokenizer")
            if state[name] != now[name]
        ]
        differences += _manifest_differences(state["manifest"], now["manifest"])
        if differences:
            raise ValueError("the loader's state belongs to other data: " + "; ".join(differences))
        self._prefetch.drop()
        consumed = (state["captioned"], state["uncaptioned"])
        same = state["uncaptioned_share"] == now["uncaptioned_share"]
        first, second = state.get("since", (0, 0)) if same else consumed
        self._prefetch.position = Position(*consumed, state["batches"], (first, second))

    def __str__(self) -> str:
        """The stages with what they have cost so far."""
        counts = self.counts
        return (
            f"Loader, rank {self.rank} of {self.world_size}: {counts['captioned']:,} pairs and "
            f"{counts['uncaptioned']:,} uncaptioned pictures in {counts['shards']:,} shards; "
            f"decoded by {self.backend}, {self.config.workers} threads\n{self._costs()}"
        )


def _uncaptioned_share(config: LoaderConfig, captioned: int, uncaptioned: int) -> Fraction:
    """As an exact fraction: a share of 0.1 must not lose a sample to rounding after a million."""
    if config.uncaptioned_fraction is None:
        return Fraction(uncaptioned, captioned + uncaptioned)
    share = Fraction(str(config.uncaptioned_fraction))
    if share > 0 and not uncaptioned:
        raise ValueError(
            f"uncaptioned_fraction is {config.uncaptioned_fraction}, but every sample has a caption"
        )
    if share < 1 and not captioned:
        raise ValueError(
            f"uncaptioned_fraction is {config.uncaptioned_fraction}, but no sample has a caption"
        )
    return share


def _manifest_differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    if then["hash"] == now["hash"]:
        return []
    numbers = [
        f"{name} {then[name]} -> {now[name]}" for name in now if name != "hash" and then[name] != now[name]
    ]
    return [
        "the shards changed: "
        + (", ".join(numbers) or "as many as before, with other names, order or contents")
    ]
