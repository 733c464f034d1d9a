"""Several ranks in a test: processes forked from one that has imported everything, as if torchrun had started them.

A launch takes a fraction of a second; as many Python processes would take ten.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = [
    "torch", "train.pretrain", "train.engines.fsdp2", "deepspeed", "torch.distributed.run", "test_train_engine", "ranks",
]  # fmt: skip


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


def _rank(
    environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...], results: Any
) -> None:
    os.environ.update(environment)
    rank = int(environment["RANK"])
    if output := environment.get("RANKS_OUTPUT"):
        file = os.open(f"{output}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
    try:
        results.put((rank, True, function(*arguments)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise


class Launch:
    """`size` ranks that call function(*arguments); both must be picklable. RANKS_OUTPUT="path" sends what rank N prints to
    path-N.txt."""

    daemon = True

    def __init__(self, size: int, function: Callable[..., Any], *arguments: Any, **environment: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._results = context.Queue()
        common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": str(free_port()), **environment}
        self.processes: list[BaseProcess] = []
        for rank in range(size):
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(
                context.Process(
                    target=_rank, args=(own, function, arguments, self._results), daemon=self.daemon
                )
            )
        for process in self.processes:
            process.start()

    def join(self, seconds: float = 280) -> list[int | None]:
        """Wait for all; returns their exit codes. What does not end is killed."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0.1))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def results(self, seconds: float = 280) -> list[Any]:
        """What each rank returned. Raises AssertionError with the traceback of one that failed."""
        found: dict[int, Any] = {}
        end = time.monotonic() + seconds
        try:
            while len(found) < len(self.processes):
                rank, good, value = self._results.get(timeout=max(end - time.monotonic(), 0.1))
                assert good, f"rank {rank}: {value}"
                found[rank] = value
        except queue.Empty:
            raise AssertionError(f"only ranks {sorted(found)} came back in {seconds} s") from None
        finally:
            if len(found) < len(self.processes):
                self.kill()
        for process in self.processes:
            process.join(30)
        return [found[rank] for rank in sorted(found)]

    def kill(self, *ranks: int) -> None:
        """SIGKILL, to all where none is named."""
        for rank in ranks or range(len(self.processes)):
            process = self.processes[rank]
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()


class Agent(Launch):
    """One node: torchrun's own parser and agent in a process, with ranks that are forked instead of being started as new
    Pythons. `launcher` is what torchrun takes."""

    daemon = False  # it has children

    def __init__(
        self, launcher: list[str], function: Callable[..., Any], *arguments: Any, **environment: str
    ) -> None:
        super().__init__(1, agent, [*launcher, "--start-method", "fork"], function, arguments, **environment)

    @property
    def pid(self) -> int:
        """Of the agent."""
        pid = self.processes[0].pid
        assert pid
        return pid

    @property
    def ranks(self) -> list[int]:
        """The processes that it has started."""
        try:
            return [
                int(word) for word in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            ]
        except FileNotFoundError:
            return []

    def kill(self, *ranks: int) -> None:
        """The agent first, which would start them again, and then its ranks."""
        own = self.ranks
        super().kill()
        for pid in own:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def agent(launcher: list[str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """What `torchrun LAUNCHER` does, with a function for a script; it must return 0."""
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    config, _, _ = config_from_args(parse_args([*launcher, "function"]))
    elastic_launch(config, _succeed)(function, arguments)


def _succeed(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if code := function(*arguments):
        raise SystemExit(code)
