"""The command line: python -m dataload.pack coco|karpathy|csv|folder ... --output DIR."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from dataload.pack.coco import read_coco
from dataload.pack.csv_table import read_csv
from dataload.pack.folder import read_folder
from dataload.pack.journal import SCRATCH, PackError
from dataload.pack.karpathy import read_karpathy
from dataload.pack.packing import pack
from dataload.pack.source import Source, SourceError

DESCRIPTION = """\
Packs pictures, sounds and videos with captions or labels as tar shards: DIR/<split>-000000.tar ..., with a
dataset.json beside them.

A sample is KEY.jpg (or .wav, .mp4, or several of them), KEY.txt (its first caption) and KEY.json (all captions,
the label); pictures without captions are packed alone and serve masked image modelling. JPEG, PNG and WebP files,
sounds and videos are packed byte for byte, other pictures become PNG. Whatever is missing, broken or a duplicate
is counted and listed.

An interrupted packing (Ctrl-C, a full disk, a power cut) leaves its whole shards in DIR/.packing: the same
command goes on from there and gives the same bytes. Everything appears in DIR at the end."""

COCO = """\
COCO's captions, one file per split; a picture without a caption is packed as an uncaptioned one.

  python -m dataload.pack coco --captions captions_train2017.json --images train2017 --output shards"""
KARPATHY = """\
Karpathy's file says which split each picture belongs to; every split gets shards of its own.

  python -m dataload.pack karpathy --json dataset_flickr8k.json --images Flicker8k_Dataset --output shards"""
CSV = """\
A table with a header and one caption per row; rows of the same file are its several captions. The files may be
pictures, sounds or videos.

  python -m dataload.pack csv --csv captions.csv --images pictures --image-column file --output shards
  python -m dataload.pack csv --csv labels.csv --media audio --media-column file --label-column class --output shards"""
FOLDER = """\
All pictures, sounds and videos below a folder; NAME.mp4 and NAME.wav are one sample. The captions of NAME.jpg are
the lines of NAME.txt, and in NAME.json "caption" (a text), "captions" (a list) or a list alone; "label" there is
its label. Pictures without such a file are packed as uncaptioned ones.

  python -m dataload.pack folder --images holiday --output shards
  python -m dataload.pack folder --media sounds --label-from-folder --output shards"""


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m dataload.pack", description=DESCRIPTION, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="coco|karpathy|csv|folder")
    split = argparse.ArgumentParser(add_help=False)
    split.add_argument(
        "--split", default="train", help="name of the split, starts the shards' names (default: train)"
    )

    coco = commands.add_parser(
        "coco", parents=[split], help="COCO captions JSON", description=COCO, formatter_class=raw
    )
    coco.add_argument(
        "--captions", type=Path, required=True, metavar="FILE", help="captions_train2017.json or one like it"
    )
    coco.add_argument("--captioned-only", action="store_true", help="leave out pictures without captions")

    karpathy = commands.add_parser(
        "karpathy",
        help="Karpathy's JSON (Flickr8k, Flickr30k, COCO)",
        description=KARPATHY,
        formatter_class=raw,
    )
    karpathy.add_argument(
        "--json", type=Path, required=True, metavar="FILE", help="dataset_flickr8k.json or one like it"
    )
    karpathy.add_argument(
        "--restval-into-train",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put COCO's restval pictures into train (default: yes); if not, they are a split of their own",
    )

    table = commands.add_parser(
        "csv",
        parents=[split],
        help="a table with a header",
        description=CSV,
        formatter_class=raw,
    )
    table.add_argument("--csv", type=Path, required=True, metavar="FILE", help="one row per caption")
    table.add_argument(
        "--image-column",
        "--media-column",
        default="image",
        help="column with the path of the picture, sound or video (default: image)",
    )
    table.add_argument(
        "--caption-column", default="caption", help="column with the caption (default: caption)"
    )
    table.add_argument("--label-column", help="column with the label; captions are then not needed")
    table.add_argument(
        "--split-column", help="column with the split's name (default: all pictures belong to --split)"
    )
    table.add_argument("--delimiter", help="(default: a comma; a tab for .tsv files)")

    folder = commands.add_parser(
        "folder",
        parents=[split],
        help="a folder of pictures, sounds, videos, with or without captions",
        description=FOLDER,
        formatter_class=raw,
    )
    folder.add_argument(
        "--label-from-folder", action="store_true", help="a file's label is the name of its folder"
    )
    for command in (coco, karpathy, table, folder):
        command.add_argument(
            "--images", "--media", type=Path, required=True, metavar="DIR", help="folder of the files"
        )
        _add_common(command)
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
    group.add_argument("--max-samples", type=int, default=1000, help="samples per shard (default: 1000)")
    group.add_argument("--max-megabytes", type=int, default=512, help="size of a shard in MiB (default: 512)")
    group.add_argument(
        "--shuffle-seed", type=int, metavar="N", help="random order that depends on N (default: the source's)"
    )
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


def _read(options: argparse.Namespace) -> Source:
    match options.command:
        case "coco":
            return read_coco(
                options.captions, options.images, split=options.split, captioned_only=options.captioned_only
            )
        case "karpathy":
            return read_karpathy(options.json, options.images, restval_into_train=options.restval_into_train)
        case "csv":
            return read_csv(
                options.csv,
                options.images,
                image_column=options.image_column,
                caption_column=options.caption_column,
                label_column=options.label_column,
                split_column=options.split_column,
                split=options.split,
                delimiter=options.delimiter,
            )
        case _:
            return read_folder(
                options.images, split=options.split, label_from_folder=options.label_from_folder
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in ("max_samples", "max_megabytes", "resize", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    warnings.filterwarnings("ignore", module="PIL")  # what matters in them is in the summary
    started = time.monotonic()
    try:
        summary = pack(
            _read(options),
            options.output,
            max_samples=options.max_samples,
            max_bytes=options.max_megabytes * 2**20,
            resize=options.resize,
            verify=options.verify,
            shuffle_seed=options.shuffle_seed,
            overwrite=options.overwrite,
            restart=options.restart,
            workers=options.workers,
        )
    except (SourceError, PackError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, KeyboardInterrupt) as error:
        why = "interrupted" if isinstance(error, KeyboardInterrupt) else f"error: {error}"
        print(f"{why}\n{_kept(options.output)}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    print(summary)
    print(f"written to {options.output} in {time.monotonic() - started:.1f} s")
    return 0


def _kept(output: Path) -> str:
    """What an interruption leaves, for the user."""
    whole = len(list((output / SCRATCH).glob("*.tar")))
    if not whole:
        return "no shard was finished: the same command begins anew"
    return f"{whole:,} whole shards are kept in {output / SCRATCH}: the same command goes on from there"


if __name__ == "__main__":
    sys.exit(main())
