"""From patterns to the shards that they name: braces, globs, folders, addresses."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataload import remote
from dataload.remote.address import Remote, is_address
from dataload.shards.shard import Address


def expand(patterns: Sequence[str]) -> list[Address]:
    """The tars that the patterns name, in their order; each is a tar, a folder of tars, a glob, or has braces
    ("train-{000..011}.tar", "{train,extra}.tar"), on a disk or behind an address (s3://, gs://, https:// and
    what else fsspec knows). What a glob or folder finds is sorted by name.

    Raises FileNotFoundError when a pattern finds nothing (or one local tar of a brace range is missing; a
    remote one is looked for when it is indexed), ValueError for a tar that is named twice, for pipe:, and for
    no pattern at all, OSError naming the address where a server cannot be asked.
    """
    if isinstance(patterns, str):
        raise ValueError(f"shards is one string, {patterns!r}; a sequence of patterns is needed")
    if not patterns:
        raise ValueError("no shards were given")
    paths: list[Address] = []
    for pattern in map(str, patterns):
        if pattern.startswith("pipe:"):
            raise ValueError(
                f"{pattern!r} is a command; a path or an address is needed (s3://, https:// ...)"
            )
        if pattern.startswith("file://"):
            pattern = pattern.removeprefix("file://")
        for part in _braces(pattern):
            if is_address(part):
                paths.extend(remote.find(part, remote.timeout_default()))
            else:
                paths.extend(_find(os.path.expanduser(part), pattern))
    seen: set[str] = set()
    for path in paths:
        real = path.url if isinstance(path, Remote) else str(path.resolve())
        if real in seen:
            raise ValueError(f"{path} is named twice by the shards {[str(pattern) for pattern in patterns]}")
        seen.add(real)
    return paths


def _braces(pattern: str) -> Iterator[str]:
    """Expands {000..011} (zero-padded as written) and {a,b}, from left to right."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    if match[3] is not None:
        choices = match[3].split(",")
    else:
        first, last, width = int(match[1]), int(match[2]), len(match[1])
        if last < first:
            raise ValueError(f"{match[0]} in {pattern!r} counts down")
        choices = [str(number).zfill(width) for number in range(first, last + 1)]
    for choice in choices:
        yield from _braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _find(part: str, pattern: str) -> list[Path]:
    path = Path(part)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        if not found:
            raise FileNotFoundError(
                f"the folder {part} holds no .tar file; python -m dataload.pack makes shards of pictures and captions"
            )
        return found
    if path.is_file():
        return [path]
    found = sorted(Path(name) for name in glob.glob(part, recursive=True))
    if not found:
        why = f" (from {pattern})" if part != pattern else ""
        if not glob.has_magic(str(path.parent)) and not path.parent.is_dir():
            why += f": there is no folder {path.parent.absolute()}"
        raise FileNotFoundError(f"no shard at {part}{why}")
    return found
