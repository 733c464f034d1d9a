"""The peaks of devices, under the name that the benchmark knows. The table is train/devices.py: a plan needs it too."""

from train.devices import MIB, PEAKS, Peak, peak_of

__all__ = ["MIB", "PEAKS", "Peak", "peak_of"]
