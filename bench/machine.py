"""What this machine is, and what it can do at best: measured in the same run as everything else."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.peaks import peak_of
from bench.record import Ceilings

VERSIONS = (
    "torch",
    "triton",
    "timm",
    "transformers",
    "flash-attn",
    "torchvision",
    "webdataset",
    "numpy",
    "nvidia-dali-cuda130",
)
OPTIONAL = {
    "triton": "the Triton kernels and their compilation (bench.aot)",
    "timm": "timm's SwinV2 as a peer",
    "transformers": "transformers' SwinV2 and Perceiver as peers",
    "webdataset": "webdataset as the loader's peer",
    "nvidia.dali": "the loader's DALI backend, and DALI as a peer",
    "torchvision": "torchvision's transforms in the loader's peer",
    "sentencepiece": "the loader, ours and webdataset",
    "PIL": "the loader, ours and webdataset",
    "flash_attn": "FlashAttention as a peer (CUDA only)",
    "jinja2": "the page (run.json has its rows)",
    "pytest": "the tests",
}
CPU_CACHE = 32 << 20  # where the system does not tell


def device() -> str:
    """ "cuda" where torch finds a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(kind: str) -> str:
    """The GPU as torch calls it; a CPU's model and how many threads torch uses."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpu_model()}, {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cache_bytes(kind: str) -> int:
    """Size of the last-level cache."""
    if kind == "cuda":
        peak = peak_of(torch.cuda.get_device_name())
        return peak.l2 if peak else torch.cuda.get_device_properties(0).L2_cache_size
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or CPU_CACHE
    except (ValueError, OSError):
        return CPU_CACHE


def versions() -> dict[str, str]:
    """Python, the system, and every package that a figure depends on and that is installed."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda and torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
    return found


def absent() -> dict[str, str]:
    """Optional packages that are not installed -> what is missed without them."""
    return {name: why for name, why in OPTIONAL.items() if not there(name)}


def there(name: str) -> bool:
    """Whether a package is installed."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def commit() -> str:
    """The checkout's short commit, with "+" where files differ from it; "unknown" without git."""
    root = Path(__file__).resolve().parent
    try:
        name, changes = (
            subprocess.run(
                ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=True
            ).stdout
            for args in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return name.strip() + ("+" if changes.strip() else "")


def command() -> str:
    """The command line of this process, as one would type it on any machine: of an absolute path the last part is kept."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    words = [Path(sys.argv[0]).name]
    if spec is not None:
        words = ["python", "-m", spec.name.removesuffix(".__main__")]
    return shlex.join([*words, *map(_portable, sys.argv[1:])])


def _portable(word: str) -> str:
    """--out=/mnt/disk/report as --out=report."""
    option, equals, value = word.rpartition("=")
    return option + equals + (Path(value).name if Path(value).is_absolute() else value)


def ceilings(kind: str, dtypes: tuple[torch.dtype, ...]) -> Ceilings:
    """The best of a few tries: copy of an array far larger than the cache, and square matrix products per dtype."""
    size = min(max(4 * cache_bytes(kind), 64 << 20), 1 << 30) if kind == "cpu" else 1 << 30
    source = torch.empty(size // 4, dtype=torch.float32, device=kind).normal_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / _best(lambda: target.copy_(source), kind)
    matmul = {}
    for dtype in dtypes:
        side = 8192 if kind == "cuda" else 1024 if dtype == torch.float32 else 512
        a, b = (torch.randn(side, side, device=kind).to(dtype) for _ in range(2))
        matmul[str(dtype).removeprefix("torch.")] = 2 * side**3 / _best(partial(torch.matmul, a, b), kind)
    return Ceilings(copy, matmul)


def _best(call: Callable[[], object], kind: str, tries: int = 7) -> float:
    """Least seconds of some tries after a warm-up call: a ceiling is what the machine can do, not what it does on
    average. On CUDA the median of ten calls each, so that one clock glitch is no ceiling. On a CPU, where bf16 may be
    emulated, there are as many tries as fit into half a second, and one at least."""
    wait = torch.cuda.synchronize if kind == "cuda" else lambda: None
    calls, begun = (10 if kind == "cuda" else 1), time.perf_counter()
    taken: list[float] = []
    while len(taken) < tries + 1 and (kind == "cuda" or len(taken) < 2 or time.perf_counter() - begun < 0.5):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        taken.append((time.perf_counter() - start) / calls)
    return statistics.median(taken[1:]) if kind == "cuda" else min(taken[1:])
