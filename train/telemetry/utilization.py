"""How much of the device a step uses: model FLOPs (nothing recomputed counts) over what the device could have done."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from train.config import PretrainConfig, micro_batch
from train.devices import peak_of
from train.multimodal.config import PerceiverPretrainConfig
from train.plan.arithmetic import mean_flops
from train.tasks.config import FinetuneConfig

SIDE = 512


def step_flops(config: PretrainConfig, shares: Mapping[str, float], world_size: int) -> float:
    """Model FLOPs of one optimizer step over all ranks, captions taken at their full length."""
    others = micro_batch(config, world_size) * world_size
    return config.batch_size * mean_flops(config, shares, others).total


def shares_of(config: PretrainConfig, data: object, world_size: int) -> dict[str, float] | None:
    """The kinds of samples of a run's batches, from its loaders; None for tasks, whose FLOPs no closed form says."""
    if isinstance(config, FinetuneConfig):
        return None
    if isinstance(config, PerceiverPretrainConfig):
        counters = data.loader.counters  # type: ignore[attr-defined]
        return {kind: counter["share"] for kind, counter in counters.items()}
    pairs: float = data.pairs / micro_batch(config, world_size)  # type: ignore[attr-defined]
    return {"pair": pairs, "uncaptioned": 1 - pairs}


def device_rate(device: torch.device, bf16: bool) -> float | None:
    """FLOP/s that the device is good for: a GPU's data sheet (dense bf16; None where it is not in the table, or the run is in
    fp32), a CPU's best of a few matrix products, now."""
    if device.type == "cuda":
        peak = peak_of(torch.cuda.get_device_name(device)) if bf16 else None
        return peak.bf16 if peak else None
    x = torch.ones(SIDE, SIDE, dtype=torch.bfloat16 if bf16 else torch.float32)
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        x @ x
        taken.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(taken)
