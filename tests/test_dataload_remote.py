"""Shards behind addresses: what is read is what is there, by HTTP, S3, Google Storage and others."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Handler, Server, quiet_index, two_shards

from dataload import remote, shards
from dataload.remote.cache import Cache
from dataload.shards import ShardIndex, expand, shard
from tests.tars import contents_of_files as contents
from tests.tars import pairs, picture, write_tar

pytestmark = pytest.mark.usefixtures("impatient")


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

    def answer(handler: Handler) -> bool:
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
