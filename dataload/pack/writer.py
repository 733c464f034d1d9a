"""Tar shards in img2dataset's layout with the same bytes for the same samples, on any day and any machine.

A shard PREFIX-000000.tar holds samples one after another; a sample is KEY.<suffix> for each of its media,
KEY.txt (its first caption) and KEY.json ({"captions": [...], "label": ..., ...}); without captions and label it is
its media alone. KEY.seg.png is a label map. dataload/README.md lists what KEY.json may hold.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from dataload.annotations import SEGMENTATION

TOLD = ("label", "labels", "objects", "questions", "regions")
"""facts that are worth a sidecar also without captions"""


@dataclass
class ShardWriter:
    """Writes the samples of one split to DIRECTORY/PREFIX-%06d.tar; a new shard starts when a limit would be
    passed.

    Each shard is written under a temporary name and renamed when it is complete. Use as a context manager:
    leaving it through an exception removes the shard under way.
    """

    directory: Path
    prefix: str
    max_samples: int = 1000
    max_bytes: int = 512 * 2**20
    first_shard: int = 0
    shards: list[Path] = field(default_factory=list)
    finished: Callable[[Path], None] | None = None
    """called with each shard once it is complete and on the disk"""
    _tar: tarfile.TarFile | None = None
    _samples: int = 0

    def write(
        self,
        key: str,
        suffix: str,
        image: bytes,
        captions: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds one sample; `suffix` is that of the image without the dot, `facts` join the captions in the
        JSON sidecar."""
        self.write_files(key, {suffix: image}, captions, facts)

    def write_files(
        self,
        key: str,
        files: Mapping[str, bytes],
        captions: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds one sample of several media, by their suffixes without the dot. The sidecar is written where
        there are captions, a label map, or one of TOLD among the facts."""
        members = [(f"{key}.{suffix}", data) for suffix, data in files.items()]
        facts = facts or {}
        if captions:
            members.append((f"{key}.txt", captions[0].encode()))
        if captions or SEGMENTATION in files or any(name in facts for name in TOLD):
            sidecar = {"captions": list(captions), **facts} if captions else dict(facts)
            members.append(
                (f"{key}.json", json.dumps(sidecar, ensure_ascii=False, separators=(",", ":")).encode())
            )
        size = sum(1024 + len(data) for _, data in members)
        tar = self._room_for(size)
        for name, data in members:
            # TarInfo's own defaults are the fixed ones: mtime 0, owner 0, no names, mode 644.
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        self._samples += 1

    def _room_for(self, size: int) -> tarfile.TarFile:
        if self._tar is not None and (
            self._samples >= self.max_samples or self._tar.offset + size > self.max_bytes
        ):
            self._finish()
        if self._tar is None:
            number = self.first_shard + len(self.shards)
            self._path = self.directory / f"{self.prefix}-{number:06d}.tar"
            self._tar = tarfile.open(self._partial, "w", format=tarfile.GNU_FORMAT)
            self._samples = 0
        return self._tar

    @property
    def _partial(self) -> Path:
        return self._path.with_name(self._path.name + ".partial")

    def _finish(self) -> None:
        if self._tar is not None:
            self._tar.close()
            if self.finished is not None:
                with open(self._partial, "rb") as file:
                    os.fsync(file.fileno())  # what is told as finished survives a power cut
            self._partial.replace(self._path)
            self.shards.append(self._path)
            self._tar = None
            if self.finished is not None:
                self.finished(self._path)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self._tar is not None:
            self._tar.close()
            self._partial.unlink()
            self._tar = None
