"""What became of every sample: counted while packing, printed, and kept in dataset.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dataload.pack.source import Picture

LISTING = "dataset.json"


@dataclass(frozen=True)
class Outcome:
    """What became of one sample of the source; a line of the journal holds many."""

    digest: str = ""
    """of its files, in hexadecimal; empty for a sample that was not packed"""
    kinds: tuple[str, ...] = ()
    """of its media: image, audio, video"""
    size: int = 0
    """bytes of its media as they were packed"""
    change: str = ""
    missing: bool = False
    broken: str = ""

    def to_json(self) -> list[Any]:
        """For the journal."""
        if self.missing:
            return ["missing"]
        if self.broken:
            return ["broken", self.broken]
        return ["packed", self.digest, " ".join(self.kinds), self.size, self.change]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Outcome:
        """The inverse of `to_json`."""
        if data[0] == "missing":
            return cls(missing=True)
        if data[0] == "broken":
            return cls(broken=data[1])
        return cls(data[1], tuple(data[2].split()), data[3], data[4])


@dataclass
class SplitSummary:
    """What one split holds."""

    samples: int = 0
    pictures: int = 0
    """samples with a picture; likewise sounds and videos"""
    sounds: int = 0
    videos: int = 0
    captioned: int = 0
    uncaptioned: int = 0
    labelled: int = 0
    """samples with a label"""
    captions: int = 0
    objects: int = 0
    """boxes, with masks or without; likewise questions and regions"""
    questions: int = 0
    regions: int = 0
    label_maps: int = 0
    bytes: int = 0
    shards: list[str] = field(default_factory=list)

    def add(self, picture: Picture, outcome: Outcome) -> None:
        """Counts one packed sample."""
        self.samples += 1
        self.pictures += "image" in outcome.kinds
        self.sounds += "audio" in outcome.kinds
        self.videos += "video" in outcome.kinds
        self.captions += len(picture.captions)
        self.captioned += bool(picture.captions)
        self.uncaptioned += not picture.captions
        self.labelled += "label" in picture.facts or bool(picture.facts.get("labels"))
        self.objects += len(picture.facts.get("objects", ()))
        self.questions += len(picture.facts.get("questions", ()))
        self.regions += len(picture.facts.get("regions", ()))
        self.label_maps += picture.label_map is not None
        self.bytes += outcome.size

    @property
    def holds(self) -> str:
        """Its samples in words."""
        if self.pictures == self.samples and not self.sounds and not self.videos:
            return f"{self.pictures:,} pictures"
        parts = {"pictures": self.pictures, "sounds": self.sounds, "videos": self.videos}
        return f"{self.samples:,} samples ({', '.join(f'{n:,} {name}' for name, n in parts.items() if n)})"


@dataclass
class Summary:
    """What was packed, and what was not and why; `dataset.json` holds the same."""

    kind: str
    splits: dict[str, SplitSummary] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    """pictures that were converted or resized, by what was done"""
    missing: list[str] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason)"""
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    """(name, name of the earlier sample with the same bytes); these are packed all the same"""
    across_splits: int = 0
    """duplicates whose earlier sample is in another split"""
    notes: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)
    """files beside the shards that belong to them: classes.json"""

    def account(self, picture: Picture, outcome: Outcome, seen: dict[str, Picture]) -> None:
        """Notes what became of a sample. `seen`: the first sample of each digest."""
        if outcome.missing:
            self.missing.append(picture.name)
            return
        if outcome.broken:
            self.broken.append((picture.name, outcome.broken))
            return
        self.splits.setdefault(picture.split, SplitSummary()).add(picture, outcome)
        earlier = seen.setdefault(outcome.digest, picture)
        if earlier is not picture:
            self.duplicates.append((picture.name, earlier.name))
            self.across_splits += earlier.split != picture.split
        if outcome.change:
            self.changes[outcome.change] = self.changes.get(outcome.change, 0) + 1

    def __str__(self) -> str:
        lines = []
        for name, split in self.splits.items():
            lines.append(f"{name}: {split.holds}, {split.bytes / 2**20:,.1f} MiB")
            lines.append(
                f"    {split.captioned:,} with {split.captions:,} captions, {split.uncaptioned:,} without"
                + (f", {split.labelled:,} with a label" if split.labelled else "")
            )
            annotated = {
                "objects": split.objects, "questions": split.questions, "regions": split.regions,
                "label maps": split.label_maps,
            }  # fmt: skip
            if any(annotated.values()):
                lines.append(
                    "    " + ", ".join(f"{count:,} {name}" for name, count in annotated.items() if count)
                )
            lines.append(f"    in {', '.join(split.shards[:1] + split.shards[1:][-1:])}")
            if len(split.shards) > 2:
                lines[-1] = lines[-1].replace(", ", " ... ") + f" ({len(split.shards):,} shards)"
        lines += [f"{count:,} pictures were {change}" for change, count in sorted(self.changes.items())]
        lines += self.notes
        for title, entries in self._lists().items():
            if entries:
                lines.append(f"{len(entries):,} {title}:")
                lines += [f"    {entry[:200]}" for entry in entries[:10]]
                if len(entries) > 10:
                    lines.append(f"    ... all are listed in {LISTING}")
        return "\n".join(lines)

    def _lists(self) -> Mapping[str, list[str]]:
        lists = dict(self.problems)
        things = "pictures" if all(s.samples == s.pictures for s in self.splits.values()) else "samples"
        lists[f"{things} missing on disk, not packed"] = self.missing
        lists[f"broken {things}, not packed"] = [f"{name}: {reason}" for name, reason in self.broken]
        across = f" ({self.across_splits:,} of them in another split)" if self.across_splits else ""
        lists[f"{things} with the same bytes as an earlier one{across}, packed all the same"] = [
            f"{name} = {earlier}" for name, earlier in self.duplicates
        ]
        return lists
