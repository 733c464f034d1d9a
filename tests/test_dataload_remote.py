"""Shards behind addresses: what is read, what is kept, and what happens when a server does not do its part."""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_dataload_shards import contents_of_files as contents
from test_dataload_shards import pairs, picture, write_tar

from dataload import cache as cache_module
from dataload import remote, shard, shards
from dataload.address import Remote
from dataload.cache import Cache
from dataload.shards import BrokenShard, ShardIndex, ShardWarning, expand


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; `gives_ranges`, `etags` and `break_at` say how well."""

    daemon_threads = True

    def __init__(self, folder: Path, *, gives_ranges: bool = True, stamps: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.gives_ranges, self.stamps = folder, gives_ranges, stamps
        self.requests: list[tuple[str, str, str]] = []
        self.before: Callable[[_Handler], bool] = lambda handler: False
        """what is done first; True = the request has been dealt with"""
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.server.folder / self.path.split("?")[0].lstrip("/")
        asked = self.headers.get("Range", "")
        self.server.requests.append((self.command, path.name, asked))
        if self.server.before(self):
            return
        if path.is_dir():
            data = "".join(
                f'<a href="{child.name}">{child.name}</a>\n' for child in sorted(path.iterdir())
            ).encode()
        elif path.is_file():
            data = path.read_bytes()
        else:
            self.send_error(404)
            return
        whole = len(data)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked) if self.server.gives_ranges else None
        if match:
            start, end = int(match[1]), min(int(match[2]), whole - 1)
            data = data[start : end + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{whole}")
        else:
            self.send_response(200)
        if self.server.gives_ranges:
            self.send_header("Accept-Ranges", "bytes")
        if self.server.stamps and path.is_file():
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Content-Type", "text/html" if path.is_dir() else "application/x-tar")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Short pauses and timeouts, and a cache of the test's own."""
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    monkeypatch.setenv("AURORAIO_TIMEOUT", "5")
    monkeypatch.setenv("AURORAIO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers of tmp_path/served, which get closed."""
    servers: list[Server] = []

    def serve(**options: bool) -> Server:
        folder = tmp_path / "served"
        folder.mkdir(exist_ok=True)
        servers.append(Server(folder, **options))
        return servers[-1]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def quiet_index(*patterns: str, **options: Any) -> ShardIndex:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return shards.index(expand(patterns), **options)


def two_shards(folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [
        write_tar(folder / f"t-{n:03d}.tar", [*pairs(40, first=40 * n), (f"n{n}.flac", b"f")])
        for n in range(2)
    ]


# --- what is read is what is there ----------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_http(tmp_path: Path, served: Callable[..., Server], ranges: bool, whole: bool) -> None:
    local = two_shards(tmp_path / "served")
    here = quiet_index(*map(str, local))
    for index_file in (tmp_path / "served").glob("*.index"):
        index_file.unlink()
    server = served(gives_ranges=ranges)
    cache = Cache(max_bytes=1 << 30 if whole else 0)
    there = quiet_index(f"{server.url}/t-{{000..001}}.tar?signature=secret", cache=cache)
    assert contents(there) == contents(here) and there.manifest == here.manifest
    assert there.where(3) == (f"{server.url}/t-000.tar", "00003") and there.offset(3) == here.offset(3)
    kept = {path.suffix for path in cache.directory.iterdir()}
    assert ".index" in kept and (".tar" in kept) == (whole or not ranges)
    server.requests.clear()
    again = quiet_index(f"{server.url}/t-{{000..001}}.tar?signature=other", cache=cache)
    assert len(again) == 82 and again.image(1) == picture(1)
    gets = [one for one in server.requests if one[0] == "GET" and one[1].endswith(".tar")]
    assert not whole or not gets, "what is kept is not asked for again"


def test_https_through_a_real_certificate(tmp_path: Path, served: Callable[..., Server]) -> None:
    """The certificate is not trusted: that is an error that names the address, and is not passed over."""
    import ssl

    two_shards(tmp_path / "served")
    server = served()
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")], capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("needs openssl to make a certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = server.url.replace("http:", "https:")
    with pytest.raises(OSError, match=rf"{url}/t-000.tar: .*(?i:certificate)"):
        shards.index(expand([f"{url}/t-000.tar"]))


def test_http_globs_and_folders(tmp_path: Path, served: Callable[..., Server]) -> None:
    (tmp_path / "served").mkdir()
    two_shards(tmp_path / "served" / "sub")
    (tmp_path / "served" / "sub" / "notes.txt").write_text("x")
    server = served()
    wanted = [f"{server.url}/sub/t-000.tar", f"{server.url}/sub/t-001.tar"]
    assert [str(path) for path in expand([f"{server.url}/sub/t-*.tar"])] == wanted
    assert [str(path) for path in expand([f"{server.url}/sub/"])] == wanted
    with pytest.raises(FileNotFoundError, match=rf"no shard at {server.url}/sub/z-\*\.tar"):
        expand([f"{server.url}/sub/z-*.tar"])
    with pytest.raises(ValueError, match="named twice"):
        expand([wanted[0], f"{server.url}/sub/t-*.tar"])


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of an S3 server on this machine."""
    server_module = pytest.importorskip("moto.server", reason="needs moto[server]")
    pytest.importorskip("s3fs", reason="needs s3fs")
    import botocore.session

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "_filesystems", {})
    client = botocore.session.get_session().create_client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    urllib.request.urlopen(
        f"http://{host}:{port}/moto-api/reset", data=b""
    )  # it would live as long as the process
    server.stop()


@pytest.mark.parametrize("whole", [True, False])
def test_s3(tmp_path: Path, s3: Any, whole: bool) -> None:
    local = [write_tar(tmp_path / f"t-{n:03d}.tar", pairs(3, first=3 * n)) for n in range(5)]
    here = quiet_index(*map(str, local))
    for path in [*local, *(tmp_path / f"t-{n:03d}.tar.index" for n in (0, 1))]:
        s3.put_object(Bucket="bucket", Key=f"data/{path.name}", Body=path.read_bytes())
    for pattern in ("s3://bucket/data/t-*.tar", "s3://bucket/data", "s3://bucket/data/t-{000..004}.tar"):
        assert [str(path) for path in expand([pattern])] == [
            f"s3://bucket/data/{path.name}" for path in local
        ]
    cache = Cache(max_bytes=1 << 30 if whole else 0)
    there = quiet_index("s3://bucket/data", cache=cache)
    assert contents(there) == contents(here) and there.manifest == here.manifest
    write_tar(local[1], [(name, data.swapcase()) for name, data in pairs(3, first=3)])
    s3.put_object(Bucket="bucket", Key="data/t-001.tar", Body=local[1].read_bytes())
    fresh = Cache(tmp_path / "another", cache.max_bytes, cache.timeout)
    old = ShardIndex(tuple(shard.Shard(s.path, s.head, fresh, s.facts, s.store) for s in there.shards))
    with pytest.raises(OSError, match="s3://bucket/data/t-001.tar has changed since it was indexed"):
        old.image(4)
    s3.delete_object(Bucket="bucket", Key="data/t-002.tar")
    with pytest.raises(FileNotFoundError):
        old.image(7)
    with pytest.raises(FileNotFoundError, match="t-002"):
        shards.index(expand(["s3://bucket/data/t-{000..004}.tar"]), cache=cache)
    s3.put_object(Bucket="bucket", Key="data/t-000.tar.exclude", Body=b"00001\n")
    assert len(quiet_index("s3://bucket/data/t-{000,003}.tar", cache=cache)) == 5


def google_storage(server: Server, objects: dict[str, bytes]) -> None:
    """Answers the requests of Google's JSON API that reading needs, for the bucket "bucket"."""

    def entry(name: str) -> dict[str, Any]:
        digest = base64.b64encode(hashlib.md5(objects[name]).digest()).decode()
        return {
            "kind": "storage#object", "name": name, "bucket": "bucket", "size": str(len(objects[name])),
            "md5Hash": digest, "etag": digest, "generation": "1", "updated": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip

    def answer(handler: _Handler) -> bool:
        url = urllib.parse.urlsplit(handler.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        name = urllib.parse.unquote(url.path.partition("/o/")[2])
        status, extra = 200, {}
        if "/o/" not in url.path:
            prefix = query.get("prefix", "")
            body = json.dumps(
                {"items": [entry(key) for key in sorted(objects) if key.startswith(prefix)]}
            ).encode()
        elif name not in objects:
            status, body = 404, b"{}"
        elif query.get("alt") == "media" or "/download/" in url.path:
            body = objects[name]
            if match := re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", "")):
                status, body = 206, body[int(match[1]) : int(match[2]) + 1]
                extra = {"Content-Range": f"bytes {match[1]}-{match[2]}/{len(objects[name])}"}
        else:
            body = json.dumps(entry(name)).encode()
        handler.send_response(status)
        for header, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **extra,
        }.items():
            handler.send_header(header, value)
        handler.end_headers()
        handler.wfile.write(body)
        return True

    server.before = answer


def test_google_storage(
    tmp_path: Path, served: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a small imitation of the server: the addresses, the listing and the ranges are gcsfs's own."""
    pytest.importorskip("gcsfs", reason="needs gcsfs")
    local = [write_tar(tmp_path / f"t-{n:03d}.tar", pairs(3, first=3 * n)) for n in range(5)]
    server = served()
    google_storage(server, {f"data/{path.name}": path.read_bytes() for path in local})
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    monkeypatch.setattr(remote, "_filesystems", {})
    there = quiet_index("gs://bucket/data/t-*.tar")
    here = quiet_index(*map(str, local))
    assert contents(there) == contents(here) and there.manifest == here.manifest
    assert there.where(0) == ("gs://bucket/data/t-000.tar", "00000")
    assert contents(quiet_index("gs://bucket/data/t-{001..002}.tar", cache=Cache(max_bytes=0))) == {
        key: files for key, files in contents(here).items() if key[:5] in ("t-001", "t-002")
    }
    with pytest.raises(FileNotFoundError):
        shards.index(expand(["gs://bucket/data/none.tar"]))


def test_another_protocol_of_fsspec(tmp_path: Path) -> None:
    import fsspec

    local = two_shards(tmp_path)
    memory = fsspec.filesystem("memory")
    for path in local:
        memory.pipe_file(f"/data/{path.name}", path.read_bytes())
    there = quiet_index("memory://data/t-*.tar")
    assert contents(there) == contents(quiet_index(*map(str, local)))
    memory.rm("/data", recursive=True)
    assert there.image(0) == picture(0), "kept here"
    with pytest.raises(FileNotFoundError, match="memory://data/"):
        expand(["memory://data/"])
    with pytest.raises(ValueError, match="nosuch"):
        shards.index(expand(["nosuch://data/a.tar"]))


# --- indexes --------------------------------------------------------------------------------------


def test_the_index_beside_a_remote_shard_is_used_if_it_is_its_own(
    tmp_path: Path, served: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    [path, _] = two_shards(tmp_path / "served")
    expected = contents(quiet_index(str(path)))
    index_file = path.with_name(path.name + ".index")
    assert index_file.is_file()
    server = served()
    scans: list[str] = []
    scan = shard.scan
    monkeypatch.setattr(shard, "scan", lambda file, size, name: scans.append(name) or scan(file, size, name))

    def there(name: str) -> ShardIndex:
        return quiet_index(f"{server.url}/t-000.tar", cache=Cache(tmp_path / name))

    index = there("a")
    assert not scans and len(list((tmp_path / "a").glob("*.tar"))) == 0, "opened without the shard"
    assert contents(index) == expected
    whole = index_file.read_bytes()
    for number, spoilt in enumerate((whole[:-1], whole[:200], b"<html>", bytes(len(whole)))):
        index_file.write_bytes(spoilt)
        assert contents(there(f"b{number}")) == expected and len(scans) == number + 1
    # another tar of the same size: the index does not belong to it
    index_file.write_bytes(whole)
    files = [(name, data.swapcase()) for name, data in pairs(40)]
    write_tar(path, [*files, ("n0.flac", b"g")])
    scans.clear()
    assert there("c").captions(0) == ["CAPTION 0"] and len(scans) == 1


def test_a_shard_that_changes_gets_a_new_index(tmp_path: Path, served: Callable[..., Server]) -> None:
    [path, _] = two_shards(tmp_path / "served")
    server = served()
    first = quiet_index(f"{server.url}/t-000.tar")
    write_tar(path, pairs(7))
    second = quiet_index(f"{server.url}/t-000.tar")
    assert (len(first), len(second)) == (41, 7) and second.image(6) == picture(6)
    assert first.image(6) == picture(6), "the old one is still kept"
    for kept in Cache().directory.glob("*.tar"):
        kept.unlink()
    copy = ShardIndex(first.shards)
    with pytest.raises(OSError, match=r"t-000\.tar has changed since it was indexed"):
        copy.image(6)


# --- servers that do not do their part ------------------------------------------------------------


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

    def stall(handler: _Handler) -> bool:
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

    def drip(handler: _Handler) -> bool:
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

    def break_off(handler: _Handler) -> bool:
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

    def swap(handler: _Handler) -> bool:
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


# --- the folder on this machine -------------------------------------------------------------------


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
    fcntl = pytest.importorskip("fcntl")
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
