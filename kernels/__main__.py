"""`python -m kernels`: which backends each function has on this machine, and why the others cannot run."""

from __future__ import annotations

import platform
from argparse import ArgumentParser
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from kernels.backend import BACKENDS
from kernels.clash import other_distribution
from kernels.explain import available_backends


def main() -> None:
    """Print the table."""
    ArgumentParser(prog="python -m kernels", description=__doc__).parse_args()
    system = f"{platform.system()} {platform.machine()}"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {system}")
    print(f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"CUDA: {_cuda()}")
    for package in ("triton", "flash_attn", "flash_attn_interface", "liger_kernel"):
        print(f"package {package}: {_installed(package)}")
    other = other_distribution()
    if other is not None:
        print(f"note: another distribution named kernels is installed, in {other.locate_file('')}")
    print()
    width = max(map(len, BACKENDS)) + 2
    for function, backends in available_backends().items():
        print(f"{function}")
        for backend, why in backends.items():
            print(f"  {backend:<{width}}{'available' if why is None else f'not available: {why}'}")
    print("\nA call can still be one that a backend cannot run: kernels.explain(function, ...) tells.")


def _cuda() -> str:
    if not torch.backends.cuda.is_built():
        return "none (this torch was built without it)"
    if not torch.cuda.is_available():
        return "none (no device, or no driver)"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _installed(package: str) -> str:
    if find_spec(package) is None:
        return "not installed"
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return "installed, version unknown"


if __name__ == "__main__":
    main()
