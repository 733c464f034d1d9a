"""Which engine a run gets.

    single      one process
    ddp         DistributedDataParallel: every rank holds everything
    fsdp2       torch's fully_shard: gradients and optimizer in shards (ZeRO-2); zero_stage 3: weights too
    deepspeed   ZeRO-1, -2 or -3 by zero_stage; offload puts the optimizer into main memory

"auto" is single with one process and ddp with several. One that is named is that one, or `problems` says why not. All have the
methods of `TorchEngine` and write the same checkpoints.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from train.config import OptimConfig, PretrainConfig
from train.engine import Ranks, TorchEngine
from train.engines.deepspeed_settings import refusal
from train.machine import Precision


def resolve(config: PretrainConfig, world_size: int) -> str:
    """The engine's name; "auto" resolved."""
    if config.engine == "auto":
        return "single" if world_size == 1 else "ddp"
    return config.engine


def engine_problems(config: PretrainConfig, world_size: int) -> list[str]:
    """Why the engine that is asked for cannot run as asked; empty if it can."""
    name, found = resolve(config, world_size), []
    if name == "single" and world_size > 1:
        found.append(
            f"engine is single, and there are {world_size} processes: ddp, fsdp2 and deepspeed take several"
        )
    if name == "ddp" and world_size == 1:
        found.append("engine is ddp, and there is one process: start several with torchrun, or take single")
    if name == "deepspeed" and (why := refusal()) is not None:
        found.append(f"engine is deepspeed, but {why}")
    if name == "fsdp2" and config.zero_stage == 1:
        found.append("zero_stage is 1; fsdp2 supports 2 and 3, deepspeed also 1")
    if name in ("fsdp2", "deepspeed") and config.optim.kind not in ("auto", "torch"):
        found.append(
            f"optim.kind is {config.optim.kind!r}; {name} shards the moments of torch's AdamW: set --optim.kind torch"
        )
    if config.offload and name != "deepspeed":
        found.append(
            f"offload is on, and the engine is {name}: only deepspeed puts the optimizer into main memory"
        )
    if name == "deepspeed" and config.compile:
        found.append("compile is on, and the engine is deepspeed: not supported together; set --no-compile")
    return found


def in_words(config: PretrainConfig, world_size: int) -> str:
    """The engine, for the lines that a run begins with."""
    name = resolve(config, world_size)
    match name:
        case "single":
            return "single: one process"
        case "ddp":
            return f"ddp: DistributedDataParallel, everything on each of {world_size} ranks"
    shards = {1: "optimizer", 2: "gradients and optimizer", 3: "weights, gradients and optimizer"}[
        config.zero_stage
    ]
    label = "torch's fully_shard" if name == "fsdp2" else "DeepSpeed"
    off = ", the optimizer in main memory" if config.offload else ""
    return f"{name}: {label}, ZeRO-{config.zero_stage}: {shards} in {world_size} shards{off}"


def optimizer_of(config: PretrainConfig, world_size: int) -> OptimConfig:
    """The optimizer's settings under this engine: those that shard take torch's, whatever else is installed."""
    sharding = resolve(config, world_size) in ("fsdp2", "deepspeed")
    return replace(config.optim, kind="torch") if sharding and config.optim.kind == "auto" else config.optim


def build_engine(
    model: nn.Module, config: PretrainConfig, device: torch.device, precision: Precision, ranks: Ranks
) -> TorchEngine:
    """The engine of a run. Raises ConfigError where it cannot run."""
    config = replace(config, optim=optimizer_of(config, ranks.size))
    kind: type[TorchEngine] = TorchEngine
    match resolve(config, ranks.size):
        case "fsdp2":
            from train.engines.fsdp2 import Fsdp2Engine  # more than a second of imports, in every rank

            kind = Fsdp2Engine
        case "deepspeed":
            from train.engines.deepspeed import DeepSpeedEngine

            kind = DeepSpeedEngine
    return kind(model, config, device, precision, ranks)
