"""Memory that a thread uses again for each picture.

Megabytes that are asked for and given back per picture come from the system anew, zeroed page by page: a tenth of the cost of
a picture.
"""

from __future__ import annotations

import threading

import numpy as np

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
