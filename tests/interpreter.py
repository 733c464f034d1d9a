"""Tests of Triton kernels, each in Triton's interpreter and, where there is one, on a GPU.

Whether Triton interprets is decided when it is imported, so what needs the interpreter runs in a process of its own. A
module of such tests imports the fixture, has `pytestmark = pytest.mark.usefixtures("interpreter")`, and `@on_each_device`
on each test.
bfloat16 is exact on a GPU only: the interpreter truncates where it should round.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch

worker: ProcessPoolExecutor


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """A process in which Triton interprets."""
    global worker
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, get_context("spawn")) as worker:
        patch.setenv("TRITON_INTERPRET", "1")
        worker.submit(os.getpid).result()  # it takes the environment as it starts
        patch.undo()
        yield


def on_each_device(test: Callable[..., None]) -> Any:
    """Run `test(device=...)` in the interpreter's process with "cpu", and here with "cuda"."""

    @functools.wraps(test)
    def run(device: str, **arguments: Any) -> None:
        asked = (test.__module__, test.__name__, device, arguments)
        if message := call(*asked) if device == "cuda" else worker.submit(call, *asked).result():
            pytest.skip(message)

    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    devices = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])]
    return pytest.mark.parametrize("device", devices, ids=["interpreter", "cuda"])(run)


def is_rounding(relative: float, tensor: torch.Tensor) -> bool:
    """Whether an error is of some roundings of float32, on a GPU. What plain PyTorch's largest error is among few numbers is
    luck there, and a right kernel is now and then beyond twice that by some percent."""
    return tensor.is_cuda and tensor.dtype == torch.float32 and relative <= 8 * torch.finfo(torch.float32).eps


def call(module: str, name: str, device: str, arguments: dict[str, Any]) -> str:
    """The test itself, with torch.empty giving NaN; why not, where it cannot run."""
    import numpy
    import triton

    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    if device == "cpu" and old and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        return "the interpreter of Triton 3.6 cannot loop under NumPy 2.4: install numpy<2.4, or Triton 3.7"
    torch.manual_seed(0)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, deterministic products raise
    torch.use_deterministic_algorithms(True)
    try:
        getattr(importlib.import_module(module), name).__wrapped__(device=device, **arguments)
    except pytest.skip.Exception as skip:
        return str(skip)
    finally:
        torch.use_deterministic_algorithms(False)
    return ""
