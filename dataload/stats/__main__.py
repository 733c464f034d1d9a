"""The command line: python -m dataload.stats PATTERN ... [--against PATTERN ...]."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataload.files import write_atomically
from dataload.stats import compare, corpus, near, page
from dataload.tokenizer import Tokenizer

DESCRIPTION = """\
Says what shards hold: samples by modality, captions and their lengths, sizes and formats of pictures, lengths of
sounds and videos, duplicates. With --against, which pictures and captions of evaluation data are in them.

  python -m dataload.stats 'shards/train-*.tar' --tokenizer shards/tokenizer.model --report runs/corpus
  python -m dataload.stats 'shards/train-*.tar' --duplicates --exclude-to duplicates.jsonl
  python -m dataload.stats 'shards/train-*.tar' --against 'shards/test-*.tar' --fail-above 0 --exclude-to seen.jsonl

Pictures are compared by their bytes, and by perceptual hashes of 64 and of 256 bits, mirror images too: copies that
were recompressed, resized, made grey, brighter or a little smaller (6% cut off) are found. `python -m
dataload.stats.trial` measures that on a corpus of yours. Hashes are kept beside the shards: the second time is quick.

Exit status: 0; 1 where --fail-above is exceeded; 2 where something cannot be read."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dataload.stats",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "shards", nargs="+", metavar="PATTERN", help="a tar, a folder, a glob, train-{000..011}.tar"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="also count the captions' tokens")
    parser.add_argument(
        "--json", metavar="FILE", help="all figures as JSON; - for stdout instead of the text"
    )
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="a page, DIR/index.html, that needs no network"
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the samples on the page (default 0)")
    parser.add_argument("--workers", type=int, help="threads (default: one per core)")
    group = parser.add_argument_group("comparing pictures")
    group.add_argument(
        "--duplicates", action="store_true", help="find pictures that look the same within the corpus"
    )
    group.add_argument("--against", nargs="+", metavar="PATTERN", help="shards of evaluation data")
    group.add_argument("--list", type=Path, metavar="FILE", help="every match as a line of JSON")
    group.add_argument(
        "--exclude-to", type=Path, metavar="FILE",
        help="an exclude list of the corpus: what matches the evaluation data, and with --duplicates the extra copies",
    )  # fmt: skip
    group.add_argument(
        "--fail-above", type=float, metavar="SHARE",
        help="exit with 1 where more than this share of the evaluation pictures is in the corpus",
    )  # fmt: skip
    group.add_argument(
        "--distance", type=int, default=near.DISTANCE, help=f"bits of 64 (default {near.DISTANCE})"
    )
    group.add_argument("--check", type=int, default=near.CHECK, help=f"bits of 256 (default {near.CHECK})")
    return parser


def _checked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.fail_above is not None and not (options.against and 0 <= options.fail_above <= 1):
        parser.error("--fail-above needs --against, and a share from 0 to 1")
    if (options.list or options.exclude_to) and not (options.against or options.duplicates):
        parser.error("--list and --exclude-to need --against or --duplicates")
    if not 0 <= options.distance <= 24 or not 0 <= options.check <= 128:
        parser.error(
            "--distance is 0 to 24 and --check 0 to 128: beyond, different pictures are taken for copies"
        )
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers must be at least 1, not {options.workers}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = _checked(arguments)
    warnings.filterwarnings("ignore", module="PIL")  # what matters in them is counted
    try:
        return _run(options, sys.argv[1:] if arguments is None else list(arguments))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; hashes of whole shards are kept", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, words: Sequence[str]) -> int:
    workers = options.workers or os.cpu_count() or 1
    tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    found = corpus.index(options.shards)
    other = corpus.index(options.against) if options.against else None
    if other is not None:
        both = {shard.shown for shard in found.shards} & {shard.shown for shard in other.shards}
        if both:
            raise ValueError(f"{sorted(both)[0]} is named as the corpus and as its evaluation data")
    hashed = bool(options.duplicates or other)
    limits = {"distance": options.distance, "check": options.check}
    held = corpus.read(found, hashed=hashed, tokenizer=tokenizer, workers=workers)
    told = corpus.tell(held)
    copies = compare.duplicates(held, hashed=options.duplicates, **limits)
    told["duplicates"] = copies.to_json()
    matches = list(copies.matches) if options.duplicates else []
    contaminated = None
    if other is not None:
        evaluation = corpus.read(other, hashed=True, only_looks=True, workers=workers)
        contaminated = compare.against(held, evaluation, **limits)
        told["against"] = contaminated.to_json()
        matches = contaminated.matches + matches
    if options.list:
        compare.write_lines(options.list, matches)
    excluded = compare.write_excludes(options.exclude_to, matches) if options.exclude_to else 0
    if options.report:
        name = Path(options.shards[0]).name if len(options.shards) == 1 else f"{len(options.shards)} patterns"
        against = None if contaminated is None or other is None else (contaminated, other)
        command = "python -m dataload.stats " + " ".join(words)
        page.write_report(
            options.report, name, told, held, against=against, command=command, seed=options.seed,
            duplicates=copies if told["image"] else None,
        )  # fmt: skip
    if options.json == "-":
        print(json.dumps(told, indent=1))
    else:
        if options.json:
            write_atomically(Path(options.json), (json.dumps(told, indent=1) + "\n").encode())
        print("\n".join(_said(told, matches)).encode("utf-8", "backslashreplace").decode())
        for path, what in (
            (options.report and options.report / "index.html", "report"),
            (options.list, "matches"),
        ):
            if path:
                print(f"{what}: {path}")
        if options.exclude_to:
            print(f"{excluded:,} samples to exclude: {options.exclude_to}")
    share = contaminated.share if contaminated is not None else 0.0
    if options.fail_above is not None and share > options.fail_above:
        print(
            f"{share:.4f} of the evaluation pictures are in the corpus, over {options.fail_above:g}",
            file=sys.stderr,
        )
        return 1
    return 0


def _said(told: Mapping[str, Any], matches: Sequence[compare.Match]) -> list[str]:
    captions = told["captions"]
    lines = [
        f"{told['samples']:,} samples in {len(told['shards']):,} shards, {told['bytes'] / 2**20:,.1f} MiB"
    ]
    lines.append(
        f"  {told['image']:,} with a picture, {told['audio']:,} with sound, {told['video']:,} with video, "
        f"{told['captioned']:,} with captions"
    )
    lines.append(f"  {captions['count']:,} captions, {captions['different']:,} of them different")
    for name in ("characters", "words", "tokens"):
        if captions.get(name, {}).get("count"):
            lines.append(f"    {name}: {_figures(captions[name])}")
    if captions["long"]["count"]:
        lines.append(
            f"    {captions['long']['count']:,} longer than {captions['long']['over_characters']} characters"
        )
    if told["texts_without_caption"]:
        lines.append(
            f"  {told['texts_without_caption']:,} samples with a txt or json without a caption (blank, or a label alone)"
        )
    if captions["frequent_words"]:
        lines.append(
            "  most frequent words: " + ", ".join(f"{w} {n:,}" for w, n in captions["frequent_words"][:10])
        )
    if "pictures" in told:
        pictures = told["pictures"]
        lines.append("  pictures: " + ", ".join(f"{n:,} {kind}" for kind, n in pictures["formats"].items()))
        for name in ("shortest side", "aspect"):
            if pictures[name]["count"]:
                lines.append(f"    {name}: {_figures(pictures[name])}")
    for name, what in (("audios", "sounds"), ("videos", "videos")):
        if name in told:
            kinds = ", ".join(f"{n:,} of {kind}" for kind, n in list(told[name]["kinds"].items())[:3])
            lines.append(f"  {what}: {told[name]['count']:,}, {told[name]['hours']:,.3f} hours; {kinds}")
    for name in ("pictures", "audios", "videos"):
        for key, reason in told.get(name, {}).get("broken", {}).get("first", ())[:5]:
            lines.append(f"  broken: {key}: {reason}")
    copies = told["duplicates"]
    lines.append(
        f"  {copies['exact']:,} pictures with the bytes of an earlier one"
        + (
            "; whether others look like one was not compared (--duplicates does)"
            if copies["near"] is None
            else f", {copies['near']:,} that look like one"
        )
    )
    if "against" in told:
        found = told["against"]
        lines.append(
            f"  {found['evaluation_pictures_found']:,} of {found['evaluation_pictures']:,} evaluation pictures "
            f"({100 * found['share']:.2f}%) are here too, in {found['training_samples']:,} samples; "
            f"{found['evaluation_captions_found']:,} of {found['evaluation_captioned']:,} evaluation samples share a caption"
        )
    lines += [f"    {match}" for match in matches[:20]]
    if len(matches) > 20:
        lines.append(f"    and {len(matches) - 20:,} more (--list FILE has all)")
    return lines + [f"  {note}" for note in told["notes"]]


def _figures(told: Mapping[str, Any]) -> str:
    return f"median {told['median']:g}, mean {told['mean']:.4g}, 95% up to {told['p95']:g}, {told['min']:g} to {told['max']:g}"


if __name__ == "__main__":
    sys.exit(main())
