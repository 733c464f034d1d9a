"""The index of a shard as a file: used, checked, renewed, and done without where it cannot be written."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.peers.opening import OpenCase, write_indexes
from dataload import order, shards
from dataload.shards import expand, indexfile, shard, tarindex
from tests.tars import contents, contents_of_files, count_scans, pairs, picture, quiet_index, write_tar


def test_cache_is_used_checked_and_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "t.tar", pairs(4))
    before = contents(quiet_index(path))
    cache = tmp_path / "t.tar.index"
    assert cache.is_file() and sorted(os.listdir(tmp_path)) == ["t.tar", "t.tar.index"]
    whole = cache.read_bytes()
    scans = count_scans(monkeypatch)
    assert contents(quiet_index(path)) == before and not scans
    another_version = whole[:8] + b"\x01" + whole[9:]
    for spoil in (b"", b"{}", whole[:50], whole[:-1], whole + b"x", another_version, bytes(len(whole))):
        cache.write_bytes(spoil)
        scans.clear()
        assert contents(quiet_index(path)) == before and len(scans) == 1
        assert cache.read_bytes() == whole
    # another tar of the same size
    status = path.stat()
    write_tar(path, [(name, data.replace(b"caption", b"CAPTION")) for name, data in pairs(4)])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert path.stat().st_size == status.st_size
    assert quiet_index(path).captions(0) == ["CAPTION 0"]


def test_any_flipped_byte_of_an_index_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "t.tar", [*pairs(3), ("a.cls", b"1"), ("a.flac", b"f")])
    before = contents_of_files(quiet_index(path))
    cache = tmp_path / "t.tar.index"
    whole = cache.read_bytes()
    scans = count_scans(monkeypatch)
    rng = np.random.default_rng(0)
    for place in range(len(whole)):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << int(rng.integers(8))
        cache.write_bytes(spoilt)
        scans.clear()
        assert contents_of_files(quiet_index(path)) == before
        assert len(scans) == 1 and cache.read_bytes() == whole, place


def test_an_index_that_points_outside_is_none(tmp_path: Path) -> None:
    """Checksums that fit are no proof: someone may have made them fit."""
    path = write_tar(tmp_path / "t.tar", pairs(2))
    status = path.stat()
    with open(path, "rb") as file:
        scanned = tarindex.scan(file, status.st_size, "t.tar")
    table = scanned.table
    bad = [
        {"offsets": table.offsets + status.st_size},
        {"offsets": table.offsets * 0 - 5},
        {"sizes": table.sizes * 0 - 1},
        {"sizes": table.sizes + 2**62},
        {"kinds": table.kinds + 9},
        {"key_ends": table.key_ends[::-1].copy()},
        {"file_ends": table.file_ends + 1},
    ]
    for change in bad:
        spoilt = replace(scanned, table=replace(table, **change))
        data = indexfile.pack(spoilt, str(status.st_mtime_ns), "")
        (tmp_path / "t.tar.index").write_bytes(data)
        assert indexfile.read_table(tmp_path / "t.tar.index", indexfile.unpack_head(data, len(data))) is None
        assert quiet_index(path).image(1) == picture(1)


def test_index_files_that_cannot_be_written_beside_the_tar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("AURORAIO_CACHE", str(cache))
    path = write_tar(tmp_path / "t.tar", pairs(4))
    (tmp_path / "t.tar.index").mkdir()  # also stops root, whom permissions do not
    index = quiet_index(path)
    assert len(index) == 4 and sorted(os.listdir(tmp_path)) == ["cache", "t.tar", "t.tar.index"]
    scans = count_scans(monkeypatch)
    assert contents(quiet_index(path)) == contents(index) and not scans
    for file in cache.iterdir():
        file.unlink()
    cache.rmdir()
    cache.write_text("nor there")
    index = quiet_index(path)
    assert index.image(3) == picture(3) and len(scans) == 1


def test_opening_reads_little_of_each_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand shards of 10,000 samples are to open in 2 s (bench/test_opening.py); here a tenth of the shards has a
    tenth of that, in processor time, the best of three, and nothing but the heads of the indexes may be read."""
    write_indexes(tmp_path, OpenCase(100, 10_000))
    read: list[int] = []
    system = os.read

    def counted(file: int, count: int) -> bytes:
        data = system(file, count)
        read.append(len(data))
        return data

    monkeypatch.setattr(indexfile.os, "read", counted)
    monkeypatch.setattr(shard, "scan", None)
    paths = expand([str(tmp_path)])
    shards.index(paths)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        read.clear()
        index = shards.index(paths)
        streams = [
            order.Source(index.source(captioned), 0, kind) for kind, captioned in enumerate((True, False))
        ]
        assert len(index.manifest["hash"]) == 64
        assert [len(stream) for stream in streams] == [900_000, 100_000]
        key = index.key(streams[0].at(500_000)[1])
        seconds.append(time.process_time() - started)
        assert key.startswith("train-0000") and max(read) <= 1 << 14 and len(read) == 100
    assert min(seconds) < 0.2
