"""DeepSpeed's package and its configuration, which is derived from ours: no second truth in JSON."""

from __future__ import annotations

import importlib
import logging
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from train.config import ConfigError, PretrainConfig, micro_batch

OLDEST = (0, 19, 8)  # has managed_gradient_accumulation: the caller says which backward is the last


def settings_of(config: PretrainConfig, world_size: int, half: bool, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration of a run."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": config.zero_stage == 2 and device.type == "cuda" and not config.offload,
        "contiguous_gradients": True,
        "reduce_scatter": True,
    }
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if device.type == "cpu":
        # A bucket is new memory in every step, which a CPU pays for page by page: with the default of 5e8 numbers the step
        # of a model of 39M parameters took 1.20 of the CPU time that it takes fsdp2, with this 1.02.
        zero |= {"reduce_bucket_size": 20_000_000, "allgather_bucket_size": 20_000_000}
    return {
        "train_micro_batch_size_per_gpu": micro_batch(config, world_size),
        # The loop knows which micro-step is the last. Counting on both sides is how gradients get lost.
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own would be compiled for minutes; torch's is fused too
        "bf16": {"enabled": half, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def refusal() -> str | None:
    """Why DeepSpeed cannot be used here; None where it can."""
    if find_spec("deepspeed") is None:
        return "it is not installed: pip install 'auroraio[deepspeed]'"
    found = version("deepspeed")
    if tuple(int(part) for part in found.split("+")[0].split(".")[:3]) < OLDEST:
        return f"{found} is installed, {'.'.join(map(str, OLDEST))} or newer is needed"
    return None


def import_deepspeed(device: torch.device) -> Any:
    """The package, quiet, and without what it would compile at the start on a CPU. Raises ConfigError."""
    if (why := refusal()) is not None:
        raise ConfigError(f"--engine deepspeed cannot run: {why}")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False
    )
    return deepspeed
