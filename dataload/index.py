"""The command line: python -m dataload.index PATTERN ... writes the indexes of shards and says what they hold."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dataload import shards
from dataload.progress import Progress
from dataload.remote.address import Remote
from dataload.shards import BrokenShard, Cache, ShardIndex, ShardWarning
from dataload.shards.shard import Address, load_shard
from dataload.shards.tarindex import MEDIA

DESCRIPTION = """\
Reads the headers and captions of tar shards once and writes NAME.tar.index beside each (for remote shards: into
the cache). The training loader does the same when it first meets a shard; with the indexes there, it opens
thousands of shards in a second. An index that is there and fits its tar is left as it is.

  python -m dataload.index 'shards/train-{000000..000099}.tar'
  python -m dataload.index s3://bucket/train/

The exit status is 1 where a shard cannot be used at all."""
PATTERNS = (
    "a tar, a folder of tars, a glob or a brace range; a path, or an address (s3://, gs://, https:// ...)"
)
EXCLUDE = "a list of samples to leave out: keys, SHARD/KEY, or lines of a quarantine file"
_SHOWN = 10


def open_all(
    patterns: Sequence[str], exclude: Sequence[Path] = (), rebuild: bool = False
) -> tuple[ShardIndex | None, list[tuple[str, str]]]:
    """An index of all shards that can be used (None if none can), and (shard, reason) of those that cannot.

    Raises what `shards.expand` raises, and OSError or ValueError for the exclude lists.
    """
    cache = Cache()
    paths = shards.expand(patterns)
    good: list[Address] = []
    bad: list[tuple[str, str]] = []

    def load(path: Address) -> str:
        try:
            load_shard(path, cache, fresh=rebuild)
        except (BrokenShard, OSError) as error:
            return str(error) or type(error).__name__
        finally:
            progress.step()
        return ""

    with Progress("shards", len(paths)) as progress, ThreadPoolExecutor(min(8, len(paths))) as pool:
        for path, reason in zip(paths, pool.map(load, paths), strict=True):
            if reason:
                bad.append((path.shown if isinstance(path, Remote) else str(path), reason))
            else:
                good.append(path)
    if not good:
        return None, bad
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShardWarning)  # the tools list the problems themselves
        return shards.index(good, exclude=exclude, cache=cache), bad


def describe(index: ShardIndex) -> str:
    """What shards hold, in a few lines."""
    size = sum(shard.size for shard in index.shards)
    lines = [f"{len(index.shards):,} shards, {size / 2**20:,.1f} MiB: {len(index):,} samples"]
    counts = {kind: int(np.count_nonzero(index.has(kind))) for kind in (*MEDIA, "json")}
    parts = [f"{count:,} with {kind}" for kind, count in counts.items() if count]
    parts.append(f"{int(np.count_nonzero(index.captioned)):,} with captions")
    lines.append("    " + ", ".join(parts))
    if index.excluded:
        lines.append(f"    {index.excluded:,} more are excluded")
    ignored: Counter[str] = Counter()
    for shard in index.shards:
        ignored.update(shard.ignored)
    if ignored:
        others = ", ".join(f"{count:,} .{name}" for name, count in ignored.most_common(5))
        lines.append(f"    other files: {others}".replace(".(no key)", "without a key"))
    return "\n".join(lines)


def listed(title: str, entries: Sequence[str]) -> str:
    """A count and the first few of a list; empty for an empty list."""
    if not entries:
        return ""
    lines = [f"{len(entries):,} {title}:", *(f"    {entry[:300]}" for entry in entries[:_SHOWN])]
    if len(entries) > _SHOWN:
        lines.append(f"    and {len(entries) - _SHOWN:,} more")
    return "\n".join(lines)


def say_problems(index: ShardIndex | None, bad: Sequence[tuple[str, str]]) -> None:
    """Prints what indexing left out."""
    if index is not None:
        print(describe(index))
        if problems := listed("problems", [": ".join(problem) for problem in index.problems]):
            print(problems)
    if unusable := listed("shards cannot be used", [f"{shard}: {reason}" for shard, reason in bad]):
        print(unusable)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dataload.index",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help=PATTERNS)
    parser.add_argument("--rebuild", action="store_true", help="make indexes again that are there and fit")
    parser.add_argument("--exclude", type=Path, action="append", default=[], metavar="FILE", help=EXCLUDE)
    options = parser.parse_args(arguments)
    try:
        index, bad = open_all(options.patterns, options.exclude, options.rebuild)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say_problems(index, bad)
    if index is not None:
        in_memory = sum(shard.store is None for shard in index.shards)
        beside = sum(
            isinstance(shard.path, Path)
            and shard.store is not None
            and shard.store.parent == shard.path.parent
            for shard in index.shards
        )
        kept = len(index.shards) - beside - in_memory
        print(f"indexes: {beside:,} beside their shards, {kept:,} in {Cache().directory}")
        if in_memory:
            print(f"{in_memory:,} indexes could not be written anywhere", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
