"""Which pictures of a corpus are (nearly) those of another one, or of itself, and which captions are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dataload.files import write_atomically
from dataload.progress import Progress
from dataload.shards import ShardIndex
from dataload.stats import near
from dataload.stats.corpus import LISTED, Corpus
from dataload.stats.counts import same_text
from dataload.stats.looks import FLAT, WHOLE


@dataclass(frozen=True)
class Match:
    """A picture of the corpus, and the one that it is taken for."""

    shard: str
    key: str
    like_shard: str
    like_key: str
    kind: str
    """exact (the same bytes), near, or mirrored"""
    distance: int
    """bits of 64 in which the hashes differ"""
    check: int
    """bits of 256 in which the fine hashes differ"""
    sample: int = field(default=-1, repr=False)
    """numbers in their corpora, for the page"""
    like: int = field(default=-1, repr=False)

    def to_json(self) -> dict[str, Any]:
        """For a line of JSON."""
        told = asdict(self)
        del told["sample"], told["like"]
        return told

    def __str__(self) -> str:
        near_by = "" if self.kind == "exact" else f" ({self.distance} of 64 bits, {self.check} of 256)"
        return f"{Path(self.shard).name} {self.key} = {Path(self.like_shard).name} {self.like_key}: {self.kind}{near_by}"


@dataclass
class Against:
    """What of evaluation data is in a training corpus."""

    matches: list[Match]
    evaluated: int
    """pictures of the evaluation data that could be compared, byte for byte at least"""
    found: int
    """of these, the ones that the corpus has"""
    captions: list[tuple[str, int, int]]
    """(caption, samples of the corpus with it, evaluation samples with it): the same words, most first"""
    captions_found: int
    """evaluation samples of which a caption is in the corpus"""
    captioned: int
    """evaluation samples with a caption"""
    training_samples: int
    """samples of the corpus that match a picture of the evaluation data"""

    @property
    def share(self) -> float:
        """Of the evaluation data's pictures, those that the corpus has too."""
        return self.found / self.evaluated if self.evaluated else 0.0

    def to_json(self) -> dict[str, Any]:
        """Figures and the first few."""
        return {
            "evaluation_pictures": self.evaluated,
            "evaluation_pictures_found": self.found,
            "share": self.share,
            "training_samples": self.training_samples,
            "pairs": len(self.matches),
            "first": [match.to_json() for match in self.matches[:LISTED]],
            "evaluation_captioned": self.captioned,
            "evaluation_captions_found": self.captions_found,
            "captions": self.captions[:LISTED],
        }


@dataclass
class Duplicates:
    """Pictures that a corpus has more than once."""

    matches: list[Match]
    """each extra sample, with the earlier one that it is nearest to"""
    exact: int
    near: int | None
    """extra samples: with the bytes of an earlier one; those that only look like one (None: looks were not compared)"""
    groups: int
    flat: int | None
    """pictures without contrast, compared byte for byte alone (None: as all of them were)"""

    def to_json(self) -> dict[str, Any]:
        """Figures and the first few; null is what was not compared."""
        return {
            "groups": self.groups,
            "exact": self.exact,
            "near": self.near,
            "without_contrast": self.flat,
            "first": [match.to_json() for match in self.matches[:LISTED]],
        }


def _present(rows: np.ndarray) -> np.ndarray:
    """Numbers of the samples with a picture that was read."""
    return np.flatnonzero((rows["state"] == WHOLE) | (rows["state"] == FLAT))


def _by_digest(rows: np.ndarray) -> dict[bytes, list[int]]:
    """Samples by the bytes of their picture, in order."""
    found: dict[bytes, list[int]] = {}
    for sample in _present(rows).tolist():
        found.setdefault(rows["digest"][sample].tobytes(), []).append(sample)
    return found


def _match(
    ours: ShardIndex, sample: int, theirs: ShardIndex, like: int, kind: str, distance: int, check: int
) -> Match:
    return Match(*ours.where(sample), *theirs.where(like), kind, distance, check, sample, like)


def duplicates(corpus: Corpus, *, hashed: bool, distance: int, check: int) -> Duplicates:
    """Pictures with the same bytes, and, if `hashed`, those that look the same. Each extra sample is told once,
    with the earlier one that it is nearest to: without the extra ones no two that are left look the same."""
    rows, index = corpus.looks, corpus.index
    same = _by_digest(rows)
    matches = [
        _match(index, extra, index, first, "exact", 0, 0)
        for first, *others in same.values()
        for extra in others
    ]
    exact, groups = len(matches), sum(len(samples) > 1 for samples in same.values())
    alike: int | None = None
    flat: int | None = None
    if hashed:
        firsts = np.array(sorted(samples[0] for samples in same.values()), dtype=np.int64)
        alone = rows[firsts]
        with Progress("pictures compared", len(alone)) as progress:
            pairs = near.search(alone, alone, distance=distance, check=check, within=True, step=progress.step)
        # Who is near to later ones alone stays: those go.
        nearest: dict[int, int] = {}  # of each extra one, the place of its pair
        for place in np.lexsort((pairs.query, pairs.check)).tolist():
            nearest.setdefault(int(pairs.found[place]), place)
        for extra, place in sorted(nearest.items()):
            kind = "mirrored" if pairs.mirrored[place] else "near"
            first = int(firsts[pairs.query[place]])
            one = (index, int(firsts[extra]), index, first, kind)
            matches.append(_match(*one, int(pairs.distance[place]), int(pairs.check[place])))
        groups = _groups(len(rows), matches)
        alike = len(matches) - exact
        flat = int(np.count_nonzero(rows["state"] == FLAT))
    return Duplicates(matches, exact, alike, groups, flat)


def _groups(count: int, matches: Iterable[Match]) -> int:
    some = [(match.like, match.sample) for match in matches]
    one, other = (np.array([pair[i] for pair in some], dtype=np.int64) for i in (0, 1))
    nothing = np.zeros(len(one), dtype=np.int64)
    return len(near.groups(count, near.Pairs(one, other, nothing, nothing, nothing.astype(bool))))


def against(corpus: Corpus, other: Corpus, *, distance: int, check: int) -> Against:
    """Pictures and captions of the evaluation data `other` that are in the training data `corpus`."""
    ours, theirs = _by_digest(corpus.looks), _by_digest(other.looks)
    our_firsts = np.array([samples[0] for samples in ours.values()], dtype=np.int64)
    their_firsts = np.array([samples[0] for samples in theirs.values()], dtype=np.int64)
    our_groups, their_groups = list(ours.values()), list(theirs.values())
    matches = [
        _match(corpus.index, sample, other.index, like, "exact", 0, 0)
        for digest, likes in theirs.items()
        for like in likes
        for sample in ours.get(digest, ())
    ]
    with Progress("evaluation pictures compared", len(their_firsts)) as progress:
        pairs = near.search(
            other.looks[their_firsts],
            corpus.looks[our_firsts],
            distance=distance,
            check=check,
            step=progress.step,
        )
    for place in range(len(pairs)):
        likes, samples = their_groups[pairs.query[place]], our_groups[pairs.found[place]]
        if other.looks["digest"][likes[0]].tobytes() == corpus.looks["digest"][samples[0]].tobytes():
            continue  # told above
        kind = "mirrored" if pairs.mirrored[place] else "near"
        figures = int(pairs.distance[place]), int(pairs.check[place])
        matches += [
            _match(corpus.index, sample, other.index, like, kind, *figures)
            for like in likes
            for sample in samples
        ]
    matches.sort(key=lambda match: (match.like, match.check, match.sample))
    captions, captions_found, captioned = _captions(corpus.index, other.index)
    return Against(
        matches, len(_present(other.looks)), len({match.like for match in matches}),
        captions, captions_found, captioned, len({match.sample for match in matches}),
    )  # fmt: skip


def _captions(corpus: ShardIndex, other: ShardIndex) -> tuple[list[tuple[str, int, int]], int, int]:
    wanted: dict[str, tuple[str, set[int]]] = {}
    captioned = np.flatnonzero(other.captioned)
    for sample in captioned.tolist():
        for text in other.captions(sample):
            if words := same_text(text):
                wanted.setdefault(words, (text, set()))[1].add(sample)
    met: dict[str, set[int]] = {}
    samples = np.flatnonzero(corpus.captioned).tolist()
    with Progress("samples' captions compared", len(samples)) as progress:
        for sample in samples:
            for text in corpus.captions(sample):
                if (words := same_text(text)) in wanted:
                    met.setdefault(words, set()).add(sample)
            progress.step()
    told = [(wanted[words][0], len(found), len(wanted[words][1])) for words, found in met.items()]
    found = set().union(*(wanted[words][1] for words in met)) if met else set()
    return sorted(told, key=lambda one: (-one[1], one[0])), len(found), len(captioned)


def write_lines(path: Path, matches: Iterable[Match]) -> None:
    """Every match as a line of JSON, atomically."""
    lines = [json.dumps(match.to_json()) for match in matches]
    write_atomically(path, "".join(line + "\n" for line in lines).encode())


def write_excludes(path: Path, matches: Iterable[Match]) -> int:
    """An exclude list of the corpus' samples: a line of JSON each with shard, key and reason, for the loader and
    `python -m dataload.reshard`. Returns how many."""
    reasons: dict[tuple[str, str], str] = {}
    for match in matches:
        said = f"{match.kind} of {match.like_shard}: {match.like_key}"
        reasons.setdefault((match.shard, match.key), said)
    lines = [
        json.dumps({"shard": shard, "key": key, "reason": reason}) for (shard, key), reason in reasons.items()
    ]
    write_atomically(path, "".join(line + "\n" for line in lines).encode())
    return len(lines)
