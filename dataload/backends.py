"""Who decodes a batch: threads with simplejpeg and Pillow, or DALI (dali.py). Both give the same samples."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch

from dataload.resize import one_thread
from dataload.samples import Drawn, Job, LoaderConfig, SampleMaker
from dataload.workers import Workers

DALI_MISSING = "backend dali needs NVIDIA DALI, which is not installed here: pip install 'auroraio[gpu]'"


@dataclass(frozen=True)
class Work:
    """A batch that is being made."""

    images: torch.Tensor
    """uint8 [B, H, W, 3], whole when all `parts` are done"""
    parts: list[Future[list[Drawn]]]
    """its samples, in their order"""

    def cancel(self) -> None:
        """What has not begun will not be done."""
        for part in self.parts:
            part.cancel()


class Backend(Protocol):
    """Makes batches in the order in which they are submitted, as far ahead as its caller likes."""

    name: str
    """for readers: "cpu", "dali (cuda:0)" """

    def submit(self, jobs: Sequence[Job]) -> Work:
        """Begins a batch. Broken samples are replaced; everything else that goes wrong is raised by the parts."""
        ...

    def close(self) -> None:
        """Stops the threads; what they have not begun never ends."""
        ...

    def abandon(self) -> None:
        """Forgets the threads: for a forked process, where they do not exist."""
        ...


def choose(config: LoaderConfig, maker: SampleMaker) -> Backend:
    """The backend that the config names; one that is named is never replaced by another.

    Raises ImportError for "dali" where it is not installed, ValueError for a GPU that is not there.
    """
    if config.backend == "cpu":
        return CpuBackend(maker)
    gpu = config.device != "cpu" and torch.cuda.is_available()
    if config.device.startswith("cuda") and not gpu and config.backend == "dali":
        raise ValueError(
            f"device is {config.device}, but torch finds no CUDA device; supported here: cpu, auto"
        )
    installed = _installed("nvidia.dali")
    if config.backend == "dali" and not installed:
        raise ImportError(DALI_MISSING)
    if config.backend == "auto" and not (gpu and installed):
        return CpuBackend(maker)
    from dataload.dali import DaliBackend

    named = config.device if config.device.startswith("cuda") else "cuda"
    return DaliBackend(maker, _indexed(torch.device(named)) if gpu else torch.device("cpu"))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nvidia itself is missing
        return False


def _indexed(device: torch.device) -> torch.device:
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


class CpuBackend:
    """Each thread makes a share of the batch, picture by picture; without threads, the caller does."""

    name = "cpu"

    def __init__(self, maker: SampleMaker) -> None:
        self._maker = maker
        self._closed = threading.Event()
        self._workers = maker.config.workers
        self._pool: Workers | None = None

    def submit(self, jobs: Sequence[Job]) -> Work:
        """See Backend."""
        size = self._maker.config.image_size
        images = torch.empty((len(jobs), size, size, 3), dtype=torch.uint8)
        if self._workers == 0:
            future: Future[list[Drawn]] = Future()
            with one_thread():
                future.set_result(self._draw(jobs, images))
            return Work(images, [future])
        if self._pool is None:
            self._pool = start_workers(self._workers, self._closed, "dataload")
        share = -(-len(jobs) // self._workers)
        starts = range(0, len(jobs), share)
        return Work(
            images,
            [self._pool.submit(self._draw, jobs[i : i + share], images[i : i + share]) for i in starts],
        )

    def _draw(self, jobs: Sequence[Job], images: torch.Tensor) -> list[Drawn]:
        drawn = []
        for job, out in zip(jobs, images.numpy(), strict=True):
            if self._closed.is_set():
                raise RuntimeError("the loader is closed")
            drawn.append(self._maker.draw(job, out))
        return drawn

    def close(self) -> None:
        """See Backend."""
        self._closed.set()
        if self._pool is not None:
            self._pool.close()

    def abandon(self) -> None:
        """See Backend."""
        if self._pool is not None:
            self._pool.abandon()


def start_workers(count: int, stop: threading.Event, name: str) -> Workers:
    """Threads in which torch does not use threads of its own (see resize.one_thread)."""
    pool = Workers(count, stop, name)
    before = torch.get_num_threads()
    if before == 1:
        return pool
    # torch keeps the number per thread, but what was set last is what a thread begins with when it first asks: so each
    # worker asks and sets its own (the barrier gives each of them one of these jobs), and then it is set back here.
    barrier = threading.Barrier(count)

    def limit() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)
        barrier.wait(60)

    for done in [pool.submit(limit) for _ in range(count)]:
        done.result()
    torch.set_num_threads(before)
    return pool
