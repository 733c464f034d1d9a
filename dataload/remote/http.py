"""HTTP through the session of fsspec's filesystem; the coroutines run in its loop, with the deadlines of dataload.remote."""

from __future__ import annotations

from typing import IO, Any

from dataload.remote.address import Facts, NoRanges, Remote


class _Status(OSError):
    """A server's refusal."""

    def __init__(self, answer: Any) -> None:
        super().__init__(f"the server answers {answer.status} {answer.reason}")
        self.status = answer.status


def _check_status(answer: Any, url: str) -> None:
    if answer.status in (404, 410):
        raise FileNotFoundError(f"no file at {Remote(url).shown}")
    if answer.status >= 400:
        raise _Status(answer)


async def facts(fs: Any, url: str) -> Facts:
    """Size and state of a file. Raises FileNotFoundError, or OSError with the server's status."""
    session = await fs.set_session()
    headers = {"Accept-Encoding": "identity"}
    async with session.head(fs.encode_url(url), allow_redirects=True, headers=headers) as answer:
        if answer.status < 400 and "Content-Length" in answer.headers:
            return _said(answer, int(answer.headers["Content-Length"]))
    # Some servers, and addresses signed for GET, answer no HEAD.
    async with session.get(fs.encode_url(url), headers={**headers, "Range": "bytes=0-0"}) as answer:
        _check_status(answer, url)
        total = answer.headers.get("Content-Range", "").rpartition("/")[2] or answer.headers.get(
            "Content-Length", ""
        )
        if not total.isdigit():
            raise OSError("the server does not say how large it is")
        return _said(answer, int(total))


def _said(answer: Any, size: int) -> Facts:
    if answer.headers.get("Content-Encoding", "identity") not in ("identity", ""):
        raise OSError("the server compresses it, so that its size is unknown")
    stamp = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    return Facts(size, stamp.strip('"'), answer.headers.get("Accept-Ranges", "").lower() == "bytes")


async def read(fs: Any, url: str, start: int, end: int) -> bytes:
    """Bytes start .. end of a file. Raises NoRanges where the server sends all of it."""
    session = await fs.set_session()
    headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    async with session.get(fs.encode_url(url), headers=headers) as answer:
        _check_status(answer, url)
        if answer.status != 206:
            raise NoRanges(f"{Remote(url).shown}: the server gives no parts of a file")
        said = answer.headers.get("Content-Range", "")
        if not said.replace(" ", "").startswith(f"bytes{start}-{end - 1}/"):
            raise OSError(f"asked for bytes {start} to {end}, the server speaks of {said!r}")
        data: bytes = await answer.content.readexactly(end - start)
        return data


async def stream(fs: Any, url: str, size: int, file: IO[bytes]) -> None:
    """All of a file, `size` bytes at most, into `file` from its start."""
    file.seek(0)
    file.truncate()
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), headers={"Accept-Encoding": "identity"}) as answer:
        _check_status(answer, url)
        async for chunk in answer.content.iter_chunked(1 << 20):
            file.write(chunk)
            if file.tell() > size:
                raise OSError(f"more than the {size} bytes that were announced")
