"""What runs in a sandbox's child process. It imports little, so that a child starts fast.

parent -> child   ("load", function, modules, memory)    import them; limit the memory from then on
                  ("call", function, timeout, arguments)
child -> parent   ("ok", value) | ("broken", message) | ("memory", message) | ("error", traceback)
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from dataload.broken import BrokenSample
from dataload.sandbox import wire

GRACE = 1.0
"""seconds past a call's timeout, after which the kernel ends a child whose parent has not"""
_LOOK = 0.5  # seconds between two looks for the parent
_REQUEST_LIMIT = 1 << 34


def main(parent: int) -> None:
    """Serves the socket at file descriptor 0 until it closes. `parent` is the process that we die with."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    sock = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)  # what a library reads or prints must not get between our messages
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    no_core_files()
    functions: dict[str, Callable[..., object]] = {}
    wire.send(sock, ("ok", "ready"))
    while True:
        try:
            kind, function, *rest = wire.receive(sock, _REQUEST_LIMIT)
        except (EOFError, OSError):
            return
        answer = _load(functions, function, *rest) if kind == "load" else _call(functions[function], *rest)
        try:
            wire.send(sock, answer)
        except TypeError as error:  # what the function returned
            wire.send(sock, ("error", f"{function}: {error}"))
        except OSError:
            return
        del answer, rest  # not kept while waiting


def _load(
    functions: dict[str, Callable[..., object]], name: str, modules: tuple[str, ...], memory: int
) -> Any:
    try:
        for module in modules:
            importlib.import_module(module)
        module, _, attribute = name.partition(":")
        functions[name] = getattr(importlib.import_module(module), attribute)
        limit_memory(memory)
    except Exception:
        return "error", traceback.format_exc()
    return "ok", None


def _call(function: Callable[..., object], timeout: float, arguments: tuple[Any, ...]) -> Any:
    # The parent ends a call at its timeout. Were it gone, and our threads kept from running by a library that holds
    # the interpreter's lock, the kernel would end us.
    signal.setitimer(signal.ITIMER_REAL, timeout + GRACE)
    try:
        return "ok", function(*arguments)
    except BrokenSample as error:
        return "broken", str(error)
    except MemoryError as error:
        return "memory", str(error)
    except Exception:
        return "error", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _watch(parent: int) -> None:
    """Ends this process when its parent is gone, also in the middle of a call."""
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os._exit(1)


def no_core_files() -> None:
    """A crash leaves no core file behind."""
    import resource

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def limit_memory(room: int) -> None:
    """Lets this process take `room` bytes of address space beyond what it has. Linux alone: macOS keeps no such limit."""
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = taken + room
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard < 0 else min(wanted, hard), hard))
