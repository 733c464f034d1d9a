"""Remote shards of the next group come while samples of this one are read."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clips import write_tar
from pairs import sample, tokenizer
from serving import Handler, Server, quiet_index

from dataload import order, shards
from dataload.multimodal.config import ImageConfig, MixtureConfig, SourceConfig
from dataload.multimodal.loader import MixtureLoader
from dataload.pipeline import Loader, LoaderConfig
from dataload.remote.cache import Cache
from dataload.shards import ShardIndex
from dataload.shards.ahead import ReadAhead
from dataload.tokenizer import Tokenizer

__all__ = ["tokenizer"]  # a fixture
pytestmark = pytest.mark.usefixtures("impatient")

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a POSIX system: there is no fork")
SAMPLES = 4
"""of each shard"""


@pytest.fixture(autouse=True)
def pairs_of_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (order, shards):
        monkeypatch.setattr(module, "GROUP", 2)


def serve(folder: Path, served: Callable[..., Server], count: int = 6) -> tuple[Server, str, int]:
    """A server of shards with their indexes, so that opening them downloads none; their addresses, and the largest size."""
    folder.mkdir()
    for n in range(count):
        write_tar(folder / f"t-{n}.tar", {f"{n}{i}": sample(SAMPLES * n + i) for i in range(SAMPLES)})
    shards.index(sorted(folder.glob("*.tar")))
    server = served()
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    return server, f"{server.url}/t-{{0..{count - 1}}}.tar", largest


def downloads(server: Server) -> list[str]:
    """The shards that were asked for from their beginning."""
    return [
        name
        for verb, name, asked in server.requests
        if verb == "GET" and name.endswith(".tar") and asked.startswith("bytes=0-")
    ]


def settled(server: Server, count: int) -> list[str]:
    """The shards that were downloaded, once there are `count` (or ten seconds have passed) and no more come."""
    until = time.monotonic() + 10
    while len(downloads(server)) < count and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.2)
    return downloads(server)


def opened(server: Server, pattern: str, cache: Cache) -> ShardIndex:
    """The index; what opening asks for (a tail of each shard, to see whose index it is) is forgotten."""
    index = quiet_index(pattern, cache=cache)
    assert not list(cache.directory.glob("*.tar"))
    server.requests.clear()
    return index


def followed(index: ShardIndex, ahead: ReadAhead) -> order.Source:
    return order.Source(index.source(captioned=True), seed=1, kind=0, begun=ahead.of(index.shards))


def groups_of(index: ShardIndex, epochs: int = 1) -> list[set[str]]:
    """The names of the shards of each group, in their order, from what is read."""
    source = order.Source(index.source(captioned=True), seed=1, kind=0)
    names = [index.where(source.at(at)[1])[0].rsplit("/", 1)[1] for at in range(epochs * len(source))]
    return [set(names[at : at + 2 * SAMPLES]) for at in range(0, len(names), 2 * SAMPLES)]


def test_a_source_says_which_shards_come_next() -> None:
    """By their places among all shards, of which the empty ones are never read; over the end of an epoch too."""
    said: list[tuple[list[int], list[int]]] = []
    numbers = [[0, 1], [], [2, 3], [4, 5], [], [6, 7], [8]]
    source = order.Source(
        numbers, seed=1, kind=0, begun=lambda now, coming: said.append((list(now), list(coming)))
    )
    read = [source.at(at)[1] for at in range(3 * len(source))]
    assert [sorted(read[at : at + 9]) for at in (0, 9, 18)] == 3 * [list(range(9))], (
        "saying so changes nothing"
    )
    assert len(said) == 9
    for (now, coming), (after, _) in zip(said, said[1:], strict=False):
        assert coming == after and now
    at = 0
    for now, _ in said:
        own = [number for place in now for number in numbers[place]]
        assert sorted(read[at : at + len(own)]) == sorted(own)
        at += len(own)


def test_the_next_group_comes_while_this_one_is_read(tmp_path: Path, served: Callable[..., Server]) -> None:
    server, pattern, size = serve(tmp_path / "served", served)
    index = opened(server, pattern, Cache(max_bytes=6 * size))
    groups = groups_of(index)
    source = followed(index, ReadAhead())
    index.image(source.at(0)[1])
    got = settled(server, 3)
    assert set(got[-2:]) | set(got[:2]) >= groups[1], (
        "both shards of the next group, of which no sample was read"
    )
    assert len(got) == 3 and not set(got) & groups[2]
    for at in range(len(source)):
        index.image(source.at(at)[1])
    got = settled(server, 6)
    assert sorted(got) == sorted(name for group in groups for name in group), "each shard once"


def test_no_shard_pushes_out_one_that_is_read(tmp_path: Path, served: Callable[..., Server]) -> None:
    server, pattern, size = serve(tmp_path / "served", served)
    index = opened(server, pattern, Cache(max_bytes=3 * size))
    source = followed(index, ReadAhead())
    index.image(source.at(0)[1])
    assert len(settled(server, 1)) == 1, "the cache has room for a group and a half"
    again = opened(server, pattern, Cache(tmp_path / "none", max_bytes=0))
    source = followed(again, ReadAhead())
    again.image(source.at(0)[1])
    assert not settled(server, 0), "samples are requests of their own"


def test_what_fails_ahead_is_tried_again_by_who_reads(tmp_path: Path, served: Callable[..., Server]) -> None:
    server, pattern, size = serve(tmp_path / "served", served)
    index = opened(server, pattern, Cache(max_bytes=6 * size))
    source, broken = followed(index, ReadAhead()), True

    def fails(handler: Handler) -> bool:
        if broken and handler.path[1:] in groups[1]:
            handler.send_error(503)
            return True
        return False

    groups = groups_of(index)
    server.before = fails
    index.image(source.at(0)[1])
    time.sleep(0.5)
    broken = False
    for at in range(len(source)):
        assert index.image(source.at(at)[1])


def test_what_was_read_before_has_room_too(tmp_path: Path, served: Callable[..., Server]) -> None:
    """Other ranks, and batches that are being made, may still read it: five shards are two groups and a half."""
    server, pattern, size = serve(tmp_path / "served", served)
    index = opened(server, pattern, Cache(max_bytes=5 * size))
    groups, source = groups_of(index), followed(index, ReadAhead())
    for at in range(2 * SAMPLES + 1):
        index.image(source.at(at)[1])
    assert not set(settled(server, 4)) & groups[2]


@forks
def test_a_fork_amid_a_download_does_not_keep_its_lock(tmp_path: Path, served: Callable[..., Server]) -> None:
    """The child waits for the shard as long as its parent downloads it, and no longer."""
    server, pattern, size = serve(tmp_path / "served", served)
    index = opened(server, pattern, Cache(max_bytes=6 * size))
    source = followed(index, ReadAhead())
    begun, under_way = threading.Event(), []

    def slow(handler: Handler) -> bool:
        if handler.command == "GET":
            under_way.append(f"{server.url}{handler.path}")
            begun.set()
            time.sleep(0.5)
        return False

    server.before = slow
    source.at(0)
    assert begun.wait(10)
    wanted = next(sample for sample in range(len(index)) if index.where(sample)[0] == under_way[0])
    child = os.fork()
    if child == 0:
        try:
            index.image(wanted)
            os._exit(0)
        finally:
            os._exit(4)
    started = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert time.monotonic() - started < 4


def test_the_thread_ends_with_its_loader(tmp_path: Path, served: Callable[..., Server]) -> None:
    server, pattern, size = serve(tmp_path / "served", served)
    index = opened(server, pattern, Cache(max_bytes=6 * size))
    ahead, held, begun = ReadAhead(), threading.Event(), threading.Event()

    def hold(handler: Handler) -> bool:
        if handler.command == "GET":
            begun.set()
            held.wait(10)
        return False

    server.before = hold
    source = followed(index, ahead)
    source.at(0)
    assert begun.wait(10)
    del source, ahead
    gc.collect()
    held.set()
    assert len(settled(server, 2)) == 1, "the shard that was under way"


def test_a_system_without_threads_reads_on(
    tmp_path: Path, served: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, pattern, size = serve(tmp_path / "served", served)
    index = opened(server, pattern, Cache(max_bytes=6 * size))
    source = followed(index, ReadAhead())

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        source.at(0)
    index.image(source.at(2 * SAMPLES)[1])
    assert len(settled(server, 3)) >= 2, "the next group begins another thread"


def test_nothing_more_comes_when_closed(tmp_path: Path, served: Callable[..., Server]) -> None:
    server, pattern, size = serve(tmp_path / "served", served)
    index = opened(server, pattern, Cache(max_bytes=6 * size))
    ahead = ReadAhead()
    source = followed(index, ahead)
    ahead.close()
    index.image(source.at(0)[1])
    assert len(settled(server, 1)) == 1


@forks
def test_a_fork_has_a_thread_of_its_own(tmp_path: Path, served: Callable[..., Server]) -> None:
    server, pattern, size = serve(tmp_path / "served", served)
    index = opened(server, pattern, Cache(max_bytes=6 * size))
    ahead = ReadAhead()
    source = followed(index, ahead)
    ahead._lock.acquire()
    ahead._running = True
    child = os.fork()
    if child == 0:
        try:
            source.at(0)
            until = time.monotonic() + 10
            while ahead._running and time.monotonic() < until:
                time.sleep(0.01)
            os._exit(0 if not ahead._running else 3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert set(downloads(server)) == groups_of(index)[1]


@pytest.mark.parametrize("kind", ["pictures", "mixture"])
def test_the_loaders_read_ahead(
    kind: str, tmp_path: Path, served: Callable[..., Server], tokenizer: Tokenizer
) -> None:
    """The third batch's shards, when the first has been read."""
    server, pattern, _ = serve(tmp_path / "served", served)
    if kind == "pictures":
        config = LoaderConfig((pattern,), 2, 32, 16, workers=0, uncaptioned_fraction=0.0)
        loader: Loader | MixtureLoader = Loader(config, tokenizer)
    else:
        source = SourceConfig((pattern,), weight=1, modalities=("image", "text"))
        loader = MixtureLoader(
            MixtureConfig({"all": source}, batch_size=2, image=ImageConfig(size=32, cell=8), workers=0),
            tokenizer,
        )
    server.requests.clear()
    with loader:
        first = {key.split("/")[0] + ".tar" for key in next(loader).keys}
        got = settled(server, len(first) + 2)
        assert len(got) == len(set(got)) >= len(first) + 2
    assert len(settled(server, 0)) == len(got)
