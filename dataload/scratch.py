"""Memory that is used again: a thread's own for each picture, and batches' once their readers are done with them.

Megabytes that are asked for and given back come from the system anew, zeroed page by page: for what a picture is made in, a
tenth of the cost of a picture; for its place in the batch, some 7% (bench/results/2026-11-28-epyc-cpu-pipeline).
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque

import numpy as np
import torch

_LARGEST = 32 << 20
"""bytes; what is larger is not kept"""
_kept = threading.local()


def scratch(name: str, size: int) -> np.ndarray:
    """uint8 [size] with anything in it, this thread's own, until the thread asks for the same name again."""
    if size > _LARGEST:
        return np.empty(size, dtype=np.uint8)
    kept: np.ndarray | None = getattr(_kept, name, None)
    if kept is None or kept.size < size:
        kept = np.empty(size, dtype=np.uint8)
        setattr(_kept, name, kept)
    return kept[:size]


class Recycled:
    """Tensors whose memory goes to a later one of the same size as soon as nothing refers to it any more: no tensor, no view
    and no array of numpy's. Any thread may ask for them and drop them."""

    def __init__(self, most: int) -> None:
        """At most `most` are kept for later at a time."""
        self._free: deque[np.ndarray] = deque(maxlen=most)
        # By their ids: an array has no hash, nor has a reference to it.
        self._lent: dict[int, weakref.ref[np.ndarray]] = {}

    def empty(self, *shape: int) -> torch.Tensor:
        """uint8 of this shape on the CPU, with anything in it."""
        size = math.prod(shape)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(size, dtype=np.uint8)
        if memory.size != size:
            memory = np.empty(size, dtype=np.uint8)
        lent = memory[:]  # torch holds on to this one for as long as anything shares the tensor's memory
        pool = weakref.ref(self)  # a tensor outlives its loader, and must not keep alive what else lies here

        def back(reference: weakref.ref[np.ndarray]) -> None:
            here = pool()
            if here is not None and here._lent.pop(id(reference), None) is not None:
                here._free.append(memory)

        reference = weakref.ref(lent, back)
        self._lent[id(reference)] = reference
        return torch.from_numpy(lent).view(shape)

    @property
    def kept(self) -> int:
        """How many wait for the next use."""
        return len(self._free)

    def close(self) -> None:
        """Keeps nothing for later, and nothing that is still in use either."""
        self._lent.clear()
        self._free.clear()
