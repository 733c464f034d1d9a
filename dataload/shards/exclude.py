"""Lists of samples to leave out: NAME.tar.exclude beside a shard, or files that are named for a run.

A line is a key, or SHARD/KEY (as `ShardIndex.key` gives it), or a JSON object with "shard" and "key" (as the
quarantine files of the loader and of `python -m dataload.verify` have). Blank lines and lines that start with
# do not count, and neither do entries of the tiers "partial" (it was used) and "fetch" (the disk or the network failed).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dataload.shards.shard import Shard

SUFFIX = ".exclude"


@dataclass
class ExcludeList:
    """What one file lists."""

    source: str
    """the file, for messages"""
    lines: set[str] = field(default_factory=set)
    """KEY or SHARD/KEY"""
    named: dict[str, set[str]] = field(default_factory=dict)
    """keys by the path or address of their shard"""


def parse(text: str, source: str) -> ExcludeList:
    """Reads a list. Raises ValueError, naming file and line, for JSON that names no sample."""
    result = ExcludeList(source)
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if not line.startswith("{"):
            result.lines.add(line)
            continue
        try:
            entry = json.loads(line)
            shard, key = entry["shard"], entry["key"]
        except (ValueError, KeyError, RecursionError) as error:
            raise ValueError(
                f'{source}, line {number}: expected is a key, or JSON with "shard" and "key" ({error!r})'
            ) from None
        if entry.get("tier") in ("partial", "fetch"):
            continue
        if not isinstance(shard, str) or not isinstance(key, str):
            raise ValueError(f'{source}, line {number}: "shard" and "key" must be strings')
        result.named.setdefault(shard, set()).add(key)
    return result


def read(path: Path) -> ExcludeList:
    """Reads a list from a file; OSError where there is none."""
    return parse(path.read_text("utf-8", "surrogateescape"), str(path))


def apply(
    shards: Sequence[Shard], lists: Sequence[ExcludeList]
) -> tuple[list[Shard], list[tuple[str, str, str]]]:
    """The shards without what the lists name, and (list, key, reason) for every entry that matched nothing,
    though its shard is here.

    An entry of JSON is for the shard of that path or address, or else (the data has moved) for those of that
    file name. A line without a shard is for all shards.
    """
    kept = list(shards)
    problems: list[tuple[str, str, str]] = []
    addresses = {shard.shown for shard in shards}
    for one in lists:
        wanted, loose = _by_shard(one, shards, addresses)
        met: set[str] = set()
        unmatched: set[str] = set()
        for place, shard in enumerate(kept):
            keys = wanted.get(place, set())
            if keys or loose:
                kept[place], matched = _without(shard, keys | loose)
                met |= matched
                unmatched |= keys - matched
        for key in sorted(unmatched | (loose - met)):
            problems.append((one.source, key, "excluded, but there is no such sample"))
    return kept, problems


def _by_shard(
    one: ExcludeList, shards: Sequence[Shard], addresses: set[str]
) -> tuple[dict[int, set[str]], set[str]]:
    """Keys by place of their shard, and those for any shard."""
    wanted: dict[int, set[str]] = {}
    moved: dict[str, set[str]] = {}
    for named, keys in one.named.items():
        if named not in addresses:
            moved.setdefault(named.rstrip("/").rsplit("/", 1)[-1], set()).update(keys)
    names = {shard.name for shard in shards}
    by_name: dict[str, set[str]] = {}
    loose: set[str] = set()
    for line in one.lines:
        prefix, slash, rest = line.partition("/")
        if slash and prefix in names:
            by_name.setdefault(prefix, set()).add(rest)
        else:
            loose.add(line)
    for place, shard in enumerate(shards):
        keys = one.named.get(shard.shown, set()) | moved.get(shard.path.name, set())
        keys = keys | by_name.get(shard.name, set())
        if keys:
            wanted[place] = keys
    return wanted, loose


def _without(shard: Shard, keys: set[str]) -> tuple[Shard, set[str]]:
    table = shard.table()
    matched = {row: key for row in range(len(shard.head.flags)) if (key := table.key(row)) in keys}
    rows = np.arange(len(shard.head.flags)) if shard.rows is None else shard.rows
    left = rows[~np.isin(rows, list(matched))]
    return (replace(shard, rows=left) if matched else shard), set(matched.values())
