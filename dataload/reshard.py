"""The command line: python -m dataload.reshard PATTERN ... --output DIR writes the same samples as other shards."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dataload.annotations import CLASSES
from dataload.files import write_atomically
from dataload.index import EXCLUDE, PATTERNS, listed, open_all, say_problems
from dataload.progress import Progress
from dataload.shards import ShardIndex
from dataload.shards.shard import load_shard

DESCRIPTION = """\
Writes the samples of tar shards as shards of another size, in their order or shuffled, without those of an exclude
list. Every file of a sample is kept byte for byte. The same samples and options give the same bytes. All shards
appear at the end; a run that was interrupted goes on from the shards that it had finished.

  python -m dataload.reshard 'old/*.tar' --output new --max-samples 10000 --shuffle-seed 1 --exclude broken.jsonl

Files that belong to no sample (without a key, or without a picture, sound or video) are not copied; they are
listed."""
LISTING = "reshard.json"
SCRATCH = ".resharding-"
_BLOCK = tarfile.BLOCKSIZE


class ReshardError(ValueError):
    """Nothing can be written as asked."""


@dataclass
class Plan:
    """Which sample goes where."""

    shards: list[np.ndarray] = field(default_factory=list)
    """int64: sample numbers of each new shard, in order"""
    sizes: list[int] = field(default_factory=list)
    """bytes of each new shard"""
    renamed: dict[int, str] = field(default_factory=dict)
    """new keys of samples whose key was taken"""


def plan(index: ShardIndex, *, max_samples: int, max_bytes: int, shuffle_seed: int | None) -> Plan:
    """Distributes the samples: a new shard starts where a limit would be passed. A key that an earlier sample
    (in the order of the index) has already gets "-2", "-3" ... at its end."""
    result = Plan()
    taken: set[str] = set()
    lengths = np.empty(len(index), dtype=np.int64)
    for sample in range(len(index)):
        key = wanted = index.where(sample)[1]
        number = 1
        while key in taken:
            number += 1
            key = f"{wanted}-{number}"
        taken.add(key)
        if key != wanted:
            result.renamed[sample] = key
        lengths[sample] = sum(_length(f"{key}.{name}", size) for name, _, size in index.files(sample))
    order = np.arange(len(index))
    if shuffle_seed is not None:
        order = np.random.Generator(np.random.Philox(shuffle_seed)).permutation(len(index))
    start, size = 0, 0
    for place, length in enumerate(lengths[order].tolist()):
        if place > start and (place - start >= max_samples or size + length > max_bytes):
            result.shards.append(order[start:place])
            result.sizes.append(_record(size))
            start, size = place, 0
        size += length
    result.shards.append(order[start:])
    result.sizes.append(_record(size))
    return result


def _length(name: str, size: int) -> int:
    """Bytes that a member takes in a GNU tar; a name of more than 100 bytes takes a header of its own."""
    letters = len(name.encode("utf-8", "surrogateescape"))
    extra = 0 if letters <= tarfile.LENGTH_NAME else _BLOCK + _padded(letters + 1)
    return extra + _BLOCK + _padded(size)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _record(size: int) -> int:
    return -(-(size + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def reshard(
    index: ShardIndex,
    output: Path,
    *,
    prefix: str = "train",
    max_samples: int = 1000,
    max_bytes: int = 512 * 2**20,
    shuffle_seed: int | None = None,
) -> tuple[Plan, list[Path]]:
    """Writes output/PREFIX-%06d.tar and output/reshard.json; see DESCRIPTION. Returns the plan and the new shards.

    The classes.json beside the shards goes along. Raises ReshardError where `output` holds other things, or where shards
    come with different classes.json, OSError where a shard cannot be read or written (what was finished stays, and the
    next run goes on from there).
    """
    if not len(index):
        raise ReshardError("there are no samples")
    classes = _classes(index)
    index.hold_tables()
    what = {
        "source": index.manifest, "prefix": prefix, "max_samples": max_samples, "max_bytes": max_bytes,
        "shuffle_seed": shuffle_seed,
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    scratch = output / f"{SCRATCH}{name}"
    _clear_to_write(output, scratch)
    planned = plan(index, max_samples=max_samples, max_bytes=max_bytes, shuffle_seed=shuffle_seed)
    scratch.mkdir(parents=True, exist_ok=True)
    names = [f"{prefix}-{number:06d}.tar" for number in range(len(planned.shards))]
    with Progress("samples", len(index)) as progress:
        for name, samples, size in zip(names, planned.shards, planned.sizes, strict=True):
            path = scratch / name
            if not path.exists() or path.stat().st_size != size:
                partial = path.with_name(name + ".partial")
                _write(index, samples, planned.renamed, partial, progress)
                if partial.stat().st_size != size:
                    raise ReshardError(f"{partial} has {partial.stat().st_size} bytes, planned were {size}")
                os.replace(partial, path)
            else:
                progress.step(len(samples))
    for name in names:
        os.replace(scratch / name, output / name)
    if classes is not None:
        write_atomically(output / CLASSES, classes)
    what["shards"] = {name: len(samples) for name, samples in zip(names, planned.shards, strict=True)}
    what["renamed"] = len(planned.renamed)
    write_atomically(output / LISTING, (json.dumps(what, indent=1) + "\n").encode())
    shutil.rmtree(scratch)
    return planned, [output / name for name in names]


def _classes(index: ShardIndex) -> bytes | None:
    """What the numbers in the samples' annotations stand for, where it lies beside local shards."""
    folders = dict.fromkeys(shard.path.parent for shard in index.shards if isinstance(shard.path, Path))
    found = {folder: (folder / CLASSES).read_bytes() for folder in folders if (folder / CLASSES).is_file()}
    different = {json.dumps(json.loads(data), sort_keys=True): folder for folder, data in found.items()}
    if len(different) > 1:
        places = " and ".join(map(str, list(different.values())[:2]))
        raise ReshardError(f"{CLASSES} differs between {places}: one number would stand for two classes")
    return next(iter(found.values()), None)


def _clear_to_write(output: Path, scratch: Path) -> None:
    if output.exists() and not output.is_dir():
        raise ReshardError(f"{output} is a file; --output names a folder")
    inside = sorted(output.iterdir()) if output.exists() else []
    others = [path.name for path in inside if not path.name.startswith(SCRATCH)]
    if others and not (
        scratch.is_dir() and LISTING not in others
    ):  # else: killed while shards were being moved
        raise ReshardError(f"{output} is not empty ({', '.join(others[:3])} ...); choose another folder")
    if others:
        for path in inside:
            if path.name.endswith(".tar"):
                os.replace(path, scratch / path.name)
    for path in inside:
        if path.name.startswith(SCRATCH) and path != scratch:  # of other options, interrupted
            shutil.rmtree(path)


def _write(
    index: ShardIndex, samples: np.ndarray, renamed: dict[int, str], path: Path, progress: Progress
) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for sample in samples.tolist():
            key = renamed.get(sample) or index.where(sample)[1]
            for extension, data in index.read_all(sample):
                # TarInfo's own defaults are the fixed ones: mtime 0, owner 0, no names, mode 644.
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            progress.step()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dataload.reshard",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help=PATTERNS)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the shards, new or empty"
    )
    parser.add_argument("--prefix", default="train", help="starts the shards' names (default: train)")
    parser.add_argument("--max-samples", type=int, default=1000, help="samples per shard (default: 1000)")
    parser.add_argument(
        "--max-megabytes", type=int, default=512, help="size of a shard in MiB (default: 512)"
    )
    parser.add_argument(
        "--shuffle-seed", type=int, metavar="N", help="random order that depends on N (default: as they are)"
    )
    parser.add_argument("--exclude", type=Path, action="append", default=[], metavar="FILE", help=EXCLUDE)
    options = parser.parse_args(arguments)
    if options.max_samples < 1 or options.max_megabytes < 1:
        parser.error("--max-samples and --max-megabytes must be at least 1")
    if options.shuffle_seed is not None and options.shuffle_seed < 0:
        parser.error("--shuffle-seed must be 0 or more")
    if not options.prefix or os.sep in options.prefix or options.prefix.startswith("."):
        parser.error(f"--prefix {options.prefix!r} cannot start a file's name")
    try:
        return _run(options)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    index, bad = open_all(options.patterns, options.exclude)
    say_problems(index, bad)
    if index is None or bad:
        raise ReshardError("every shard has to be usable; name those that are, or mend the others")
    planned, paths = reshard(
        index, options.output, prefix=options.prefix, max_samples=options.max_samples,
        max_bytes=options.max_megabytes * 2**20, shuffle_seed=options.shuffle_seed,
    )  # fmt: skip
    renames = [f"{': '.join(index.where(sample))} is now {key}" for sample, key in planned.renamed.items()]
    if renames:
        print(listed("samples had the key of an earlier one and got another", renames))
    for path in paths:
        load_shard(path)
    print(f"{len(index):,} samples written to {len(paths):,} shards in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
