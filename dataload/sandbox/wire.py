"""Values through a socket between a process and its sandbox: a JSON header, then raw buffers.

Never pickle: the other side may have run a hostile file's code, and unpickling would run it here too. What can
be sent: None, bool, int, float, str, bytes, numpy arrays of numbers, and lists, tuples and dicts (keys: str) of them.

A message is the header's length (4 bytes), the header, and the buffers in the order in which the header names them.
In the header a container or a buffer is an object of one key: {"list": [...]}, {"tuple": [...]}, {"dict": {...}},
{"bytes": length}, {"array": [dtype, shape]}.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import time
from typing import Any

import numpy as np

HEADER_LIMIT = 1 << 20
"""bytes of a header; more is refused by both sides"""
_LENGTH = struct.Struct("<I")
_KINDS = "biuf"  # numpy's kinds: bool, signed, unsigned, float. No objects, no strings.


class WireError(ValueError):
    """What came is no message of ours, or is larger than allowed."""


def send(sock: socket.socket, value: object) -> None:
    """Sends one value. Raises TypeError for a type that cannot be sent, OSError when the other side is gone."""
    buffers: list[memoryview] = []
    header = json.dumps(_describe(value, buffers)).encode()
    if len(header) > HEADER_LIMIT:
        raise TypeError(
            f"{len(header)} bytes of plain values, over the limit of {HEADER_LIMIT}; send an array"
        )
    start = _LENGTH.pack(len(header)) + header
    if sum(map(len, buffers)) < 1 << 16:  # one system call for what is small
        sock.sendall(b"".join([start, *buffers]))
        return
    sock.sendall(start)
    for buffer in buffers:
        sock.sendall(buffer)


def receive(sock: socket.socket, limit: int, deadline: float | None = None) -> Any:
    """The next value.

    `limit` bounds the bytes of all its buffers, which are counted before any is made. `deadline` is a time of
    time.monotonic(). Raises EOFError when the other side closed, TimeoutError at the deadline, WireError for
    anything that is no message.
    """
    length = _LENGTH.unpack(_read(sock, bytearray(_LENGTH.size), deadline))[0]
    if length > HEADER_LIMIT:
        raise WireError(f"a header of {length} bytes")
    header = _read(sock, bytearray(length), deadline)
    try:
        buffers: list[Any] = []
        value = _build(json.loads(header), buffers, limit)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError, MemoryError) as error:
        raise WireError(f"a header that says nothing ({type(error).__name__}: {error})"[:200]) from None
    for buffer in buffers:
        _read(sock, buffer, deadline)
    return _finish(value)


def _describe(value: object, buffers: list[memoryview]) -> object:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case bytes() | bytearray() | memoryview():
            buffers.append(memoryview(value).cast("B"))
            return {"bytes": len(buffers[-1])}
        case np.ndarray() if value.dtype.kind in _KINDS and value.dtype.isnative:
            flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            buffers.append(flat.data)
            return {"array": [value.dtype.str, list(value.shape)]}
        case list():
            return {"list": [_describe(one, buffers) for one in value]}
        case tuple():
            return {"tuple": [_describe(one, buffers) for one in value]}
        case dict() if all(isinstance(key, str) for key in value):
            return {"dict": {key: _describe(one, buffers) for key, one in value.items()}}
    raise TypeError(
        f"cannot send {type(value).__name__} to or from a sandbox: plain values, bytes and arrays of numbers can be sent"
    )


class _Bytes:
    """A buffer that becomes `bytes` when it is full."""

    def __init__(self, length: int) -> None:
        self.data = bytearray(length)


def _build(header: Any, buffers: list[Any], limit: int) -> Any:
    """The value that a header describes, with its buffers allocated and still empty."""
    left = [limit]

    def take(size: int) -> int:
        if size < 0 or size > left[0]:
            raise WireError(f"more than {limit} bytes")
        left[0] -= size
        return size

    def build(one: Any) -> Any:
        if not isinstance(one, dict):
            if isinstance(one, list):
                raise WireError("a bare list")
            return one
        ((tag, what),) = one.items()
        match tag:
            case "list":
                return [build(each) for each in what]
            case "tuple":
                return tuple(build(each) for each in what)
            case "dict":
                return {key: build(each) for key, each in what.items()}
            case "bytes":
                made = _Bytes(take(int(what)))
                buffers.append(made.data)
                return made
            case "array":
                dtype, shape = np.dtype(str(what[0])), tuple(int(n) for n in what[1])
                if dtype.kind not in _KINDS or min(shape, default=0) < 0:
                    raise WireError(f"an array of {dtype} {shape}")
                take(math.prod(shape) * dtype.itemsize)
                array = np.empty(shape, dtype)
                buffers.append(array.reshape(-1).view(np.uint8))
                return array
        raise WireError(f"{tag!r}")

    return build(header)


def _finish(value: Any) -> Any:
    match value:
        case _Bytes():
            return bytes(value.data)
        case list():
            return [_finish(one) for one in value]
        case tuple():
            return tuple(_finish(one) for one in value)
        case dict():
            return {key: _finish(one) for key, one in value.items()}
    return value


def _read(sock: socket.socket, into: Any, deadline: float | None) -> Any:
    """Fills a buffer of bytes, and returns it."""
    view, done = memoryview(into), 0
    while done < len(view):
        if deadline is not None:
            sock.settimeout(max(deadline - time.monotonic(), 1e-6))
        count = sock.recv_into(view[done:])
        if count == 0:
            raise EOFError("the other side closed")
        done += count
    return into
