"""What the child processes of dataload.sandbox run: bytes to pixels and samples. Nothing here imports torch."""

from __future__ import annotations

import numpy as np

RATE = 16_000
"""samples per second of every waveform"""


def keep_freed_memory(size: int = 8 << 20) -> None:
    """Lets glibc use again what was freed, up to twice `size` bytes, where it would hand it back to the kernel.

    A decoder takes and frees the same megabytes for each sample; to get them back page by page costs a tenth of its time, and a
    quarter of a WAV file's. It happens in any program that once frees so large an array (mallopt(3), M_MMAP_THRESHOLD). Without
    glibc, and where MALLOC_MMAP_THRESHOLD_ is set, nothing changes.
    """
    np.empty(size, np.uint8)


keep_freed_memory()
