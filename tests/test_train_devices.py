"""The table of devices against the data sheets' own totals: one project's was twice too low, and doubled its utilisation."""

from __future__ import annotations

import pytest

from bench import peaks
from train.devices import DEVICES, PEAKS, peak_of

# Dense bf16 TFLOP/s, GB of memory, GB/s of memory, GB/s of NVLink or PCIe in both directions together, as NVIDIA's data sheets
# print them; H100's and H200's tables print 1,979 "with sparsity" for the bf16 of SXM, which is not what a dense product gets.
SHEETS = {
    "a100-40gb": (312, 40, 1555, 600),
    "a100-80gb": (312, 80, 2039, 600),
    "a100-80gb-pcie": (312, 80, 1935, 64),
    "h100": (1979 / 2, 80, 3350, 900),
    "h100-pcie": (1513 / 2, 80, 2048, 128),
    "h200": (1979 / 2, 141, 4800, 900),
    "l40s": (362.05, 48, 864, 64),
    "rtx-4090": (165.2, 24, 1008, 64),
}


def test_every_device_is_on_a_data_sheet() -> None:
    assert set(SHEETS) == set(DEVICES)
    assert {device.peak.name for device in DEVICES.values()} == {peak.name for peak in PEAKS}


@pytest.mark.parametrize("name", SHEETS)
def test_devices_are_those_of_the_data_sheets(name: str) -> None:
    device, (tflops, memory, bandwidth, link) = DEVICES[name], SHEETS[name]
    assert device.peak.bf16 / 1e12 == pytest.approx(tflops, rel=0.005)
    assert device.peak.bandwidth / 1e9 == pytest.approx(bandwidth, rel=0.005)
    assert device.memory == memory * 1e9 and 2 * device.link == link * 1e9
    assert peak_of(f"NVIDIA {device.peak.name}") is device.peak
    assert 0.2 < device.mfu <= 0.5


def test_there_is_one_table() -> None:
    assert peaks.PEAKS is PEAKS and peaks.peak_of is peak_of
