"""From a run and a set-up to what it needs: memory, time, communication, data, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.parameters import count_aurora, count_perceiver
from train.config import PretrainConfig
from train.devices import Device
from train.multimodal.config import PerceiverPretrainConfig
from train.plan.arithmetic import Flops, flops_of, mean_flops
from train.plan.batches import kinds
from train.plan.engines import (
    EngineChoice,
    checkpoint_bytes,
    scores,
    scoring_memory,
    scoring_problem,
    static_memory,
    traffic,
)
from train.plan.trace import Traced, empty_model, plain, trace

LINK_SHARE, NETWORK_SHARE = 0.8, 0.85  # of the data sheet's rates that NCCL's rings are said to reach
MATMUL_SHARE, COPY_SHARE = (
    0.75,
    0.87,
)  # of the data sheet's peaks that an H200 reached: bench/results/2026-11-27-h200-*
MOST = 4096  # samples of a micro-batch that a search goes up to

# Bytes of a stored sample. A picture: JPEG, shorter side as the model wants it, a quarter of a byte per pixel (LAION-5B's at
# 384 px are about 41 kB each). Sound: 64 kbit/s. A clip: 500 kbit/s, its sound besides. A caption and two tar headers: 1.5 kB.
PER_PIXEL, SOUND, CLIP, TEXT = 0.25 * 4 / 3, 64e3 / 8, 500e3 / 8, 1500.0


@dataclass(frozen=True)
class Setup:
    """What a run is planned for."""

    gpus: int
    device: Device
    engine: EngineChoice
    mfu: float
    network: float  # bytes per second out of a machine
    disk: float = 2e9  # bytes per second that a machine writes to shared storage
    copy: float = 20e9  # bytes per second from a GPU to main memory


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU, with or without activation checkpointing."""

    checkpointing: bool
    static: dict[str, float]
    fixed: float  # of a micro-batch of no samples: logits of a chunk, weights cast to bf16, temporaries
    per_sample: float
    room: float
    largest: int  # micro-batch that fits; 0 where none does
    logits: float  # contained in `fixed` or `per_sample`

    def needed(self, samples: int) -> float:
        """Bytes with a micro-batch of so many samples."""
        return sum(self.static.values()) + self.fixed + self.per_sample * samples


@dataclass(frozen=True)
class Plan:
    """Everything that `python -m train.plan` says, in bytes, seconds and FLOPs."""

    preset: str
    setup: Setup
    parameters: dict[str, int]
    shares: dict[str, float]
    flops: Flops  # of a mean sample
    by_kind: dict[str, float]
    recompute: float  # FLOPs of a mean sample that checkpointing does again
    memory: dict[bool, Memory]
    checkpointing: bool
    micro_batch: int
    accumulation: int
    as_asked: bool  # whether that is the configuration's own accumulation
    batch_size: int
    steps: int
    negatives: int
    step_seconds: float
    compute_seconds: float
    floor_seconds: float | None  # that the traced operations take at least
    reduce_seconds: float  # communication of a micro-step
    gather_seconds: float  # of a step, besides
    bytes_per_sample: float
    save_every: int
    checkpoint_bytes: float  # of all ranks together
    scoring: float  # bytes on rank 0's GPU while it scores held-out data, without activations
    problems: list[str] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Of the whole run."""
        return self.steps * self.batch_size

    @property
    def run_seconds(self) -> float:
        """Of the whole run, without evaluation and restarts."""
        return self.steps * self.step_seconds

    @property
    def run_flops(self) -> float:
        """Model FLOPs of the whole run."""
        return self.samples * self.flops.total

    @property
    def hardware_share(self) -> float:
        """Of the peak, with what is recomputed."""
        recomputed = self.recompute if self.checkpointing else 0.0
        return self.setup.mfu * (1 + recomputed / self.flops.total)


def contrasted(config: PretrainConfig) -> float:
    """Share of the samples that are read as they are."""
    if not isinstance(config, PerceiverPretrainConfig) or config.objectives.masked_twice:
        return 1.0
    return 1.0 - config.objectives.masked_share


def make_plan(config: PretrainConfig, setup: Setup, *, checkpointing: bool | None = None) -> Plan:
    """The plan of a run. checkpointing: None takes the configuration's."""
    ask = config.activation_checkpointing if checkpointing is None else checkpointing
    shares = kinds(config)
    model = empty_model(config)
    parameters = count(config, model)
    # Contrast is with the texts of a micro-step over all ranks; how many that is, the search below may change.
    flops = mean_flops(config, shares)
    by_kind = {kind: flops_of(config, kind).total for kind in shares}
    largest = largest_block(model)
    static = static_memory(config, parameters["total"], largest, setup.gpus, setup.engine)
    memory, traced = {}, {}
    for on in (False, True):
        traced[on] = probe(plain(config, on), setup, by_kind, model)
        memory[on] = fit(config, on, static, setup, traced[on])
    micro, accumulation, as_asked, found = split_batch(config, setup, memory[ask])
    negatives = round(micro * setup.gpus * contrasted(config))
    flops = mean_flops(config, shares, negatives)
    compute = config.batch_size * flops.total / (setup.gpus * setup.mfu * setup.device.peak.bf16)
    reduce, gather = communication(parameters["total"], setup)
    backward = compute / accumulation * 2 / 3
    step = compute + accumulation * max(0.0, reduce - backward) + gather
    fewer, _ = traced[True]
    recompute = fewer.counts.flops["recompute"] / fewer.model_flops * flops.total
    scoring = scoring_memory(static, parameters["total"], setup.engine)
    if setup.engine.shards and scores(config) and scoring > setup.device.memory:
        found = [*found, scoring_problem(parameters["total"], scoring, setup.device.memory)]
    return Plan(
        config.name, setup, parameters, shares, flops, by_kind,
        recompute, memory, ask, micro, accumulation, as_asked, config.batch_size,
        config.steps, negatives, step, compute, floor(traced[ask], flops.total, micro, accumulation), reduce, gather,
        sum(share * stored_bytes(config, kind) for kind, share in shares.items()), config.save_every,
        checkpoint_bytes(config, parameters["total"]), scoring, found,
    )  # fmt: skip


def count(config: PretrainConfig, model: Any) -> dict[str, int]:
    """Parameters by part, of the real model on the meta device."""
    if isinstance(config, PerceiverPretrainConfig):
        return count_perceiver(config.model, model)
    return count_aurora(config.model, model)


def largest_block(model: nn.Module) -> int:
    """Parameters of the largest layer that an engine gathers or reduces at a time."""
    blocks = [block for layers in model.modules() if isinstance(layers, nn.ModuleList) for block in layers]
    return max(
        (sum(p.numel() for p in block.parameters()) for block in blocks if not _holds(block)), default=0
    )


def _holds(module: nn.Module) -> bool:
    return any(isinstance(part, nn.ModuleList) for part in module.modules())


def probe(
    config: PretrainConfig, setup: Setup, by_kind: Mapping[str, float], model: Any
) -> tuple[Traced, Traced]:
    """A micro-step with one and with two samples of the costliest kind; with batch norm, for which one is too few, with two
    and with four."""
    worst = max(by_kind, key=lambda kind: by_kind[kind])
    weights = torch.bfloat16 if setup.engine.keeps_bf16 else torch.float32
    rates = (MATMUL_SHARE * setup.device.peak.bf16, COPY_SHARE * setup.device.peak.bandwidth)
    cpu = setup.device.name == "cpu"
    if cpu:  # its rates were measured
        rates = (setup.device.peak.bf16, setup.device.peak.bandwidth)
    few = 2 if any(isinstance(module, _BatchNorm) for module in model.modules()) else 1
    fewer, more = (
        trace(
            config, {worst: n}, kind="cpu" if cpu else "cuda", bf16=not cpu,
            weights=torch.float32 if cpu else weights, flop_rate=rates[0], byte_rate=rates[1], model=model,
        )
        for n in (few, 2 * few)
    )  # fmt: skip
    return fewer, more


def fit(
    config: PretrainConfig, on: bool, static: dict[str, float], setup: Setup, traced: tuple[Traced, Traced]
) -> Memory:
    """The largest micro-batch: activations grow by the same for each sample."""
    fewer, more = traced
    per_sample = (more.activations - fewer.activations) / (more.samples - fewer.samples)
    fixed = fewer.activations - fewer.samples * per_sample
    room = setup.device.memory - sum(static.values()) - fixed
    largest = max(0, min(int(room // per_sample), MOST)) if per_sample > 0 else MOST
    return Memory(on, static, fixed, per_sample, room, largest, more.logits)


def split_batch(config: PretrainConfig, setup: Setup, memory: Memory) -> tuple[int, int, bool, list[str]]:
    """(micro-batch, accumulation, whether it is the configuration's, problems): what was asked for where it fits, else the
    fewest micro-steps that do."""
    each, rest = divmod(config.batch_size, setup.gpus)
    if rest:
        whole = f"{config.batch_size // setup.gpus * setup.gpus or setup.gpus} would"
        return (
            each or 1,
            1,
            False,
            [f"a batch of {config.batch_size} does not divide over {setup.gpus} GPUs; {whole}"],
        )
    asked = each / config.accumulation
    if asked == int(asked) and 1 <= asked <= memory.largest:
        return int(asked), config.accumulation, True, []
    fewer = [n for n in range(1, each + 1) if each % n == 0 and each // n <= memory.largest]
    if not fewer:
        need = memory.needed(1)
        return 1, each, False, [
            f"a micro-batch of one sample needs {need / 1e9:.1f} GB of {setup.device.memory / 1e9:.0f}: what helps: "
            "activation checkpointing, more GPUs, ZeRO-3, a smaller preset"
        ]  # fmt: skip
    said = []
    if asked != int(asked):
        said.append(f"accumulation {config.accumulation} does not divide {each} samples per GPU")
    else:
        said.append(f"a micro-batch of {int(asked)} (accumulation {config.accumulation}) does not fit")
    return each // fewer[0], fewer[0], False, said


def communication(parameters: int, setup: Setup) -> tuple[float, float]:
    """Seconds of communication in a micro-step, and in a step besides."""
    sent = traffic(parameters, setup.gpus, setup.engine)
    rate = bus(setup)
    return sent.per_micro_step / rate, sent.per_step / rate


def bus(setup: Setup) -> float:
    """Bytes per second of a ring: that of the links inside a machine, or of all adapters of one where several take part."""
    inside = LINK_SHARE * setup.device.link
    several = setup.gpus > setup.device.per_node
    return min(inside, NETWORK_SHARE * setup.network) if several else inside


def floor(traced: tuple[Traced, Traced], flops: float, micro: int, accumulation: int) -> float | None:
    """Seconds of a step's operations, each at the device's pace for its products or its bytes. None where nothing was timed."""
    fewer, more = traced
    added = more.samples - fewer.samples
    heavier = (more.model_flops - fewer.model_flops) / added / flops  # the costliest kind beside the mean
    each = (more.counts.seconds - fewer.counts.seconds) / added
    seconds = fewer.counts.seconds + (micro - fewer.samples) * each
    return accumulation * seconds / heavier if fewer.counts.seconds else None


def stored_bytes(config: PretrainConfig, kind: str) -> float:
    """Of a sample of this kind, as it lies in a shard."""
    picture = PER_PIXEL * config.model.image_size**2
    if not isinstance(config, PerceiverPretrainConfig):
        texts = config.data.captions_per_image if kind == "pair" else 0
        return picture + TEXT * max(texts, 1)
    match kind:
        case "image-text":
            return picture + TEXT
        case "audio-text":
            return SOUND * config.model.audio_seconds + TEXT
        case _:
            return (CLIP + SOUND) * config.data.video_seconds + TEXT


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, with what follows from it."""
    setup, memory = plan.setup, plan.memory[plan.checkpointing]
    rate = plan.batch_size / plan.step_seconds
    return {
        "preset": plan.preset,
        "setup": {
            "gpus": setup.gpus, "device": setup.device.name, "engine": str(setup.engine), "mfu": setup.mfu,
            "peak_flops": setup.device.peak.bf16, "memory": setup.device.memory, "network": setup.network,
            "bus": bus(setup), "disk": setup.disk, "copy": setup.copy,
        },
        "parameters": plan.parameters,
        "mixture": plan.shares,
        "flops_per_sample": {
            "by_part": plan.flops.by_part(), "forward": sum(plan.flops.forward.values()),
            "backward": sum(plan.flops.backward.values()), "model": plan.flops.total,
            "recompute": plan.recompute if plan.checkpointing else 0.0, "by_kind": plan.by_kind,
            "six_nd": 6.0 * plan.parameters["total"],
        },
        "memory": {
            ("with" if on else "without") + "_checkpointing": {
                **found.static, "logits": found.logits, "activations_fixed": found.fixed,
                "activations_per_sample": found.per_sample, "largest_micro_batch": found.largest,
            }
            for on, found in plan.memory.items()
        },
        "batch": {
            "global": plan.batch_size, "micro": plan.micro_batch, "accumulation": plan.accumulation,
            "checkpointing": plan.checkpointing, "memory": memory.needed(plan.micro_batch), "negatives": plan.negatives,
            "scoring_memory": plan.scoring,
        },
        "time": {
            "step": plan.step_seconds, "compute": plan.compute_seconds, "floor": plan.floor_seconds, "steps": plan.steps,
            "run": plan.run_seconds, "gpu_hours": plan.run_seconds * setup.gpus / 3600, "samples": plan.samples,
            "samples_per_second": rate, "run_flops": plan.run_flops, "hardware_share": plan.hardware_share,
        },
        "communication": {
            "micro_step_seconds": plan.reduce_seconds, "step_seconds": plan.gather_seconds,
            "backward_seconds": plan.compute_seconds / plan.accumulation * 2 / 3,
        },
        "data": {
            "bytes_per_sample": plan.bytes_per_sample, "bytes_per_second": rate * plan.bytes_per_sample,
            "bytes": plan.samples * plan.bytes_per_sample,
        },
        "checkpoint": checkpoint(plan),
        "problems": plan.problems,
    }  # fmt: skip


def checkpoint(plan: Plan) -> dict[str, float]:
    """Its size, the time to copy a rank's part aside (the stall of an asynchronous one), and the time to write it. Every rank
    writes a part, whatever the engine."""
    setup, size, ranks = plan.setup, plan.checkpoint_bytes, plan.setup.gpus
    nodes = -(-setup.gpus // setup.device.per_node)
    between = plan.save_every * plan.step_seconds
    stall = size / ranks / setup.copy
    write = size / (setup.disk * nodes)
    return {
        "bytes": size, "per_rank": size / ranks, "stall": stall, "write": write, "between": between,
        "stall_share": stall / between if between else 0.0,
    }  # fmt: skip


def with_setup(setup: Setup, **changes: Any) -> Setup:
    """Another set-up."""
    return replace(setup, **changes)
