"""Decoders in processes of their own: a file that crashes, hangs or bloats a library costs one sample.

    with Sandbox(workers=2) as sandbox:
        clip = sandbox.call("package.module:function", data, 16_000, timeout=20.0)

What it holds off: crashes (the signal is named), endless loops (a timeout), memory bombs (a limit), and anything that a
child that has gone over to its file could send back: answers are JSON and raw arrays, never pickle. What it does not
hold off: a child can still read what its user may read, and reach the network; no system calls are filtered.

Children are new interpreters (no fork of a process with threads), start when first needed, ignore Ctrl-C, and die with
their parent within a second, also after SIGKILL. Linux and macOS; on macOS there is no limit on memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from queue import LifoQueue
from typing import Any

from dataload.broken import BrokenSample
from dataload.sandbox import wire

MEMORY = 2 << 30
"""bytes that a call may take beyond the libraries, unless a Sandbox is told otherwise"""
RESULT_LIMIT = 2 << 30
"""bytes of arrays in one answer; more is refused"""
START_TIMEOUT = 120.0
"""seconds for a child to start or to import a library: a busy machine with cold disks takes long"""
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_BUFFER = 1 << 20  # of a socket, bytes
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from dataload.sandbox.child import main
main(int(sys.argv[1]))
"""


class SandboxError(RuntimeError):
    """The sandbox itself failed, not the sample: a child cannot start, a library is missing, a function has a bug."""


class _Died(Exception):
    """A child ended during a call, or before it."""

    def __init__(self, message: str, ours: bool) -> None:
        super().__init__(message)
        self.ours = ours
        """it had not begun with the sample"""

    def meant(self, broken: type[BrokenSample]) -> Exception:
        """What its second time means."""
        return SandboxError(str(self)) if self.ours else broken(str(self))


class Sandbox:
    """A pool of child processes. May be used from several threads; each call has a child to itself.

    `workers` is the largest number of children, `memory` the bytes that each may take beyond its libraries.
    """

    def __init__(self, workers: int = 1, memory: int = MEMORY) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}: a sandbox needs at least one")
        self.workers = workers
        self.memory = memory
        self.restarts = 0
        """children that died or were ended, and were replaced"""
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._closed = False
        self._owner = os.getpid()
        self._children: set[_Child] = set()
        # Most recently used first: few calls keep few children busy. None is a child that is yet to start.
        self._idle: LifoQueue[_Child | None] = LifoQueue()
        for _ in range(self.workers):
            self._idle.put(None)
        self._finalizer = weakref.finalize(self, _end_all, self._children, self._owner)

    def grow(self, workers: int) -> None:
        """Lets the pool have at least `workers` children."""
        with self._lock:
            for _ in range(workers - self.workers):
                self._idle.put(None)
            self.workers = max(self.workers, workers)

    def call(
        self,
        function: str,
        *arguments: object,
        timeout: float,
        needs: Sequence[str] = (),
        broken: type[BrokenSample] = BrokenSample,
    ) -> Any:
        """function(*arguments), run in a child; `function` is "package.module:name".

        Arguments and result are plain values, bytes, numpy arrays, and lists, tuples and dicts of them. `timeout` is
        in seconds, from when a child is free and has imported the function's module and those that it `needs`.

        A child that ends during a call gets a successor that tries again: something else may have killed it. Raises
        `broken` when the function raises a BrokenSample (with its message), when the child crashes or ends twice,
        takes too long or too much memory; SandboxError when the function raises anything else; RuntimeError when
        the sandbox is closed.
        """
        with self._lock:
            if self._owner != os.getpid():  # a fork: the children are another process's
                self._finalizer.detach()
                self._reset()
        try:
            return self._once(function, arguments, timeout, tuple(needs), broken)
        except (
            _Died
        ):  # perhaps not of this sample: a child may be killed for memory that others took, or by hand
            try:
                return self._once(function, arguments, timeout, tuple(needs), broken)
            except _Died as error:
                raise error.meant(broken) from None

    def _once(
        self,
        function: str,
        arguments: tuple[object, ...],
        timeout: float,
        needs: tuple[str, ...],
        broken: type[BrokenSample],
    ) -> Any:
        child = self._idle.get()
        try:
            if self._closed:
                raise RuntimeError("the sandbox is closed")
            if child is None:
                child = _Child()
                with self._lock:
                    self._children.add(child)
            return child.call(function, arguments, timeout, needs, self.memory, broken)
        except BaseException:
            if self._closed:
                raise RuntimeError("the sandbox was closed during a call") from None
            raise
        finally:
            if child is not None and not child.alive:
                child.end()
                with self._lock:
                    self._children.discard(child)
                    self.restarts += 1
                child = None
            self._idle.put(child)

    def close(self) -> None:
        """Ends all children; calls in progress raise RuntimeError."""
        self._closed = True
        self._finalizer()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_SHARED: list[Sandbox] = []
_SHARED_LOCK = threading.Lock()


def shared(workers: int) -> Sandbox:
    """This process's own pool, of at least `workers` children: loaders that come and go keep the children that have
    started. It is closed when the process ends."""
    with _SHARED_LOCK:
        if not _SHARED:
            _SHARED.append(Sandbox(workers))
        _SHARED[0].grow(workers)
        return _SHARED[0]


def _end_all(children: set[_Child], owner: int) -> None:
    if os.getpid() == owner:
        for child in list(children):
            child.end()
            child.output.close()


class _Child:
    """One process and our end of its socket."""

    def __init__(self) -> None:
        self.alive = True
        self._loaded: set[str] = set()
        try:
            self._socket, theirs = socket.socketpair()
            self.output = tempfile.TemporaryFile()
        except OSError as error:
            raise SandboxError(f"cannot prepare a child process: {error}") from error
        for end in (self._socket, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        environment = dict(os.environ) | dict.fromkeys(_ONE_THREAD, "1")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(os.getpid()), json.dumps(sys.path)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self.output,
                env=environment,
                start_new_session=True,  # out of reach of the terminal's Ctrl-C
            )
        except OSError as error:
            raise SandboxError(f"cannot start {sys.executable}: {error}") from error
        finally:
            theirs.close()
        self._ask(None, "starting", START_TIMEOUT)

    def call(
        self,
        function: str,
        arguments: tuple[object, ...],
        timeout: float,
        needs: tuple[str, ...],
        memory: int,
        broken: type[BrokenSample],
    ) -> Any:
        """See Sandbox.call. `alive` is False after it when the child can do no more."""
        if function not in self._loaded:
            answer = self._ask(("load", function, needs, memory), f"importing {function}", START_TIMEOUT)
            _expect(*answer, function)
            self._loaded.add(function)
        deadline = time.monotonic() + timeout
        try:
            self._socket.settimeout(timeout)
            wire.send(self._socket, ("call", function, timeout, arguments))
            kind, value = _pair(wire.receive(self._socket, RESULT_LIMIT, deadline))
        except TimeoutError:
            self.end()
            raise broken(f"took longer than {timeout:g} s to decode") from None
        except (EOFError, OSError):
            raise _Died(f"the decoder was ended by it: {self._death()}", ours=False) from None
        except wire.WireError as error:
            self.end()
            raise broken(f"the decoder answered with {error}") from None
        except TypeError:  # an argument that cannot be sent; nothing was
            raise
        except BaseException:  # Ctrl-C: an answer may still come, and would be taken for the next call's
            self.end()
            raise
        if kind == "broken":
            raise broken(str(value))
        if kind == "memory":
            self.end()  # who knows what a library left undone
            raise broken(f"needs more than {memory >> 20} MiB to decode")
        _expect(kind, value, function)
        return value

    def _ask(self, request: object, doing: str, timeout: float) -> tuple[str, Any]:
        """A request that has nothing to do with a sample: failures are ours."""
        try:
            if request is not None:
                wire.send(self._socket, request)
            return _pair(wire.receive(self._socket, 0, time.monotonic() + timeout))
        except TimeoutError:
            self.end()
            raise SandboxError(f"a child process took longer than {timeout:g} s for {doing}") from None
        except (EOFError, OSError) as error:
            raise _Died(f"{doing}: {error}; {self._death()}\n{self._said()}", ours=True) from None
        except wire.WireError as error:
            raise SandboxError(f"{doing}: {error}; {self._death()}\n{self._said()}") from None
        except BaseException:
            self.end()
            raise

    def _death(self) -> str:
        """How the process ended, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.returncode
        self.end()
        if code is None:
            return "it closed its connection"
        if code >= 0:
            return f"exit code {code}"
        if code == -signal.SIGKILL:
            return "SIGKILL (of the system, when its memory is full)"
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"

    def _said(self) -> str:
        try:
            self.output.seek(0)
            return self.output.read()[-2000:].decode(errors="replace")
        except (OSError, ValueError):
            return ""

    def end(self) -> None:
        """Kills the process and waits for its end."""
        self.alive = False
        self._process.kill()
        self._process.wait()
        self._socket.close()


def _pair(answer: object) -> tuple[str, Any]:
    """What a child answered, if it has the form of an answer. Raises WireError."""
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], str):
        return answer
    raise wire.WireError("something else than a pair")


def _expect(kind: str, value: object, function: str) -> None:
    if kind != "ok":
        raise SandboxError(f"{function} failed in its sandbox\n{value}")
