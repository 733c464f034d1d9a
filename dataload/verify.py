"""The command line: python -m dataload.verify PATTERN ... decodes every file of shards and lists what is broken."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from dataload import images
from dataload.broken import Broken, BrokenSample
from dataload.index import EXCLUDE, PATTERNS, listed, open_all, say_problems
from dataload.progress import Progress
from dataload.sandbox import Sandbox
from dataload.shards import ShardIndex
from dataload.shards.tarindex import BIT
from dataload.substitute import describe

DESCRIPTION = """\
Decodes every picture, sound and video of tar shards, each in a child process that a damaged file may crash, and
reads every caption. What is broken is listed, and written to a quarantine file: one line of JSON per sample, with
shard, key, reason, tier and offset. Such a file is an exclude list: put it beside a shard as NAME.tar.exclude, or
give it to `python -m dataload.reshard --exclude`.

  python -m dataload.verify 'shards/train-*.tar' --quarantine broken.jsonl

The exit status is 0 where everything decodes and indexing left nothing out, and 1 otherwise."""


@dataclass(frozen=True)
class Check:
    """How one kind of file is decoded."""

    function: str
    """what the child runs: (bytes, max_pixels) -> what is missing"""
    modules: tuple[str, ...]
    """what has to be installed for it"""


CHECKS = {
    "image": Check("dataload.verify_checks:image", ("PIL", "dataload.images")),
    "audio": Check("dataload.verify_checks:audio", ("soundfile", "soxr", "av", "dataload.audio")),
    "video": Check("dataload.verify_checks:video", ("soundfile", "soxr", "av", "dataload.video")),
}


def missing(kind: str) -> str:
    """What has to be installed before files of a kind can be decoded; empty: nothing."""
    absent = [name for name in CHECKS[kind].modules if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(absent)} (pip install 'auroraio[data]')" if absent else ""


def verify(
    index: ShardIndex,
    kinds: Sequence[str],
    *,
    workers: int,
    timeout: float,
    max_pixels: int = images.MAX_PIXELS,
    progress: Progress | None = None,
) -> Iterator[Broken]:
    """Every sample of which a file is broken, in the order of the index.

    kinds: those of `CHECKS` to decode. workers: child processes. timeout: seconds for one file. A file that
    does not come, that crashes its decoder, or takes too long is broken too.
    """

    def look(sample: int) -> Broken | None:
        tier = "fetch"
        try:
            for kind in kinds:
                if flags[sample] & BIT[kind]:
                    tier = "fetch"
                    data = index.media(sample, kind)
                    tier = "decode"
                    check = CHECKS[kind]
                    problem = sandbox.call(
                        check.function, data, max_pixels, timeout=timeout, needs=check.modules
                    )
                    if problem:
                        return describe(index, sample, f"{kind}: {problem}", "partial")
            tier = "fetch"
            index.captions(sample)
        except (BrokenSample, OSError) as error:
            return describe(index, sample, str(error), tier)
        return None

    flags = index.flags
    ahead: deque[Future[Broken | None]] = deque()
    with Sandbox(workers) as sandbox, ThreadPoolExecutor(workers) as pool:
        for sample in range(len(index)):
            ahead.append(pool.submit(look, sample))
            while len(ahead) > 4 * workers or (ahead and sample == len(index) - 1):
                broken = ahead.popleft().result()
                if progress is not None:
                    progress.step()
                if broken is not None:
                    yield broken


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dataload.verify",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help=PATTERNS)
    parser.add_argument("--quarantine", type=Path, metavar="FILE", help="where broken samples are listed")
    parser.add_argument("--exclude", type=Path, action="append", default=[], metavar="FILE", help=EXCLUDE)
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)"
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one file (default: 60)")
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=images.MAX_PIXELS,
        help=f"largest picture (default: {images.MAX_PIXELS:,})",
    )
    options = parser.parse_args(arguments)
    if options.workers < 1 or options.timeout <= 0 or options.max_pixels < 1:
        parser.error("--workers, --timeout and --max-pixels must be more than 0")
    if options.quarantine is not None and options.quarantine.exists():
        parser.error(f"{options.quarantine} exists; choose another file, or remove it")
    try:
        return _run(options)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    index, bad = open_all(options.patterns, options.exclude)
    say_problems(index, bad)
    if index is None:
        return 1
    kinds = [kind for kind in CHECKS if not missing(kind)]
    unchecked = [
        f"{int(index.has(kind).sum()):,} samples with {kind} are not decoded: that {missing(kind)}"
        for kind in CHECKS
        if kind not in kinds and index.has(kind).any()
    ]
    for line in unchecked:
        print(line)
    broken = []
    with ExitStack() as stack:
        out: IO[str] | None = None
        if options.quarantine is not None:
            partial = options.quarantine.with_name(options.quarantine.name + ".partial")
            out = stack.enter_context(open(partial, "w", encoding="utf-8"))
        progress = stack.enter_context(Progress("samples", len(index)))
        for one in verify(
            index,
            kinds,
            workers=options.workers,
            timeout=options.timeout,
            max_pixels=options.max_pixels,
            progress=progress,
        ):
            broken.append(one)
            if out is not None:
                out.write(json.dumps(asdict(one)) + "\n")
                out.flush()
    if options.quarantine is not None:
        os.replace(partial, options.quarantine)
    if broken:
        print(listed("samples are broken", [str(one) for one in broken]))
        tiers = Counter(one.tier for one in broken)
        print(", ".join(f"{tier} {count:,}" for tier, count in sorted(tiers.items())))
        if options.quarantine is not None:
            print(f"listed in {options.quarantine}")
    else:
        print(f"all {len(index):,} samples are whole" if not unchecked else "what was decoded is whole")
    return 1 if broken or bad or unchecked or index.problems else 0


if __name__ == "__main__":
    sys.exit(main())
