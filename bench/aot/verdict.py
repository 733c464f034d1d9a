"""What came out of compiling a case, and whether it is what the kernel promised. Pure arithmetic: no Triton here."""

from __future__ import annotations

from dataclasses import dataclass

from bench.aot import sass
from bench.aot.occupancy import CHIPS, KB, blocks_per_sm
from kernels.aot import Expects


@dataclass(frozen=True)
class Figures:
    """What the compiler made of a case."""

    registers: int  # per thread
    stack: int  # bytes per thread, spilled registers among them
    local_accesses: int  # LDL and STL
    shared: int  # bytes per block
    blocks_per_sm: int
    limited_by: str  # by what: "registers", "shared memory", "warps", "blocks"
    tensor_core: dict[str, int]  # mnemonic -> how often
    async_copies: int
    async_copies_16: int  # those of 16 bytes a thread or more
    wide_accesses: int  # 16-byte loads from and stores to global memory
    instructions: int


@dataclass(frozen=True)
class Row:
    """One line of the report: a case on an architecture. It passes where `failures` is empty."""

    kernel: str
    config: str
    arch: int
    num_warps: int
    num_stages: int
    expects: Expects
    figures: Figures | None  # None where it does not compile
    failures: tuple[str, ...]


def measure(code: sass.Sass, arch: int, shared: int, num_warps: int) -> Figures:
    """The figures of a row."""
    blocks, limit = blocks_per_sm(CHIPS[arch], registers=code.registers, shared=shared, warps=num_warps)
    return Figures(
        registers=code.registers,
        stack=code.stack,
        local_accesses=code.count(sass.LOCAL_ACCESS),
        shared=shared,
        blocks_per_sm=blocks,
        limited_by=limit,
        tensor_core={name: n for name, n in sorted(code.mnemonics.items()) if sass.TENSOR_CORE.match(name)},
        async_copies=code.count(sass.ASYNC_COPY),
        async_copies_16=code.count(sass.ASYNC_COPY_16),
        wide_accesses=code.count(sass.WIDE_ACCESS),
        instructions=code.mnemonics.total(),
    )


def failures(found: Figures, wanted: Expects, arch: int) -> list[str]:
    """Why a case fails; empty where it passes."""
    chip = CHIPS[arch]
    reasons = []
    if found.stack > wanted.max_stack_bytes or found.local_accesses > wanted.max_local_accesses:
        reasons.append(
            f"spills: {found.stack} bytes of stack and {found.local_accesses} local loads and stores, "
            f"allowed {wanted.max_stack_bytes} and {wanted.max_local_accesses}"
        )
    if found.shared > chip.shared_per_block:
        reasons.append(
            f"shared memory: {found.shared / KB:.1f} KB, a block on sm_{arch} ({chip.name}) has at most "
            f"{chip.shared_per_block // KB} KB"
        )
    elif found.blocks_per_sm < wanted.min_blocks_per_sm:
        reasons.append(
            f"occupancy: {found.blocks_per_sm} blocks per SM by {found.limited_by}, "
            f"expected at least {wanted.min_blocks_per_sm}"
        )
    names = ", ".join(found.tensor_core) or "none"
    if wanted.tensor_cores is None and found.tensor_core:
        reasons.append(f"tensor cores: none expected, found {names}")
    if wanted.tensor_cores and not any(name.startswith(wanted.tensor_cores) for name in found.tensor_core):
        reasons.append(f"tensor cores: {wanted.tensor_cores} promised, found {names}")
    if wanted.async_copies and not found.async_copies_16:
        reasons.append(
            f"asynchronous copies of 16 bytes: promised, found none ({found.async_copies} narrower ones)"
        )
    if wanted.wide_accesses and not found.wide_accesses:
        reasons.append("16-byte loads or stores of global memory: promised, found none")
    return reasons
