"""Tar shards in img2dataset's layout with the same bytes for the same samples, on any day and any machine.

A shard PREFIX-000000.tar holds samples one after another; a sample is KEY.<image suffix>, KEY.txt (its first
caption) and KEY.json ({"captions": [...], ...}); an uncaptioned sample is the image alone.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any


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
        members = [(f"{key}.{suffix}", image)]
        if captions:
            sidecar = {"captions": list(captions), **(facts or {})}
            members.append((f"{key}.txt", captions[0].encode()))
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
            self._partial.replace(self._path)
            self.shards.append(self._path)
            self._tar = None

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
