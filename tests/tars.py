"""Tars for the tests of dataload.shards: written by Python's own tarfile, of bytes that are never decoded."""

from __future__ import annotations

import io
import tarfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from dataload import shards
from dataload.shards import ShardIndex, shard

Files = Sequence[tuple[str, bytes]]


def write_tar(path: Path, files: Files, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def picture(number: int) -> bytes:
    """Bytes that stand for a picture: this file never decodes."""
    return f"picture {number} ".encode() * (number + 1)


def pairs(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    return [
        file
        for i in range(first, first + count)
        for file in ((f"{i:05d}.jpg", picture(i)), (f"{i:05d}.txt", f"caption {i}".encode()))
    ]


def contents(index: ShardIndex) -> dict[str, tuple[bytes, list[str]]]:
    return {index.key(i): (index.image(i), index.captions(i)) for i in range(len(index))}


def contents_of_files(index: ShardIndex) -> dict[str, list[tuple[str, bytes]]]:
    return {
        index.key(i): [(name, index.read(i, name)) for name, _, _ in index.files(i)]
        for i in range(len(index))
    }


def quiet_index(*paths: Path) -> ShardIndex:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return shards.index(paths)


def count_scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets a name whenever a tar is read through."""
    scans: list[str] = []
    scan = shard.scan
    monkeypatch.setattr(shard, "scan", lambda file, size, name: scans.append(name) or scan(file, size, name))
    return scans
