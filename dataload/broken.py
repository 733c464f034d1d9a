"""Samples that could not be used: counted, listed, and the run stopped when they are too many."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

_JUDGED_FROM = 20
"""tried samples, before the share of broken ones can stop a run"""


class BrokenSample(ValueError):
    """The bytes are nothing that can be used; the message says why. Decoders raise one of its subclasses for
    bytes from outside, and nothing else."""


class BrokenAudio(BrokenSample):
    """The bytes are no sound that can be used; the message says why."""


class CannotSeek(BrokenAudio):
    """A place cannot be reached but by decoding all before it."""


class BrokenVideo(BrokenSample):
    """The bytes are no video that can be used; the message says why."""


class TooManyBroken(RuntimeError):
    """The share of broken samples is over the limit."""


@dataclass(frozen=True)
class Broken:
    """A sample that could not be used."""

    shard: str
    key: str
    reason: str
    tier: str = "decode"
    """where it showed: fetch (the bytes did not come), decode (they are nothing that can be used), or partial (they were
    used as far as they are whole)"""
    offset: int = -1
    """of the sample's first file in the tar; -1 where it is not known"""

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}"


@dataclass
class BrokenReport:
    """Broken samples among those that a loader has delivered (or tried in place of others)."""

    limit: float
    """largest share of broken samples; more stop the run"""
    quarantine: str = ""
    """file to which each broken sample is appended once, as a line of JSON; empty = none. Raises OSError where it cannot
    be written to"""
    tried: int = 0
    """samples, substitutes included"""
    count: int = 0
    """times a broken one was met; one sample counts again in every epoch"""
    partial: int = 0
    """times a sample was used of which a part is missing; these do not stop a run"""
    samples: list[Broken] = field(default_factory=list)
    """each broken or partial sample once"""
    _seen: set[Broken] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        if self.quarantine:  # now, not at the first broken sample
            folder = Path(self.quarantine).absolute().parent
            there = next(one for one in (folder, *folder.parents) if one.exists())
            if not (there.is_dir() and os.access(there, os.W_OK)):
                raise OSError(f"quarantine {self.quarantine}: {there} is no folder that can be written to")

    @property
    def share(self) -> float:
        """count / tried"""
        return self.count / max(self.tried, 1)

    def add(self, whole: int, found: Sequence[Broken]) -> None:
        """Counts a batch of `whole` samples, and what was found broken or partial on the way to them. Raises
        TooManyBroken, naming the first few, over the limit."""
        broken = sum(one.tier != "partial" for one in found)
        self.tried += whole + broken
        self.count += broken
        self.partial += len(found) - broken
        for one in found:
            if one not in self._seen:
                self._seen.add(one)
                self.samples.append(one)
                self._write(one)
        if self.tried >= _JUDGED_FROM and self.share > self.limit:
            raise TooManyBroken(
                f"{self}. The limit (max_broken) is a share of {self.limit:g}. With a higher one the run can be resumed; with "
                "these samples excluded its order is another one, and it begins anew."
            )

    def _write(self, one: Broken) -> None:
        if self.quarantine:
            Path(self.quarantine).parent.mkdir(parents=True, exist_ok=True)
            with open(self.quarantine, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(one)) + "\n")

    def __str__(self) -> str:
        few = "; ".join(str(one) for one in self.samples[:5])
        more = f"; and {len(self.samples) - 5} more" if len(self.samples) > 5 else ""
        partial = f", {self.partial} used in part" if self.partial else ""
        return f"{self.count} of {self.tried} samples are broken{partial}" + (f": {few}{more}" if few else "")
