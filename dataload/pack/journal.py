"""What an interrupted packing has finished, so that the same command goes on from there.

OUTPUT/.packing holds whole shards and journal.jsonl: a line that says what is being packed, then one line per
finished shard with what became of the samples up to it. A line is written when its shard is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import PIL

from dataload.pack.source import Source
from dataload.pack.summary import LISTING, Outcome

SCRATCH = ".packing"
_JOURNAL = "journal.jsonl"
_VERSION = 1
BESIDE = (".index", ".index.json", ".looks.npz")
"""ends of the files that tools keep beside a shard"""


class PackError(ValueError):
    """Packing cannot start, or nothing came of it."""


def describe(source: Source, options: Mapping[str, Any]) -> dict[str, Any]:
    """What is to be packed: options, and hashes of what the source lists and of its files' sizes and times."""
    listed, files = hashlib.sha256(), hashlib.sha256()
    for one in source.pictures:
        listed.update(json.dumps([one.name, one.split, one.captions, one.facts], sort_keys=True).encode())
        maps: tuple[Path, ...] = ()
        if one.label_map is not None:
            listed.update(json.dumps(one.label_map.told()).encode())
            maps = one.label_map.paths
        for path in (*one.paths, *maps):
            files.update(f"{path.name}\0{_state(path)}\n".encode("utf-8", "surrogateescape"))
    return {
        "version": _VERSION,
        "kind": source.kind,
        "samples": len(source.pictures),
        "listed": listed.hexdigest(),
        "files": files.hexdigest(),
        "Pillow": PIL.__version__,  # another may write other bytes
        **options,
    }


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


class Journal:
    """The journal of one packing. Use as a context manager: leaving it keeps the scratch folder only where it
    is worth something."""

    def __init__(self, output: Path, packing: Mapping[str, Any], *, overwrite: bool, restart: bool) -> None:
        """Begins a packing, or finds the one that was interrupted.

        Raises PackError where `output` holds something else, where the interrupted packing was another one
        (other source, other options; `restart` throws that away), and where one is running now.
        """
        self.output, self.folder = output, output / SCRATCH
        self.shards: dict[str, list[str]] = {}
        """finished shards by split"""
        self.lines: list[tuple[str, int, list[Outcome]]] = []
        """(split, samples of it that are done, what became of those since the line before)"""
        self.removed = False
        """what is to be replaced is gone already: moving has begun"""
        found = self._read() if self.folder.is_dir() else None
        if found is not None and restart:
            found = None
        if found is not None:
            self._check_same(found[0]["packing"], packing)
            self.replaces = [str(name) for name in found[0]["replaces"]]
            self._file = self._open(found[1])
            self._take(found[2])
        else:
            self.replaces = _to_replace(output, overwrite)
            output.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._file = self._open(0)
            for leftover in self.folder.glob("*.tar*"):
                leftover.unlink()
            self._write({"packing": packing, "replaces": self.replaces})

    def done(self, split: str) -> int:
        """Samples of the split that need not be looked at again."""
        return max((samples for name, samples, _ in self.lines if name == split), default=0)

    def add(self, split: str, shard: Path | None, samples: int, outcomes: Sequence[Outcome]) -> None:
        """Notes a finished shard (None: samples behind the last one, of which none could be packed)."""
        if shard is not None:
            self.shards.setdefault(split, []).append(shard.name)
        name, size = ("", 0) if shard is None else (shard.name, shard.stat().st_size)
        told = [outcome.to_json() for outcome in outcomes]
        self._write({"split": split, "shard": name, "size": size, "samples": samples, "outcomes": told})
        self.lines.append((split, samples, list(outcomes)))

    def publish(self, listing: bytes, beside: Mapping[str, bytes] | None = None) -> None:
        """Removes what is to be replaced, moves the shards to their place, writes the files `beside` them and
        dataset.json last. An interruption anywhere leaves what the next call needs."""
        if not self.removed:
            for name in self.replaces:
                (self.output / name).unlink(missing_ok=True)
            self._write({"removed": True})
        for names in self.shards.values():
            for name in names:
                if (self.folder / name).exists():
                    (self.folder / name).rename(self.output / name)
        for name, data in {**(beside or {}), LISTING: listing}.items():
            part = self.folder / name
            part.write_bytes(data)
            part.rename(self.output / name)
        self._close(keep=False)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # With no shard there is nothing to go on from; nor is there where the packing itself cannot be done.
        self._close(keep=any(self.shards.values()) and not (kind and issubclass(kind, PackError)))

    def _close(self, keep: bool) -> None:
        if not self._file.closed:
            self._file.close()
            if not keep:
                shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self, size: int) -> IO[bytes]:
        """The journal for appending, its first `size` bytes kept, locked."""
        file = open(self.folder / _JOURNAL, "ab")
        try:
            import fcntl
        except ImportError:  # Windows: two packings into one folder are not noticed there
            pass
        else:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise PackError(f"another packing writes to {self.output} at this moment") from None
        file.truncate(size)
        return file

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> tuple[dict[str, Any], int, list[dict[str, Any]]] | None:
        """(first line, bytes of the whole lines, the others), or None where nothing whole is there."""
        lines: list[dict[str, Any]] = []
        size = 0
        try:
            for line in (self.folder / _JOURNAL).read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break  # cut short as its writer died
                lines.append(json.loads(line))
                size += len(line)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise PackError(
                f"{self.folder / _JOURNAL} is damaged ({error}): --restart throws away what it stands for"
            ) from error
        return (lines[0], size, lines[1:]) if lines else None

    def _take(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self.removed = any("removed" in line for line in lines)
        places = (self.folder, self.output) if self.removed else (self.folder,)
        for line in lines:
            if "removed" in line:
                continue
            if name := line["shard"]:
                if line["size"] not in [_state(place / name)[0] for place in places]:
                    raise PackError(
                        f"{self.folder / name} is not as the interrupted packing left it ({line['size']} bytes): "
                        "--restart begins anew"
                    )
                self.shards.setdefault(line["split"], []).append(name)
            outcomes = [Outcome.from_json(one) for one in line["outcomes"]]
            self.lines.append((line["split"], line["samples"], outcomes))
        for leftover in self.folder.glob("*.partial"):
            leftover.unlink()

    def _check_same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        words = {
            "listed": "the source lists other samples or captions",
            "files": "files of the source have another size or time",
            "held": "other samples are held out",
        }
        differ = [
            words.get(name, f"{name} was {before.get(name)}, now {now.get(name)}")
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]
        if differ:
            raise PackError(
                f"an interrupted packing lies in {self.folder}, and it was another one: {'; '.join(differ)}. "
                "The command that was interrupted goes on with it; --restart throws it away and begins anew"
            )


def _to_replace(output: Path, overwrite: bool) -> list[str]:
    """Names of the files of an earlier packing, which are to go when the new ones are complete."""
    if output.exists() and not output.is_dir():
        raise PackError(f"{output} is a file; --output names a folder")
    if not output.exists() or not any(path.name != SCRATCH for path in output.iterdir()):
        return []
    if not overwrite:
        raise PackError(f"{output} is not empty; choose another folder, or --overwrite an earlier packing")
    listing = output / LISTING
    if not listing.is_file():
        if any(output.glob("*.tar")):
            raise PackError(
                f"{output} holds tar files but no {LISTING}, so they may be no earlier packing and "
                "--overwrite does not touch them; choose another folder"
            )
        return []
    earlier = json.loads(listing.read_text("utf-8"))
    splits = earlier["splits"].values()
    shards = [Path(name).name for split in splits for name in split["shards"]]  # names, whatever it says
    beside = [Path(name).name for name in earlier.get("beside", ())]
    return [LISTING, *beside, *(f"{name}{end}" for name in shards for end in ("", *BESIDE))]
