"""Shards behind addresses: what is kept on this machine, and what is checked."""

from __future__ import annotations

import io
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Server, quiet_index, two_shards

from dataload import remote, shards
from dataload.remote import cache as cache_module
from dataload.remote.address import Remote
from dataload.remote.cache import Cache
from dataload.shards import ShardWarning, expand, shard
from tests.tars import pairs, picture, write_tar

pytestmark = pytest.mark.usefixtures("impatient")


def test_what_was_used_least_recently_goes(tmp_path: Path, served: Callable[..., Server]) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    paths = [write_tar(folder / f"t-{n}.tar", pairs(4, first=4 * n)) for n in range(4)]
    size = paths[0].stat().st_size
    server = served()
    addresses = [Remote(f"{server.url}/{path.name}") for path in paths]
    facts = [remote.facts(address, 5) for address in addresses]
    cache = Cache(max_bytes=2 * size + 100)
    for n in (0, 1, 0, 2):
        cache.open(addresses[n], facts[n])
        time.sleep(0.02)  # times of files tell who was last
    there = [cache.path(*one).exists() for one in zip(addresses, facts, strict=True)]
    assert there == [True, False, True, False]
    tiny = Cache(max_bytes=10)
    assert tiny.open(addresses[3], facts[3]).read() == paths[3].read_bytes(), "one fits always"
    assert [path.name for path in cache.directory.glob("*.tar")] == [cache.path(addresses[3], facts[3]).name]
    # an index with open shards does not mind
    with pytest.warns(ShardWarning, match="holds fewer than 4 of these shards"):
        index = shards.index(addresses, cache=tiny)
    rng = np.random.default_rng(0)
    for sample in rng.permutation(16).tolist():
        assert index.image(sample) == picture(sample)
    old = cache.directory / "0123.partial"
    old.write_bytes(b"x")
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    cache.open(addresses[0], facts[0])
    assert not old.exists()


def test_a_cache_that_is_too_small_to_train_with_says_so(
    tmp_path: Path, served: Callable[..., Server]
) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    paths = [write_tar(folder / f"t-{n:03d}.tar", pairs(2)) for n in range(17)]
    size = paths[0].stat().st_size
    server = served()
    pattern = f"{server.url}/t-{{000..016}}.tar"
    with pytest.warns(ShardWarning, match=r"holds fewer than 16 of these shards.*AURORAIO_CACHE_GIB"):
        shards.index(expand([pattern]), cache=Cache(max_bytes=15 * size))
    for enough in (16 * size, 0):
        quiet_index(pattern, cache=Cache(max_bytes=enough))


def _fetch(url: str, folder: str, done: Any) -> None:
    address = Remote(url)
    cache = Cache(Path(folder), timeout=20)
    done.put(len(cache.open(address, remote.facts(address, 20)).read()))


def test_several_processes_download_a_shard_once(tmp_path: Path, served: Callable[..., Server]) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    path = write_tar(folder / "t.tar", [("a.jpg", b"x" * 3_000_000)])
    server = served()
    context = multiprocessing.get_context("fork")  # also: fsspec's thread does not survive a fork
    assert len(quiet_index(f"{server.url}/t.tar", cache=Cache(tmp_path / "warm"))) == 1
    server.requests.clear()
    done = context.Queue()
    processes = [
        context.Process(target=_fetch, args=(f"{server.url}/t.tar", str(tmp_path / "c"), done))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    sizes = [done.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sizes == [path.stat().st_size] * 3
    assert len([one for one in server.requests if one[0] == "GET"]) == 1


def test_a_downloader_that_stands_still_is_not_waited_for_for_ever(
    tmp_path: Path, served: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl", reason="needs a POSIX system: fcntl is not on Windows")
    two_shards(tmp_path / "served")
    server = served()
    address = Remote(f"{server.url}/t-000.tar")
    facts = remote.facts(address, 5)
    cache = Cache(timeout=0.1)
    cache.directory.mkdir()
    monkeypatch.setattr(cache_module, "_GRACE", 0.1)
    with open(cache.path(address, facts).with_suffix(".lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=r"t-000\.tar: another process has been downloading it"):
            cache.open(address, facts)
    assert len(cache.open(address, facts).read()) == facts.size


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, served: Callable[..., Server]) -> None:
    two_shards(tmp_path / "served")
    server = served()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        shards.index(expand([f"{server.url}/t-000.tar"]), cache=Cache(tmp_path / "file"))


def test_problems_of_remote_shards_are_named_by_address(
    tmp_path: Path, served: Callable[..., Server]
) -> None:
    [path, _] = two_shards(tmp_path / "served")
    path.write_bytes(path.read_bytes()[:-30_000])
    server = served()
    with pytest.warns(ShardWarning, match=rf"{server.url}/t-000\.tar: .*the tar is damaged here"):
        shards.index(expand([f"{server.url}/t-000.tar"]))


def test_tars_read_by_ranges_are_checked(tmp_path: Path, served: Callable[..., Server]) -> None:
    [path, _] = two_shards(tmp_path / "served")
    server = served(stamps=False)  # so that only the header in front of the sample can tell
    index = quiet_index(f"{server.url}/t-000.tar", cache=Cache(max_bytes=0))
    assert index.image(2) == picture(2)
    data = path.read_bytes()
    path.write_bytes(data[512:] + data[:512])
    with pytest.raises(OSError, match="has changed since it was indexed"):
        index.image(2)


def test_ranges_buffer() -> None:
    import fsspec

    data = np.random.default_rng(0).bytes(700_000)
    fsspec.filesystem("memory").pipe_file("/buffer.tar", data)
    address = Remote("memory://buffer.tar")
    file = shard._ranged(address, remote.facts(address, 5), 5)
    same = io.BytesIO(data)
    for start in (0, 699_000, 3, 262_144, 800_000):
        assert file.seek(start) == same.seek(start) and file.read(300_000) == same.read(300_000)
