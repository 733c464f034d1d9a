"""What data sheets promise: the peaks of the devices this project is made for, and how they are joined.

Every figure follows from the chip's own numbers, so that a wrong digit shows (`tests/test_bench_measure.py` and
`tests/test_train_devices.py` check the products against the published totals): dense bf16 FLOP/s = SMs x boost clock x FLOPs
per clock and SM, with fp32 accumulation and without sparsity (data sheets like to print twice as much, "with sparsity");
bandwidth = bus width x data rate / 8. Sources: NVIDIA's A100, H100, H200, L40S and Ada white papers and product briefs.
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


@dataclass(frozen=True)
class Device:
    """A device as a plan speaks of it, in the machine that is usual for it. Rates in bytes per second and direction."""

    name: str
    peak: Peak
    memory: (
        float  # bytes: the data sheet's gigabytes as 1e9. torch finds 5 to 7% more, which CUDA and NCCL need
    )
    link: float  # between two devices of a machine
    per_node: int
    network: float  # out of a machine, all its adapters together
    anchor: str  # what others reached, as a reason for `mfu`
    mfu: float  # what a plan takes where nothing else is said


GBIT = 1e9 / 8
A100_ANCHOR = "NeMo's CLIP ViT-g/14 on 8 to 128 A100: about 39%; torchtitan's Llama-3 on 64: 52 to 58%"
H100_ANCHOR = "LLM-Foundry's 3B on 128 to 512 H100: 39 to 42%; NeMo's CLIP g/14 on 8: about 21%"

# NVLink 3 gives 600 GB/s both ways, NVLink 4 900. A DGX A100 has eight adapters of 200 Gbit/s for the cluster, a DGX H100 or
# H200 eight of 400 (NVIDIA's DGX data sheets). PCIe 4.0 x16: 32 GB/s.
DEVICES = {
    device.name: device
    for device in (
        Device("a100-40gb", PEAKS[1], 40e9, 300e9, 8, 8 * 200 * GBIT, A100_ANCHOR, 0.40),
        Device("a100-80gb", PEAKS[0], 80e9, 300e9, 8, 8 * 200 * GBIT, A100_ANCHOR, 0.40),
        Device("a100-80gb-pcie", PEAKS[2], 80e9, 32e9, 8, 200 * GBIT, A100_ANCHOR, 0.35),
        Device("h100", PEAKS[4], 80e9, 450e9, 8, 8 * 400 * GBIT, H100_ANCHOR, 0.35),
        Device("h100-pcie", PEAKS[5], 80e9, 64e9, 8, 200 * GBIT, H100_ANCHOR, 0.30),
        Device("h200", PEAKS[3], 141e9, 450e9, 8, 8 * 400 * GBIT, H100_ANCHOR, 0.35),
        Device("l40s", PEAKS[6], 48e9, 32e9, 8, 200 * GBIT, "none known: a guess", 0.35),
        Device("rtx-4090", PEAKS[7], 24e9, 32e9, 1, 10 * GBIT, "none known: a guess", 0.35),
    )
}
