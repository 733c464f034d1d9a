"""How many blocks of a kernel fit on one multiprocessor (SM), by arithmetic.

Limits: "Technical Specifications per Compute Capability" in NVIDIA's CUDA C++ Programming Guide, and the tuning guides
for Ampere and Hopper (shared memory: 1 KB of each block's is the system's). Registers are allotted to a warp in units of
256, and a warp's come from one of the SM's four partitions; shared memory in units of 128 bytes: both as in the CUDA
toolkit's occupancy calculator.
"""

from __future__ import annotations

from dataclasses import dataclass

KB = 1024
WARP = 32
PARTITIONS = 4
REGISTER_UNIT = 256
SHARED_UNIT = 128
SYSTEM_SHARED = 1 * KB  # taken from the SM by each block, beside what the block asks for


@dataclass(frozen=True)
class Chip:
    """What one SM has, in registers of 32 bits and in bytes."""

    name: str
    shared: int
    shared_per_block: int
    registers: int = 64 * KB
    warps: int = 64
    blocks: int = 32


CHIPS = {
    80: Chip("A100", shared=164 * KB, shared_per_block=163 * KB),
    90: Chip("H100, H200", shared=228 * KB, shared_per_block=227 * KB),
}


def blocks_per_sm(chip: Chip, *, registers: int, shared: int, warps: int) -> tuple[int, str]:
    """(blocks, what limits them: "blocks", "warps", "registers" or "shared memory").

    registers: per thread; shared: bytes that a block asks for; warps: per block. A block that asks for more shared
    memory than a block may have fits 0 times.
    """
    per_warp = _round_up(max(registers, 1) * WARP, REGISTER_UNIT)
    by_registers = chip.registers // PARTITIONS // per_warp * PARTITIONS // warps
    by_shared = chip.shared // _round_up(shared + SYSTEM_SHARED, SHARED_UNIT)
    if shared > chip.shared_per_block:
        by_shared = 0
    return min(
        (chip.blocks, "blocks"),
        (chip.warps // warps, "warps"),
        (by_registers, "registers"),
        (by_shared, "shared memory"),
        key=lambda limit: limit[0],
    )


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
