"""Who decodes a batch: threads with simplejpeg and Pillow, or DALI (dali.py). Both give the same samples."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from dataload import prefetch
from dataload.samples import Drawn, Job, LoaderConfig, SampleMaker, Work
from dataload.scratch import Recycled
from dataload.threads import Threads

DALI_MISSING = "backend dali needs NVIDIA DALI, which is not installed here: pip install 'auroraio[gpu]'"


class Backend(prefetch.Backend[Job, Work], Protocol):
    """What makes batches of pictures."""

    name: str
    """for readers: "cpu", "dali (cuda:0)" """


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
        self._threads = Threads(maker.config.workers, "dataload")
        self._memory = Recycled(maker.config.prefetch + 2)  # what is ahead, and what the reader has

    def submit(self, jobs: Sequence[Job]) -> Work:
        """See prefetch.Backend."""
        size = self._maker.config.image_size
        images = self._memory.empty(len(jobs), size, size, 3)
        places = list(zip(jobs, images.numpy(), strict=True))
        return Work(self._threads.share(self._draw, places), images)

    def _draw(self, places: Sequence[tuple[Job, np.ndarray]]) -> list[Drawn]:
        drawn = []
        with self._maker.stages.idle():
            for job, out in places:
                self._threads.check()
                drawn.append(self._maker.draw(job, out))
        return drawn

    def dead(self) -> list[str]:
        """See prefetch.Backend."""
        return self._threads.dead()

    def close(self) -> None:
        """See prefetch.Backend."""
        self._threads.close()
        self._memory.close()

    def abandon(self) -> None:
        """See prefetch.Backend."""
        self._threads.abandon()
