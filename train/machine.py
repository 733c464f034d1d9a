"""What this machine has: device, the faster precision, memory, free disk."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from train.config import ConfigError

BF16_MARGIN = 1.3  # a matmul this much faster is worth bf16's casts and coarser rounding


def versions(*packages: str) -> dict[str, str]:
    """Of what figures depend on: this project, torch, Python, and these packages."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    for name in ("auroraio", *packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed" + " (run from a checkout)" * (name == "auroraio")
    return found


@dataclass(frozen=True)
class Precision:
    """The arithmetic of matrix products, and why it was chosen."""

    name: str  # "bf16" or "fp32"
    why: str

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype for torch.autocast; None where it stays off."""
        return torch.bfloat16 if self.name == "bf16" else None


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` takes a GPU if there is one (GPU `local_rank` under torchrun). Raises ConfigError for a device
    that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is no torch device; use auto, cpu, cuda, cuda:1, ...") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use auto, cpu, cuda, cuda:1, ...")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = local_rank if device.index is None else device.index
        if not torch.cuda.is_available() or index >= count:
            raise ConfigError(
                f"device {name!r}: this machine has {count} usable GPU{'s' * (count != 1)} "
                f"under torch {torch.__version__}"
            )
        return torch.device("cuda", index)
    return device


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep freed blocks for the next step, instead of giving each large one back to the kernel and
    clearing new pages for the next. A step of Aurora-tiny on one thread of a noisy machine: all objectives 518 ms instead of
    664, contrastive alone 270 for 314, captions alone 371 for 398, masked images alone no less. Its cost in memory was not
    measured. Environment variables of the same meaning win. False where the C library is another one.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    return all(mallopt(option, 1 << 30) == 1 for option in (trim_threshold, mmap_threshold))


def device_name(device: torch.device) -> str:
    """For start-up lines and summary.json."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu ({threads} thread{'s' * (threads != 1)})"


def cores_and_load() -> tuple[int, float]:
    """Cores that this process may use, and how many programs wanted one in the last minute (0 where nobody knows)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        return cores, os.getloadavg()[0]
    except (AttributeError, OSError):
        return cores, 0.0


def crowded(threads: int, cores: int, load: float) -> str | None:
    """What to say where other programs keep cores busy that this one's threads wait for; None where they do not. load: programs
    that want a core, this one's threads among them. A team of threads is as slow as the slowest of it, and the others burn
    their cores meanwhile: with one of two cores taken, a step of two threads was seen to take seventeen times as long as
    one of one thread."""
    others = load - threads
    if threads == 1 or others < 0.7 or load < cores + 0.7:
        return None
    less = max(cores - round(others), 1)
    return (
        f"other programs keep this machine's {cores} cores busy (load {load:.1f}), and {threads} threads wait for each other: "
        f"OMP_NUM_THREADS={less} may be many times faster"
    )


def choose_precision(asked: str, device: torch.device) -> Precision:
    """Resolve "auto" | "bf16" | "fp32". fp16 is not offered: on CPUs it runs at 1 GFLOP/s, and Swin models
    overflow in it.
    """
    if asked != "auto":
        return Precision(asked, "as asked")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", "this GPU has bf16 matrix units")
        return Precision("fp32", "this GPU has no bf16 matrix units")
    speed = bf16_speed_on_cpu()
    faster = f"a bf16 matrix product takes {1 / speed:.2g} times as long as fp32 on this CPU"
    return Precision("bf16" if speed >= BF16_MARGIN else "fp32", faster)


def bf16_speed_on_cpu() -> float:
    """How many times faster a bf16 matrix product is than fp32 here; measured in about 50 ms.

    It differs a thousandfold: 1/280 where bf16 is emulated, 4 with AVX512-BF16. So a small product comes
    first, and a larger one only decides where the small one was near.
    """
    ratio = _speed(128, repeats=2)
    return ratio if ratio < 0.2 else _speed(512, repeats=4)


def _speed(size: int, repeats: int) -> float:
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.full((size, size), 0.5, dtype=dtype)
        a @ a  # the first product prepares the library
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process has held on the GPU, or in main memory where it trains on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # the standard library has no figure for it there
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_memory(device: torch.device) -> int | None:
    """Bytes of GPU memory, or of main memory (a container's limit where there is one); None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if sys.platform == "win32":
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total


def free_disk(path: Path) -> int:
    """Bytes free where `path` is, or will be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def gigabytes(count: float) -> str:
    """Bytes in words: "1.5 GB", "820 MB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
