"""The command line: python -m dataload.pack coco|karpathy|vqa|audioset|... --output DIR."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from dataload.pack.commands import COMMANDS, add_all, add_holdout, check_holdout
from dataload.pack.img2dataset import examine
from dataload.pack.journal import SCRATCH, PackError
from dataload.pack.packing import known_before, pack
from dataload.pack.source import SourceError
from dataload.reshard import ReshardError, reshard

DESCRIPTION = """\
Packs pictures, sounds and videos with what is known of them as tar shards: DIR/<split>-000000.tar ..., with a
dataset.json beside them, and a classes.json where there are classes.

A sample is KEY.jpg (or .wav, .mp4, or several of them), KEY.txt (its first caption), KEY.json (all captions, labels,
objects, questions, regions) and KEY.seg.png (a label map). Pictures without captions are packed alone and serve masked
image modelling. JPEG, PNG and WebP files, sounds and videos are packed byte for byte, other pictures become PNG. Boxes
and masks are scaled with their picture where --resize makes it smaller. Whatever is missing, broken or a duplicate is
counted and listed; files that are missing are counted before the work begins.

An interrupted packing (Ctrl-C, a full disk, a power cut) leaves its whole shards in DIR/.packing: the same
command goes on from there and gives the same bytes. Everything appears in DIR at the end."""

IMG2DATASET = """\
What img2dataset downloaded (LAION-5B): its tars are read by training as they are. This looks whether the download is
whole, by the statistics and tables beside them; --output writes the samples as shards of another size.

  python -m dataload.pack img2dataset --shards laion
  python -m dataload.pack img2dataset --shards laion --output shards --max-samples 10000 --shuffle-seed 1"""


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m dataload.pack", description=DESCRIPTION, formatter_class=raw
    )
    names = "|".join([*COMMANDS, "img2dataset"])
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    for command in add_all(commands).values():
        _add_common(command)
    downloaded = commands.add_parser(
        "img2dataset",
        help="what img2dataset downloaded (LAION-5B)",
        description=IMG2DATASET,
        formatter_class=raw,
    )
    downloaded.add_argument(
        "--shards", type=Path, required=True, metavar="DIR", help="folder of 00000.tar ..."
    )
    downloaded.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for new shards (default: only look)"
    )
    downloaded.add_argument("--split", default="train", help="starts the new shards' names (default: train)")
    add_holdout(downloaded, supported=False)
    _add_sizes(downloaded)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("output")
    group.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the shards, new or empty"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier packing put into DIR"
    )
    group.add_argument(
        "--restart", action="store_true", help="throw away what an interrupted packing has finished"
    )
    group.add_argument("--require-all", action="store_true", help="refuse where a file is missing")
    _add_sizes(group)
    group.add_argument(
        "--resize",
        type=int,
        metavar="N",
        help="scale pictures down to a shortest side of N pixels, as JPEG of quality 95",
    )
    group.add_argument(
        "--verify", action="store_true", help="decode every picture, open every sound and video (slow)"
    )
    group.add_argument("--workers", type=int, help="threads (default: one per core)")


def _add_sizes(group: argparse._ActionsContainer) -> None:
    group.add_argument("--max-samples", type=int, default=1000, help="samples per shard (default: 1000)")
    group.add_argument("--max-megabytes", type=int, default=512, help="size of a shard in MiB (default: 512)")
    group.add_argument(
        "--shuffle-seed", type=int, metavar="N", help="random order that depends on N (default: the source's)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in ("max_samples", "max_megabytes", "resize", "workers"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    try:
        check_holdout(options)
    except SourceError as error:
        parser.error(str(error))
    if getattr(options, "split", "") is None:
        options.split = "train"
    warnings.filterwarnings("ignore", module="PIL")  # what matters in them is in the summary
    started = time.monotonic()
    try:
        if options.command == "img2dataset":
            return _downloaded(options)
        source = options.read(options)
        if said := known_before(source):
            print(said, file=sys.stderr)
        summary = pack(
            source,
            options.output,
            max_samples=options.max_samples,
            max_bytes=options.max_megabytes * 2**20,
            resize=options.resize,
            verify=options.verify,
            shuffle_seed=options.shuffle_seed,
            overwrite=options.overwrite,
            restart=options.restart,
            require_all=options.require_all,
            holdout=options.holdout,
            workers=options.workers,
        )
    except (SourceError, PackError, ReshardError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, KeyboardInterrupt) as error:
        why = "interrupted" if isinstance(error, KeyboardInterrupt) else f"error: {error}"
        print(f"{why}\n{_kept(options.output)}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    print(summary)
    print(f"written to {options.output} in {time.monotonic() - started:.1f} s")
    return 0


def _downloaded(options: argparse.Namespace) -> int:
    """The command img2dataset; the exit status is 1 where the download is not whole."""
    found = examine(options.shards)
    print(found)
    if options.output is not None:
        _, paths = reshard(
            found.index, options.output, prefix=options.split, max_samples=options.max_samples,
            max_bytes=options.max_megabytes * 2**20, shuffle_seed=options.shuffle_seed,
        )  # fmt: skip
        print(f"{len(found.index):,} samples in {len(paths):,} shards, written to {options.output}")
    return 1 if found.problems else 0


def _kept(output: Path) -> str:
    """What an interruption leaves, for the user."""
    whole = len(list((output / SCRATCH).glob("*.tar")))
    if not whole:
        return "no shard was finished: the same command begins anew"
    return f"{whole:,} whole shards are kept in {output / SCRATCH}: the same command goes on from there"


if __name__ == "__main__":
    sys.exit(main())
