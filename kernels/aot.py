"""What every Triton kernel promises about its machine code, and the list of them all.

A kernel compiles for an NVIDIA GPU on a machine without one, so its registers, spills, shared memory and
instructions can be held to a promise everywhere; `python -m bench.aot` does that. Each kernel's module has a
function `aot_cases(arch)` beside the launcher; a new one is added to `cases` below. Nothing here imports Triton
before `cases` is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LAUNCH_OPTIONS = {
    "enable_fp_fusion": True
}  # explicit: the default is not the same in every version of Triton


@dataclass(frozen=True)
class Expects:
    """What the machine code of one case must be like.

    Spills are local memory: bytes of the stack frame, and loads and stores (LDL, STL). tensor_cores is the mnemonic
    that must occur ("HMMA", "HGMMA"); None says that no tensor-core instruction may: a copy that has one is not
    the kernel that was written. async_copies wants 16-byte copies to shared memory (LDGSTS.128, or bulk copies),
    wide_accesses 16-byte loads from or stores to global memory (LDG.128, STG.128).
    """

    why: str  # what kind of kernel it is; shown with the case
    tensor_cores: str | None = None
    async_copies: bool = False
    wide_accesses: bool = False
    max_stack_bytes: int = 0
    max_local_accesses: int = 0
    min_blocks_per_sm: int = 1


@dataclass(frozen=True)
class AotCase:
    """One compiled form that a launcher can ask for: the kernel, its types and constants, its configuration."""

    kernel: Any  # what triton.jit returned
    config: str  # for people: "bf16, 16x64, rows of 16"
    signature: Mapping[str, str]  # argument -> "*fp32", "i32", "fp32"; those in `constants` are left out
    constants: Mapping[str, Any]  # tl.constexpr arguments
    divisible: frozenset[str]  # pointers, strides and sizes that Triton will know to be multiples of 16
    num_warps: int
    num_stages: int
    expects: Expects
    options: Mapping[str, Any] = field(default_factory=LAUNCH_OPTIONS.copy)

    @property
    def name(self) -> str:
        """The kernel's name, as in the source."""
        return str(self.kernel.__name__)


def cases(arch: int) -> list[AotCase]:
    """Every case of every kernel on compute capability `arch` (80, 90). Imports Triton, so it raises ImportError
    where there is none."""
    from kernels.contrastive_loss import aot as contrastive
    from kernels.latent_attention import aot as latent
    from kernels.window_attention import aot as window
    from kernels.window_attention import bias

    return [
        *bias.aot_cases(arch),
        *window.aot_cases(arch),
        *latent.aot_cases(arch),
        *contrastive.aot_cases(arch),
    ]
