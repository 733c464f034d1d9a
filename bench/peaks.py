"""What data sheets promise: the peaks of the devices this project is made for.

Every figure follows from the chip's own numbers, so that a wrong digit shows (`tests/test_bench_measure.py` checks the
products against the published totals): dense bf16 FLOP/s = SMs x boost clock x FLOPs per clock and SM, with fp32
accumulation and without sparsity; bandwidth = bus width x data rate / 8. Sources: NVIDIA's A100, H100, H200, L40S and
Ada white papers and product briefs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """One device. Clock in Hz, rates in bits per second and pin, sizes in bytes."""

    name: str  # how torch.cuda.get_device_name begins, or what it contains
    sms: int
    clock: float
    flops_per_clock: int  # bf16 tensor cores, per SM
    bus_bits: int
    pin_rate: float
    l2: int

    @property
    def bf16(self) -> float:
        """Dense bf16 FLOP/s."""
        return self.sms * self.clock * self.flops_per_clock

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.bus_bits * self.pin_rate / 8

    @property
    def ridge(self) -> float:
        """FLOPs per byte above which tensor cores are the limit."""
        return self.bf16 / self.bandwidth


MIB = 2**20
PEAKS = (
    Peak("A100-SXM4-80GB", 108, 1.410e9, 2048, 5120, 3.186e9, 40 * MIB),
    Peak("A100-SXM4-40GB", 108, 1.410e9, 2048, 5120, 2.430e9, 40 * MIB),
    Peak("A100 80GB PCIe", 108, 1.410e9, 2048, 5120, 3.024e9, 40 * MIB),
    Peak("H200", 132, 1.830e9, 4096, 6144, 6.250e9, 50 * MIB),
    Peak("H100 80GB HBM3", 132, 1.830e9, 4096, 5120, 5.235e9, 50 * MIB),
    Peak("H100 PCIe", 114, 1.620e9, 4096, 5120, 3.200e9, 50 * MIB),
    Peak("L40S", 142, 2.490e9, 1024, 384, 18.0e9, 96 * MIB),
    Peak("RTX 4090", 128, 2.520e9, 512, 384, 21.0e9, 72 * MIB),
)


def peak_of(device_name: str) -> Peak | None:
    """The entry whose name `device_name` (as torch reports it) contains as words; None for a device not in the table."""
    return next((peak for peak in PEAKS if re.search(rf"\b{re.escape(peak.name)}\b", device_name)), None)
