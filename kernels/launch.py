"""What the launchers of Triton kernels share. No Triton is imported here."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from kernels.aot import LAUNCH_OPTIONS

LOG2_E = 1.4426950408889634  # the kernels' softmax works with powers of 2: a GPU has an instruction for those
INTERPRETED_SMS = 2


class Config(NamedTuple):
    """Tile and compilation of one kernel."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    late: bool = False  # window attention's backward in one kernel: see LATE there
    programs: int = 4  # to a multiprocessor, of a kernel that walks over windows and keeps a bias meanwhile
    apart: bool = False  # latent attention: see APART there
    by_product: bool = False  # window attention's backward in one kernel: see BY_PRODUCT there

    @property
    def options(self) -> dict[str, Any]:
        """The launch options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **LAUNCH_OPTIONS}


# Configurations that take the place of the launchers' own choice, by the name that the launcher gives its kernel; None
# for a kernel that must not be used. For `bench.tune` alone.
forced: dict[str, Config | None] = {}


def power_of_two(size: int) -> int:
    """The next power of two, at least 16: the smallest tile that tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


@lru_cache
def processor(device: torch.device) -> tuple[int, int]:
    """Whose configurations fit, sm_80's or sm_90's, and how many multiprocessors there are. A CPU interprets."""
    if device.type != "cuda":
        return 80, INTERPRETED_SMS
    found = torch.cuda.get_device_properties(device)
    return 90 if found.major == 9 else 80, found.multi_processor_count
