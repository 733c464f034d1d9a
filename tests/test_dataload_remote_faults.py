"""Shards behind addresses: what happens when a server does not do its part."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import Handler, Server, quiet_index, two_shards

from dataload import remote, shards
from dataload.remote.address import Remote
from dataload.remote.cache import Cache
from dataload.shards import BrokenShard, expand
from tests.tars import contents_of_files as contents

pytestmark = pytest.mark.usefixtures("impatient")


def silent_server(answer: bytes, then: float = 60.0) -> tuple[socket.socket, str]:
    """A server that accepts, sends `answer` (perhaps nothing), and then says no more."""
    listener = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.append(connection)
            if answer:
                connection.recv(4096)
                connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}/a.tar"


@pytest.mark.parametrize("cached", [1 << 30, 0])
def test_a_server_that_never_answers(tmp_path: Path, cached: int) -> None:
    listener, url = silent_server(b"")
    started = time.monotonic()
    with pytest.raises(OSError, match=rf"{url}: asking for its size failed 4 times; .*"):
        shards.index(expand([url]), cache=Cache(tmp_path, cached, timeout=0.2))
    assert 0.8 <= time.monotonic() - started < 4
    with pytest.raises(OSError, match=rf"{re.escape(url)}: asking for its size failed"):
        shards.index(
            [Remote(url.replace("//", "//user:password@") + "?signature=secret")], cache=Cache(timeout=0.2)
        )
    listener.close()


def test_a_server_that_stalls_midway(tmp_path: Path, served: Callable[..., Server]) -> None:
    two_shards(tmp_path / "served")
    server = served()
    stop = threading.Event()

    def stall(handler: Handler) -> bool:
        if handler.command == "HEAD" or not handler.path.endswith(".tar"):
            return False
        size = (tmp_path / "served" / "t-000.tar").stat().st_size
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 0-{size - 1}/{size}")
        handler.send_header("Content-Length", str(size))
        handler.end_headers()
        handler.wfile.write(b"x" * 1000)
        handler.wfile.flush()
        stop.wait(30)
        return True

    server.before = stall
    started = time.monotonic()
    cache = Cache(tmp_path / "c", timeout=0.3)
    with pytest.raises(OSError, match=r"t-000\.tar: reading bytes 0 to \d+ failed 4 times"):
        shards.index(expand([f"{server.url}/t-000.tar"]), cache=cache)
    assert time.monotonic() - started < 5
    stop.set()
    assert not list(cache.directory.glob("*.tar")), "a part is never taken for a shard"
    server.before = lambda handler: False
    assert len(quiet_index(f"{server.url}/t-000.tar", cache=cache)) == 41


def test_a_server_that_drips(tmp_path: Path, served: Callable[..., Server]) -> None:
    """A byte now and then resets every timeout of a socket; the deadline is for the whole block."""
    two_shards(tmp_path / "served")
    server = served()
    stop = threading.Event()

    def drip(handler: Handler) -> bool:
        if handler.command == "HEAD" or not handler.path.endswith(".tar"):
            return False
        size = (tmp_path / "served" / "t-000.tar").stat().st_size
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 0-{size - 1}/{size}")
        handler.send_header("Content-Length", str(size))
        handler.end_headers()
        while not stop.wait(0.05):
            try:
                handler.wfile.write(b"x")
                handler.wfile.flush()
            except OSError:
                break
        return True

    server.before = drip
    started = time.monotonic()
    with pytest.raises(OSError, match=r"failed 4 times; the last time: no answer within 0\.3 s"):
        shards.index(expand([f"{server.url}/t-000.tar"]), cache=Cache(tmp_path / "c", timeout=0.3))
    assert time.monotonic() - started < 5
    stop.set()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_is_taken_up_again(
    tmp_path: Path, served: Callable[..., Server], ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK", 2000)
    [path, _] = two_shards(tmp_path / "served")
    server = served(gives_ranges=ranges)
    breaks = iter([False, True, True, False, True] + [False] * 1000)

    def break_off(handler: Handler) -> bool:
        if handler.command == "HEAD" or not handler.path.endswith(".tar") or not next(breaks):
            return False
        handler.connection.shutdown(socket.SHUT_RDWR)
        return True

    server.before = break_off
    assert contents(quiet_index(f"{server.url}/t-000.tar")) == contents(quiet_index(str(path)))


def test_a_download_goes_on_where_another_process_was_killed(
    tmp_path: Path, served: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK", 4096)
    [path, _] = two_shards(tmp_path / "served")
    data = path.read_bytes()
    server = served()
    cache = Cache()
    address = Remote(f"{server.url}/t-000.tar")
    facts = remote.facts(address, 5)
    cache.directory.mkdir()
    cache.path(address, facts).with_suffix(".partial").write_bytes(data[: 5 * 4096 + 7])
    assert cache.open(address, facts).read() == data
    first = [one for one in server.requests if one[0] == "GET"][0][2]
    assert first == f"bytes={5 * 4096 + 7}-{6 * 4096 + 6}"
    # without a stamp nothing says that the part is of this file
    nameless = served(stamps=False)
    address = Remote(f"{nameless.url}/t-000.tar")
    facts = remote.facts(address, 5)
    assert facts.stamp == ""
    cache.path(address, facts).with_suffix(".partial").write_bytes(b"?" * 5000)
    assert cache.open(address, facts).read() == data


def test_a_shard_that_changes_while_it_is_downloaded(
    tmp_path: Path, served: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK", 4096)
    [path, _] = two_shards(tmp_path / "served")
    server = served()
    address = Remote(f"{server.url}/t-000.tar")
    facts = remote.facts(address, 5)
    size = path.stat().st_size

    def swap(handler: Handler) -> bool:
        if handler.headers.get("Range", "").startswith("bytes=8192-"):
            path.write_bytes(b"y" * size)
        return False

    server.before = swap
    with pytest.raises(OSError, match="has changed since it was indexed"):
        Cache().open(address, facts)
    assert not [path for path in Cache().directory.iterdir() if path.suffix in (".tar", ".partial")]


@pytest.mark.parametrize("status", [403, 500])
def test_errors_of_a_server_name_the_address(
    tmp_path: Path, served: Callable[..., Server], status: int
) -> None:
    server = served()
    server.before = lambda handler: handler.send_error(status) or True  # type: ignore[func-returns-value]
    with pytest.raises(OSError, match=rf"{server.url}/a\.tar: .*{status}") as raised:
        shards.index(expand([f"{server.url}/a.tar?signature=secret"]))
    assert "secret" not in str(raised.value)
    assert len(server.requests) == (2 if status == 403 else 8), "only what may pass is tried again"


def test_no_host_and_no_file(served: Callable[..., Server]) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    listener.close()
    with pytest.raises(OSError, match=rf"http://127\.0\.0\.1:{port}/a\.tar: asking for its size failed"):
        shards.index(expand([f"http://127.0.0.1:{port}/a.tar"]))
    server = served()
    with pytest.raises(FileNotFoundError, match=f"{server.url}/a.tar"):
        shards.index(expand([f"{server.url}/a.tar"]))


def test_what_is_no_tar(tmp_path: Path, served: Callable[..., Server]) -> None:
    server = served()
    (tmp_path / "served" / "a.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(BrokenShard, match=f"{server.url}/a.tar: no readable tar header"):
        shards.index(expand([f"{server.url}/a.tar"]))


def test_a_filesystem_that_hangs(tmp_path: Path) -> None:
    """Filesystems that are not asynchronous have no timeouts that this could set."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Hanging(MemoryFileSystem):
        protocol = "hanging"

        def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
            time.sleep(20)
            return {}

    fsspec.register_implementation("hanging", Hanging, clobber=True)
    started = time.monotonic()
    with pytest.raises(OSError, match="hanging://a.tar: asking for its size failed 4 times"):
        shards.index(expand(["hanging://a.tar"]), cache=Cache(timeout=0.2))
    assert time.monotonic() - started < 4


def test_a_missing_package_names_the_extra() -> None:
    code = """
import sys
sys.modules["s3fs"] = None
from dataload import shards
try:
    shards.index(shards.expand(["s3://bucket/a.tar"]))
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert "pip install 'auroraio[cloud]'" in done.stdout, done.stderr
