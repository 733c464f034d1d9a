"""What tests run in a sandbox's child."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time

import numpy as np

from dataload.broken import BrokenSample


def crash() -> None:
    """A read of address 0."""
    ctypes.string_at(0)


def crash_on(*arguments: object) -> None:
    """Instead of a decoder."""
    crash()


def abort() -> None:
    os.abort()


def leave(code: int) -> None:
    os._exit(code)


def loop() -> None:
    while True:
        pass


def hold_the_lock(seconds: int) -> None:
    """Sleeps without letting any other thread of the interpreter run."""
    ctypes.PyDLL(None).sleep(seconds)


def bloat(size: int) -> int:
    return len(np.ones(size, np.uint8))


def broken(message: str) -> None:
    raise BrokenSample(message)


def bug() -> None:
    raise KeyError("not the sample's fault")


def double(array: np.ndarray) -> np.ndarray:
    return array * 2


def process() -> int:
    return os.getpid()


def rest(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def unsendable() -> object:
    return object()


def interrupt() -> str:
    os.kill(os.getpid(), signal.SIGINT)
    return "still here"


def printing() -> str:
    os.write(1, b"x" * 100_000)
    os.write(2, b"x" * 100_000)
    return "said"


def _parents_socket() -> socket.socket:
    """The child's end of its connection, found as hostile code would find it."""
    for number in range(3, 64):
        try:
            found = socket.socket(fileno=os.dup(number))
            if found.family == socket.AF_UNIX:
                return found
        except OSError:
            continue
    raise AssertionError("no socket")


def answer_with(data: bytes) -> None:
    """Writes `data` to the parent past the protocol, and hangs."""
    _parents_socket().sendall(data)
    time.sleep(60)
