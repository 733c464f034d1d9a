"""The multimodal loader.

    schedule.split                 which source gives each sample: exact shares, a function of the counts alone
    order.Source.at                which sample of the source comes next: a function of (seed, position)
    ClipMaker.draw (threads)       fetch -> decode picture, sound, video -> crops, segments -> caption, tokens, masks
    collate                        arrays -> MultimodalBatch, without padding

It shares the pool, the order, the random numbers and the report of broken samples with `pipeline.Loader`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dataload.broken import BrokenReport
from dataload.multimodal.batch import MultimodalBatch
from dataload.multimodal.config import MixtureConfig
from dataload.multimodal.origin import Origin
from dataload.multimodal.sample import Clip, ClipMaker, collate
from dataload.prefetch import Limits, Prefetch, Work
from dataload.schedule import Progress, Schedule, Share, shares, split
from dataload.stages import Stages
from dataload.stream import Stream
from dataload.threads import Threads
from dataload.tokenizer import Tokenizer

STATE_VERSION = 1
STAGES = {
    "fetch": "encoded bytes and captions, by offset from the tar",
    "image": "decode, random crop, resize, jitter, flip",
    "audio": "decode a segment, to mono at 16 kHz",
    "video": "decode frames and sound track, crop, resize, flip",
    "text": "caption, tokens, masked words",
    "collect": "arrays to one MultimodalBatch",
}


class _Job(NamedTuple):
    source: int
    epoch: int
    sample: int


@dataclass(frozen=True)
class _Planner:
    """What a rank's batches hold. (Apart from the loader, which it must not keep alive.)"""

    origins: Sequence[Origin]
    schedule: Schedule
    batch_size: int
    rank: int
    world_size: int

    def __call__(self, start: Progress) -> tuple[Share, list[_Job]]:
        share = split(start, self.schedule, self.batch_size, self.rank, self.world_size)
        return share, [_Job(source, *self.origins[source].stream.at(place)) for source, place in share.places]


class _Backend:
    """Each thread makes a share of the batch."""

    def __init__(self, maker: ClipMaker, origins: Sequence[Origin], workers: int) -> None:
        self._maker, self._origins = maker, origins
        self._threads = Threads(workers, "dataload")
        self.dead, self.close, self.abandon = self._threads.dead, self._threads.close, self._threads.abandon

    def submit(self, jobs: Sequence[_Job]) -> Work[Clip]:
        return Work(self._threads.share(self._draw, jobs))

    def _draw(self, jobs: Sequence[_Job]) -> list[Clip]:
        clips = []
        with self._maker.stages.idle():
            for job in jobs:
                self._threads.check()
                origin = self._origins[job.source]
                clips.append(self._maker.draw(origin, job.source, job.epoch, job.sample))
        return clips


class MixtureLoader(Stream[MultimodalBatch]):
    """Batches from several sources: see `stream.Stream`.

    Raises what `shards.expand` and `shards.index` raise, and ValueError for a source without a usable sample.
    """

    def __init__(
        self, config: MixtureConfig, tokenizer: Tokenizer, *, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(tokenizer, rank, world_size)
        self.config = config
        self.origins = [
            Origin(name, source, config.seed, i, self._ahead)
            for i, (name, source) in enumerate(config.sources.items())
        ]
        self.shares = shares({name: source.weight for name, source in config.sources.items()})
        """the exact share of each source among the samples"""
        self.stages = Stages(STAGES)
        self.broken = BrokenReport(config.max_broken, config.quarantine)
        self._broken_of: Counter[str] = Counter()
        maker = ClipMaker(config, tokenizer, self.stages)
        self._prefetch: Prefetch[_Job, Share, Work[Clip], Progress] = Prefetch(
            Progress((0,) * len(self.origins)),
            _Planner(self.origins, Schedule(list(self.shares.values())), config.batch_size, rank, world_size),
            _Backend(maker, self.origins, config.workers),
            self.stages,
            ahead=config.prefetch if config.workers else 0,
            limits=Limits(config.stall_warning, config.stall_limit),
        )

    @property
    def counters(self) -> dict[str, dict[str, float]]:
        """For each source: its samples, those left out, its share, how many samples all ranks have consumed, the
        passes over it, and how many broken ones this rank has met."""
        consumed = self._prefetch.position.consumed
        return {
            one.name: {
                "samples": len(one.stream),
                "left_out": one.left_out,
                "share": float(self.shares[one.name]),
                "consumed": done,
                "epoch": done / len(one.stream),
                "broken": self._broken_of[one.name],
            }
            for one, done in zip(self.origins, consumed, strict=True)
        }

    def _collect(self, plan: Share, work: Work[Clip], drawn: Sequence[Clip]) -> MultimodalBatch:
        for clip in drawn:
            self._broken_of[self.origins[clip.source].name] += sum(
                one.tier != "partial" for one in clip.broken
            )
        keys = tuple(self.origins[clip.source].index.key(clip.sample) for clip in drawn)
        return collate(self.config, drawn, keys)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last batch that was handed out: a few numbers per source, good for JSON,
        the same on every rank."""
        position = self._prefetch.position
        return {
            "version": STATE_VERSION,
            "tokenizer": self.tokenizer.sha,
            "seed": self.config.seed,
            "batches": position.batches,
            "sources": {
                one.name: {
                    "manifest": dict(one.index.manifest),
                    "usable": len(one.stream),
                    "share": str(self.shares[one.name]),
                    "consumed": done,
                }
                for one, done in zip(self.origins, position.consumed, strict=True)
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken, on any number of ranks and with any batch size. ValueError where the
        tokenizer, the seed, or a source (its name, shards, usable samples or share) differs."""
        now = self.state_dict()
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"the loader's state has version {state.get('version')}; supported is {STATE_VERSION}"
            )
        differences = [
            f"{name} was {state[name]}, is {now[name]}"
            for name in ("seed", "tokenizer")
            if state[name] != now[name]
        ]
        if list(state["sources"]) != list(now["sources"]):
            differences.append(f"the sources were {list(state['sources'])}, are {list(now['sources'])}")
        else:
            for name, then in state["sources"].items():
                mine = now["sources"][name]
                differences += [
                    f"{name}: {what} was {then[what]}, is {mine[what]}"
                    for what in ("manifest", "usable", "share")
                    if then[what] != mine[what]
                ]
        if differences:
            raise ValueError("the loader's state belongs to other data: " + "; ".join(differences))
        self._prefetch.drop()
        consumed = tuple(one["consumed"] for one in state["sources"].values())
        self._prefetch.position = Progress(consumed, state["batches"])

    def __str__(self) -> str:
        """The sources, and the stages with what they have cost so far."""
        lines = [
            f"MixtureLoader, rank {self.rank} of {self.world_size}: {len(self.origins)} sources, "
            f"{self.config.workers} threads"
        ]
        width = max(len(one.name) for one in self.origins)
        for name, c in self.counters.items():
            left = f", {c['left_out']:,} left out" if c["left_out"] else ""
            lines.append(
                f"  {name.ljust(width)}  {100 * c['share']:5.1f}%  {c['samples']:,} samples{left}; "
                f"{c['consumed']:,} consumed (epoch {c['epoch']:.2f}), {c['broken']:,} broken"
            )
        return "\n".join([*lines, self._costs()])
