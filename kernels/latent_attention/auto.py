"""What `auto` knows of GPUs: auto.json, which `python -m bench.auto` writes from runs in bench/results/.

One entry per kind of GPU, by compute capability; what one kind measured never decides for another.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_name("auto.json")
QUERIES = 128  # for so many of a head cuDNN's attention has a program; it does not split keys


@dataclass(frozen=True)
class Figures:
    """Of one kind of GPU."""

    device: str  # the one that measured
    float32: str  # the backend that was fastest in float32
    # (head_dim, share): for head_dims up to this cuDNN is faster where its programs fill this share of their waves; forward
    # alone, and with gradients.
    sdpa_from: tuple[tuple[int, float], ...]
    sdpa_from_training: tuple[tuple[int, float], ...]

    def fills(self, q: Tensor, v: Tensor, training: bool) -> bool:
        """Whether cuDNN's attention keeps so much of the GPU busy with this call that it beats `triton`."""
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
        dim, share = max(q.shape[-1], v.shape[-1]), busy(q.shape[0], q.shape[1], q.shape[2], processors)
        for widest, least in self.sdpa_from_training if training else self.sdpa_from:
            if dim <= widest:
                return share >= least
        return False


def busy(batch: int, queries: int, heads: int, processors: int) -> float:
    """The share of their waves that cuDNN's programs fill; 0 for none."""
    programs = batch * heads * -(-queries // QUERIES)
    return programs / max(-(-programs // processors) * processors, 1)


def figures(device: torch.device) -> Figures | None:
    """What was measured on this kind of GPU; None where nothing was."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    found = torch.cuda.get_device_properties(device)
    return TABLE.get((found.major, found.minor))


def read(path: Path) -> dict[tuple[int, int], Figures]:
    """auto.json."""
    entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    table = {}
    for capability, entry in entries.items():
        major, minor = capability.split(".")
        forward, training = (
            tuple((int(dim), float(share)) for dim, share in entry[name])
            for name in ("sdpa_from", "sdpa_from_training")
        )
        table[int(major), int(minor)] = Figures(entry["device"], entry["float32"], forward, training)
    return table


TABLE = read(FILE)
