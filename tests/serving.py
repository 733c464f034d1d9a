"""What the tests of remote shards share: a server that does its part or not, and small shards."""

from __future__ import annotations

import http.server
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataload import shards
from dataload.shards import ShardIndex, expand
from tests.tars import pairs, write_tar


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; `gives_ranges`, `etags` and `break_at` say how well."""

    daemon_threads = True

    def __init__(self, folder: Path, *, gives_ranges: bool = True, stamps: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.gives_ranges, self.stamps = folder, gives_ranges, stamps
        self.requests: list[tuple[str, str, str]] = []
        self.before: Callable[[Handler], bool] = lambda handler: False
        """what is done first; True = the request has been dealt with"""
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
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
