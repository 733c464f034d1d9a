"""Another distribution's package is called `kernels` too: Hugging Face's, which loads kernels from their hub.

Only one package of a name can be imported, and two that are installed into one folder overwrite each other's
files. Nothing here stops a program that works; everything here is there so that a mix-up is named the moment
it shows.
"""

from __future__ import annotations

import warnings
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import NoReturn

# What people import from the other package (transformers does, after finding the distribution's metadata).
# A name in this list raises an ImportError that explains; transformers catches ImportError and goes on
# without it.
OTHER_NAMES = frozenset({
    "CUDAProperties", "Device", "FuncRepository", "LayerRepository", "LocalFuncRepository",
    "LocalLayerRepository", "LockedFuncRepository", "LockedLayerRepository", "Mode", "ROCMProperties",
    "get_kernel", "get_kernel_variants", "get_local_kernel", "get_locked_kernel", "has_kernel",
    "install_kernel", "kernelize", "load_kernel", "register_kernel_mapping",
    "replace_kernel_forward_from_hub", "use_kernel_forward_from_hub", "use_kernel_func_from_hub",
    "use_kernel_mapping", "use_kernelized_func",
})  # fmt: skip
CURE = (
    "To use the other one, or both, give each its own virtual environment; if both were installed into one, "
    "`pip uninstall kernels` and install auroraio again, because they may have overwritten each other's files"
)


def other_distribution() -> Distribution | None:
    """The distribution named `kernels` in this environment (ours is named auroraio), or None."""
    try:
        return distribution("kernels")
    except PackageNotFoundError:
        return None


def warn_if_installed(here: Path) -> None:
    """One warning where the other distribution is installed beside this package, whose folder is `here`."""
    other = other_distribution()
    if other is None:
        return
    there = Path(str(other.locate_file("kernels"))).resolve()
    if there == here:
        place = f"into the same folder, {here}: files of the two are mixed there"
    else:
        place = f"in {there}, and is hidden by this one, which was imported from {here}"
    warnings.warn(
        "`kernels` is AuroraIO's here, but another distribution of that name (Hugging Face's) is installed "
        f"{place}. {CURE}.",
        stacklevel=3,
    )


def refuse(name: str, here: Path) -> NoReturn:
    """The end of the module's __getattr__: explain a name that we do not have."""
    if name in OTHER_NAMES:
        raise ImportError(
            f"`kernels.{name}` belongs to Hugging Face's package `kernels`; this is AuroraIO's, which offers "
            f"attention functions, imported from {here}. {CURE}.",
            name="kernels",
            path=str(here),
        )
    raise AttributeError(f"module 'kernels' (AuroraIO's, in {here}) has no attribute {name!r}")


def check_marker(package: object) -> None:
    """Raise ImportError unless `package`, what Python imported as `kernels`, is ours.

    Our submodules call it: their files can lie under an __init__.py that the other distribution has
    overwritten.
    """
    if not getattr(package, "__auroraio__", False):
        raise ImportError(
            f"`kernels` was imported from {getattr(package, '__file__', None)}, which is not AuroraIO's "
            f"package (Hugging Face has one of the same name). {CURE}.",
            name="kernels",
        )
