"""Reads shards once and counts what they hold: samples, captions, pictures, sounds, videos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dataload import sandbox, shards
from dataload.broken import BrokenSample
from dataload.progress import Progress
from dataload.shards import ShardIndex
from dataload.stats import looks, media
from dataload.stats.counts import Distribution, words
from dataload.stats.looks import BROKEN, Looks
from dataload.tokenizer import Tokenizer

KINDS = ("image", "audio", "video")
LONG = 500  # characters; a caption of more is listed
LISTED = 30  # of the most frequent words and captions, of what is broken or long


@dataclass
class Captions:
    """The captions of a corpus."""

    per_sample: Counter[int] = field(default_factory=Counter)
    characters: Distribution = field(default_factory=Distribution)
    words: Distribution = field(default_factory=Distribution)
    tokens: Distribution = field(default_factory=Distribution)
    frequent_words: Counter[str] = field(default_factory=Counter)
    texts: Counter[str] = field(default_factory=Counter)
    long: list[tuple[str, int]] = field(default_factory=list)
    """(shard/key, characters), the first LISTED"""
    count_long: int = 0

    def add(self, key: str, texts: Sequence[str]) -> None:
        """Counts one sample's captions."""
        self.per_sample[len(texts)] += 1
        for text in texts:
            found = words(text)
            self.characters.add(len(text))
            self.words.add(len(found))
            self.frequent_words.update(found)
            self.texts[text] += 1
            if len(text) > LONG:
                self.count_long += 1
                if len(self.long) < LISTED:
                    self.long.append((key, len(text)))

    def tokenize(self, tokenizer: Tokenizer) -> None:
        """Counts tokens (BOS and EOS not included)."""
        texts = list(self.texts)
        for start in range(0, len(texts), 10_000):
            some = texts[start : start + 10_000]
            for text, ids in zip(some, tokenizer.encode_many(some), strict=True):
                self.tokens.add(len(ids), self.texts[text])

    def to_json(self) -> dict[str, Any]:
        """Figures, and the most frequent words and captions."""
        told = {
            "count": len(self.characters),
            "different": len(self.texts),
            "per_sample": {str(n): times for n, times in sorted(self.per_sample.items())},
            "characters": self.characters.to_json(),
            "words": self.words.to_json(),
            "long": {"over_characters": LONG, "count": self.count_long, "first": self.long},
            "different_words": len(self.frequent_words),
            "frequent_words": self.frequent_words.most_common(LISTED),
            "frequent_captions": [(t, n) for t, n in self.texts.most_common(LISTED) if n > 1],
        }
        return told | ({"tokens": self.tokens.to_json()} if self.tokens.values else {})


@dataclass
class Timed:
    """Sounds, or videos, by their headers."""

    count: int = 0
    seconds: Distribution = field(default_factory=lambda: Distribution(0.1))
    kinds: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Figures."""
        return {
            "count": self.count,
            "hours": round(sum(v * n for v, n in self.seconds.values.items()) * self.seconds.scale / 3600, 4),
            "seconds": self.seconds.to_json(),
            "kinds": dict(self.kinds.most_common(LISTED)),
            "broken": {"count": len(self.broken), "first": self.broken[:LISTED]},
        }


@dataclass
class Corpus:
    """Everything that was counted, and the looks of every picture."""

    index: ShardIndex
    looks: np.ndarray
    """looks.LOOK [samples]"""
    shards: list[dict[str, Any]] = field(default_factory=list)
    captions: Captions = field(default_factory=Captions)
    formats: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[str, str]] = field(default_factory=list)
    """(shard/key, reason) of pictures"""
    timed: dict[str, Timed] = field(default_factory=lambda: {"audio": Timed(), "video": Timed()})
    uncaptioned_texts: int = 0
    """samples with a txt or json of which no caption came: blank, or not what it should be"""
    notes: list[str] = field(default_factory=list)

    def key(self, sample: int) -> str:
        """'shard/key' of a sample."""
        return self.index.key(sample)

    def has(self, kind: str) -> np.ndarray:
        """bool [samples]."""
        return self.index.has(kind)


def index(patterns: Sequence[str]) -> ShardIndex:
    """The shards that patterns name, indexed, with a bar for many. Errors as in `shards.expand` and `.index`."""
    paths = shards.expand(patterns)
    with Progress("shards indexed", len(paths)) as progress:
        return shards.index(paths, progress=progress.step)


def read(
    found: ShardIndex,
    *,
    hashed: bool,
    tokenizer: Tokenizer | None = None,
    only_looks: bool = False,
    workers: int,
) -> Corpus:
    """Counts a corpus. `hashed`: with perceptual hashes (decodes each picture once; kept beside the shard).
    `only_looks`: pictures alone.

    Raises OSError where a shard is gone or has changed, ImportError where hashing has no imagehash.
    """
    if hashed:
        looks.needs()
    corpus = Corpus(found, np.zeros(len(found), dtype=looks.LOOK))
    first = 0
    with ThreadPoolExecutor(workers) as pool, Progress("samples", len(found)) as progress:
        for shard in found.shards:
            numbers = range(first, first + len(shard))
            seen = _looks_of(corpus, shard, first, hashed, pool, progress)
            corpus.looks[first : first + len(shard)] = seen.rows
            for row, reason in seen.reasons.items():
                corpus.broken.append((corpus.key(first + row), reason))
            for number, times in Counter(seen.rows["format"][seen.rows["width"] > 0].tolist()).items():
                corpus.formats[seen.formats[number]] += times
            if not only_looks:
                _count(corpus, shard, numbers)
            first += len(shard)
    if not only_looks:
        if tokenizer is not None:
            corpus.captions.tokenize(tokenizer)
        lacking = media.missing()
        if lacking and any(timed.count for timed in corpus.timed.values()):
            corpus.notes.append(f"lengths of sounds and videos need {lacking}: pip install 'auroraio[data]'")
    return corpus


def _looks_of(
    corpus: Corpus, shard: Any, first: int, hashed: bool, pool: ThreadPoolExecutor, progress: Progress
) -> Looks:
    pictured = corpus.index.has("image")

    def image(row: int) -> bytes | None:
        return corpus.index.image(first + row) if pictured[first + row] else None

    cache, state = None, ""
    if isinstance(shard.path, Path):
        status = shard.path.stat()
        cache = shard.path.with_name(shard.path.name + ".looks.npz")
        state = f"{status.st_size} {status.st_mtime_ns} {shard.digest}"
    return looks.of_shard(
        image, len(shard), hashed=hashed, cache=cache, key=state, pool=pool, done=progress.step
    )


def _count(corpus: Corpus, shard: Any, numbers: range) -> None:
    found = corpus.index
    held = {kind: found.has(kind)[numbers.start : numbers.stop] for kind in (*KINDS, "txt", "json")}
    captioned = found.captioned[numbers.start : numbers.stop]
    corpus.uncaptioned_texts += int(np.count_nonzero((held["txt"] | held["json"]) & ~captioned))
    for number in numbers:
        key = found.key(number)
        corpus.captions.add(key, found.captions(number) if captioned[number - numbers.start] else ())
        for kind, timed in corpus.timed.items():
            if held[kind][number - numbers.start]:
                _time(found, number, kind, key, timed)
    corpus.shards.append(
        {
            "name": shard.name,
            "bytes": shard.size,
            "samples": len(shard),
            **{kind: int(np.count_nonzero(held[kind])) for kind in KINDS},
            "captioned": int(np.count_nonzero(captioned)),
        }
    )


def _time(found: ShardIndex, number: int, kind: str, key: str, timed: Timed) -> None:
    timed.count += 1
    try:
        header = media.header(found.media(number, kind), kind, sandbox.shared(1))
    except ImportError:
        return  # said once, in Corpus.notes
    except BrokenSample as error:
        timed.broken.append((key, str(error)))
        return
    timed.seconds.add(header.seconds)
    timed.kinds[header.kind] += 1


def tell(corpus: Corpus) -> dict[str, Any]:
    """The corpus as plain data for JSON."""
    rows = corpus.looks[corpus.looks["width"] > 0]
    sides = {"width": rows["width"], "height": rows["height"]}
    sides["shortest side"] = np.minimum(rows["width"], rows["height"])
    told: dict[str, Any] = {
        "shards": corpus.shards,
        "samples": len(corpus.index),
        "bytes": sum(shard["bytes"] for shard in corpus.shards),
        **{kind: sum(shard[kind] for shard in corpus.shards) for kind in KINDS},
        "captioned": sum(shard["captioned"] for shard in corpus.shards),
        "captions": corpus.captions.to_json(),
        "texts_without_caption": corpus.uncaptioned_texts,
    }
    if told["image"]:
        aspects = Distribution(0.05)
        for ratio, times in Counter((rows["width"] / rows["height"]).round(3).tolist()).items():
            aspects.add(ratio, times)
        told["pictures"] = {
            "formats": dict(corpus.formats.most_common()),
            **{name: _distribution(values) for name, values in sides.items()},
            "aspect": aspects.to_json(),
            "broken": {"count": len(corpus.broken), "first": corpus.broken[:LISTED]},
        }
    told |= {kind + "s": timed.to_json() for kind, timed in corpus.timed.items() if timed.count}
    problems = corpus.index.problems
    told["problems"] = {"count": len(problems), "first": problems[:LISTED]}
    told["notes"] = corpus.notes
    return told


def _distribution(values: np.ndarray) -> dict[str, Any]:
    found, times = np.unique(values, return_counts=True)
    return Distribution(values=Counter(dict(zip(found.tolist(), times.tolist(), strict=True)))).to_json()


__all__ = ["BROKEN", "Corpus", "index", "read", "tell"]
