"""What an engine keeps on each GPU, and what it sends. P parameters, N ranks, all sizes in bytes.

Of DeepSpeed: ZeRO (arXiv:1910.02054), with gradients summed in fp32 and its default buckets of 5e8 numbers. Of torch: DDP
copies gradients into buckets; `fully_shard` gathers bf16 weights and reduces gradients in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.config import PretrainConfig
from train.multimodal.config import PerceiverPretrainConfig

ENGINES = ("single", "ddp", "fsdp2", "deepspeed")
BUCKET = 5e8 * 2  # DeepSpeed's reduce_bucket_size and allgather_bucket_size, in bf16
MOMENTS = {"torch-8bit": 2.0}  # bytes per parameter of AdamW's moments; 8 in fp32


@dataclass(frozen=True)
class EngineChoice:
    """Of one run."""

    name: str  # one of ENGINES
    stage: int = 2  # ZeRO's, for fsdp2 and deepspeed
    offload: bool = False

    def __str__(self) -> str:
        stage = f" ZeRO-{self.stage}" if self.shards else ""
        return f"{self.name}{stage}{', optimizer in main memory' if self.offload else ''}"

    @property
    def shards(self) -> bool:
        """Whether ranks share the optimizer's state."""
        return self.name in ("fsdp2", "deepspeed")

    @property
    def keeps_bf16(self) -> bool:
        """Whether the weights that the model runs with are bf16, and the fp32 ones are the optimizer's."""
        return self.shards


def engine_of(
    config: PretrainConfig, gpus: int, name: str = "", stage: int = 0, offload: bool = False
) -> EngineChoice:
    """What was asked for, or what the configuration says, or what `auto` means for so many GPUs. Raises ValueError for an
    engine that does not exist, that so many GPUs cannot use, or that keeps its optimizer on the GPU where `offload` is on."""
    chosen = name or str(_field(config, "engine", "auto"))
    if chosen == "auto":
        chosen = "single" if gpus == 1 else "ddp"
    if chosen not in ENGINES:
        raise ValueError(f"engine {chosen!r}; supported: {', '.join(ENGINES)}")
    if chosen == "single" and gpus > 1:
        raise ValueError(
            f"engine single is one process, and there are {gpus} GPUs: take ddp, fsdp2 or deepspeed"
        )
    zero = stage or int(_field(config, "zero_stage", 2))
    if zero not in (1, 2, 3) or (zero == 1 and chosen == "fsdp2"):
        raise ValueError(f"zero_stage {zero} of {chosen}; supported: 1 (deepspeed), 2, 3")
    off = offload or bool(_field(config, "offload", False))
    if off and chosen != "deepspeed":
        raise ValueError(
            f"offload is on, and the engine is {chosen}: only deepspeed puts the optimizer into main memory"
        )
    return EngineChoice(chosen, zero, off)


def _field(config: PretrainConfig, name: str, default: Any) -> Any:
    return getattr(config, name, default)


def static_memory(
    config: PretrainConfig, parameters: int, largest: int, gpus: int, engine: EngineChoice
) -> dict[str, float]:
    """Bytes on each GPU that do not depend on the batch. largest: parameters of the largest block."""
    p, n = float(parameters), gpus
    moments = MOMENTS.get(config.optim.kind, 8.0)
    found: dict[str, float]
    if not engine.shards:
        found = {"weights": 4 * p, "gradients": 4 * p, "optimizer": moments * p}
        if engine.name == "ddp":
            found["buckets"] = 4 * p
    else:
        weights = 2 * p / n if engine.stage == 3 else 2 * p
        gradients = 4 * p / n if engine.stage > 1 else 4 * p
        optimizer = 0.0 if engine.offload else (4 + moments) * p / n
        found = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
        if engine.name == "deepspeed":
            found["buckets"] = min(3 * BUCKET, 3 * 2 * p)
        else:  # two blocks' gradients, in bf16 and again in fp32 for the reduction
            found["buckets"] = 2 * 6.0 * largest
        if engine.stage == 3:
            found["buckets"] += 2 * 2.0 * largest  # two blocks' weights, whole
    if config.ema_decay:
        found["average"] = 4 * p / (n if engine.shards else 1)
    return found


def scoring_memory(static: Mapping[str, float], parameters: int, engine: EngineChoice) -> float:
    """Bytes on rank 0's GPU in an evaluation during the run, without activations. Engines that shard gather a whole fp32 copy
    of the model there (`ShardedEngine.scored_weights`) beside what they keep; others score the model that they train. fsdp2
    holds no gradients then, DeepSpeed holds its buffers for good."""
    kept = sum(static.values()) - (static["gradients"] if engine.name == "fsdp2" else 0.0)
    return kept + (4.0 * parameters if engine.shards else 0.0)


def scores(config: PretrainConfig) -> bool:
    """Whether held-out data is named, which the run then evaluates. (Built-in corpora are held out too, for small models.)"""
    if isinstance(config, PerceiverPretrainConfig):
        return any(pair.heldout for pair in config.data.pairs().values())
    return bool(config.data.heldout)


def scoring_problem(parameters: int, needed: float, room: float) -> str:
    """What does not fit, and what to do."""
    return (
        f"evaluation: rank 0 needs about {needed / 1e9:.1f} GB of {room / 1e9:.1f} while it scores held-out data, since the "
        f"engine gathers a whole fp32 copy of the model there ({4 * parameters / 1e9:.1f} GB); what helps: no held-out data "
        "in this run (no --data.heldout, no --data.*.heldout), and a checkpoint evaluated elsewhere by python -m train.evaluate"
    )


def checkpoint_bytes(config: PretrainConfig, parameters: int) -> float:
    """Of all ranks together: fp32 weights, two moments, and the average where one is kept."""
    return parameters * (4.0 + MOMENTS.get(config.optim.kind, 8.0) + (4.0 if config.ema_decay else 0.0))


def room_for_checkpoints(config: PretrainConfig, parameters: int, frozen: int = 0) -> tuple[float, float]:
    """Bytes of one checkpoint, and of all that lie on the disk at once: a new one is whole before an old one goes. frozen: so
    many more weights, which have no moments."""
    each = checkpoint_bytes(config, parameters) + 4.0 * frozen
    return each, each * (config.keep_checkpoints + 1)


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank sends: in every micro-step (beside its backward pass), and once per optimizer step."""

    per_micro_step: float
    per_step: float


def traffic(parameters: int, gpus: int, engine: EngineChoice) -> Traffic:
    """Rings send (N - 1) / N of a tensor to gather or to reduce and scatter it, twice that to reduce it for all."""
    if gpus == 1:
        return Traffic(0.0, 0.0)
    ring = (gpus - 1) / gpus * parameters
    if engine.name == "ddp":
        return Traffic(0.0, 2 * 4 * ring)
    reduced = (4 if engine.name == "fsdp2" else 2) * ring  # the width of what is reduced
    match engine.stage:
        case 1:
            return Traffic(0.0, reduced + 2 * ring)
        case 2:
            return Traffic(reduced, 2 * ring)
        case _:
            return Traffic(reduced + 2 * 2 * ring, 0.0)
