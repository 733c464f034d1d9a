"""How a step runs: one process, or DistributedDataParallel under torchrun (gloo on CPUs, NCCL on GPUs).

The loop owns data, schedule, logging and signals; the engine owns device, autocast, reduction, clipping and
the weights.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from train.config import PretrainConfig
from train.contrast import MicroBatch, contrast_all, contrasts
from train.engines.meeting import meet
from train.engines.pieces import share_of
from train.families import family_of
from train.machine import Precision, choose_device
from train.optim import Ema, load_optimizer_tensors, optimizer_tensors, weights_once, with_aliases
from train.optimizers import build_optimizer, clip_and_step, forget_gradients

TIMEOUT = timedelta(hours=2)  # the other ranks wait while rank 0 evaluates


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started."""

    rank: int
    local_rank: int
    size: int

    @classmethod
    def from_environment(cls) -> Ranks:
        """RANK, LOCAL_RANK, WORLD_SIZE; a plain `python` run is rank 0 of 1."""
        return cls(
            *(
                int(os.environ.get(name, default))
                for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
            )
        )

    @property
    def first(self) -> bool:
        """Rank 0 prints, writes and evaluates."""
        return self.rank == 0


@dataclass(frozen=True)
class StepResult:
    """What came of an optimizer step: losses of the whole step (unweighted, by name), their weighted sum, the
    gradient norm.
    """

    losses: dict[str, float]
    loss: float
    grad_norm: float
    skipped: bool


@dataclass(frozen=True)
class EngineState:
    """Weights and optimizer, as they go into a checkpoint."""

    model: Mapping[str, Any]
    """Tensors by name; of several ranks, each has its own `pieces.Piece`s. So too the next, and `ema`."""
    optimizer: Mapping[str, Any]
    groups: list[dict[str, Any]]
    ema: Mapping[str, Any] | None
    ema_updates: int


def join(ranks: Ranks, device_name: str, alone: bool = False) -> torch.device:
    """Choose the device and, with more than one rank, meet the others; `alone`: make a group of one rank too, which DeepSpeed
    and fully_shard need."""
    device = choose_device(device_name, ranks.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks.size > 1 or alone:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        of_one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**of_one, "MASTER_PORT": str(port)}.items():
            os.environ.setdefault(name, value)
        meet("nccl" if device.type == "cuda" else "gloo", ranks.rank, ranks.size, TIMEOUT)
    return device


def leave(ranks: Ranks) -> None:
    """Part in good order: without the barrier, 3 of 20 exits were seen to abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def share(value: Any, ranks: Ranks) -> Any:
    """Rank 0's value on every rank (small objects: paths, names)."""
    if ranks.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class TorchEngine:
    """The model and its optimizer on one device per rank: a single process, or DistributedDataParallel. The other engines
    are made of this one (train/engines/sharded.py).

    An optimizer step is: `agree` on the denominators; then for each of the `micro_batches` `micro_step(...)` around
    `losses` and `backward`; then `step`. Every loss is such that its mean over ranks is the loss of the
    global batch, because that is the mean DistributedDataParallel takes of gradients.
    """

    kind = "torch"

    def __init__(
        self,
        model: nn.Module,
        config: PretrainConfig,
        device: torch.device,
        precision: Precision,
        ranks: Ranks,
    ) -> None:
        self.config, self.device, self.precision, self.ranks = config, device, precision, ranks
        self.family = family_of(config)
        self.model = cast(Any, self.placed(model).train())
        within = getattr(self.model, "base", self.model)  # a task's model has the one that knows how
        within.gradient_checkpointing = config.activation_checkpointing
        self.ema: Ema | None = None
        self.weights = {name: weight for name, weight in config.objectives.weights().items() if weight}
        self._sums: dict[str, Tensor] = {}
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self.build()

    def placed(self, model: nn.Module) -> nn.Module:
        """The model where it computes; engines that shard move what is left of it themselves."""
        return model.to(self.device)

    def build(self) -> None:
        """Optimizer, moving average, and what runs forward; engines that shard have their own."""
        config = self.config
        self.built = build_optimizer(self.model, config.optim, self.device)
        self.optimizer = self.built.optimizer
        self.ema = Ema(self.model, config.ema_decay) if config.ema_decay else None
        module: nn.Module = torch.compile(self.model) if config.compile else self.model  # type: ignore[assignment]
        if self.ranks.size > 1:
            # The dense heads wait for their tasks and get no gradient from these objectives.
            module = nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
        self.module = module

    def agree(self, batches: Sequence[Any], stop: bool) -> tuple[Any, bool]:
        """The denominators of this optimizer step over all its micro-batches and ranks, and whether any rank
        wants to stop.
        """
        counts = [
            sum(n) for n in zip(*(self.family.counts(batch, self.config) for batch in batches), strict=True)
        ]
        totals = torch.tensor([*counts, int(stop)], dtype=torch.float64, device=self.device)
        if self.ranks.size > 1:
            dist.all_reduce(totals)
        *sums, stops = totals.tolist()
        # Over the number of ranks: these losses are sums, and gradients are averaged over ranks afterwards.
        shares = [max(n, 1.0) / self.ranks.size for n in sums]
        return self.family.normalizers(shares, len(batches)), stops > 0

    def micro_batches(self, batches: Sequence[Any]) -> list[MicroBatch]:
        """The micro-batches of this step; with `itc_negatives` "global", after a first pass over all of them for what
        the contrastive loss of the whole step needs."""
        self._statistics = running_statistics(self.model)
        if self.config.itc_negatives == "global" and contrasts(self.weights):
            return contrast_all(self, batches)
        return [MicroBatch(batch) for batch in batches]

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch: ranks exchange gradients on the last one only."""
        if self.ranks.size > 1 and not last:
            with self.module.no_sync():  # type: ignore[operator]
                yield
        else:
            yield

    def losses(self, micro: MicroBatch, objectives: Any, normalizers: Any) -> dict[str, Tensor]:
        """Forward of one micro-batch."""
        batch = self.on_device(micro.batch)
        with self.autocast(), micro.draws(self.device):
            return self.family.forward(self.module, batch, objectives, normalizers, micro.contrast)

    def on_device(self, batch: Any) -> Any:
        """The batch where the model is."""
        return batch.pin_memory().to(self.device) if self.device.type == "cuda" else batch

    def autocast(self) -> torch.autocast:
        """The arithmetic of this run."""
        enabled = self.precision.autocast is not None
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Add this micro-batch's gradients of the weighted sum."""
        torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum().backward()
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0) + loss.detach()

    def step(self, lr: float) -> StepResult:
        """Clip and update at learning rate `lr`; with a non-finite loss or gradient on any rank, all ranks
        leave the weights alone.
        """
        totals = self.totals()
        # The step is on its way before anything is read: it decides by itself whether it is one.
        healthy = torch.isfinite(self.weighted(totals))
        return self.concluded(totals, clip_and_step(self.optimizer, lr, self.config.optim.clip, healthy))

    def totals(self) -> Tensor:
        """The losses of the step so far, as many as `_sums` has names, fp64: the same on every rank."""
        totals = torch.stack([*self._sums.values()]).double()
        if self.ranks.size > 1:
            dist.all_reduce(totals)
            totals /= self.ranks.size
        return totals

    def weighted(self, totals: Tensor) -> Tensor:
        """Their weighted sum, []."""
        return (totals.new_tensor([self.weights[name] for name in self._sums]) * totals).sum()

    def concluded(self, totals: Tensor, norm: Tensor) -> StepResult:
        """What came of the step that was just made, or not made because a number in it is not finite."""
        *values, grad_norm = torch.cat((totals, norm[None].to(totals))).tolist()
        losses = dict(zip(self._sums, values, strict=True))
        loss = sum(self.weights[name] * value for name, value in losses.items())
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            self.average()
            self._statistics = []
        self.discard()
        return StepResult(losses, loss, grad_norm, skipped=not finite)

    def average(self) -> None:
        """Move the average of the weights, where the run keeps one."""
        if self.ema:
            self.ema.update(self.model)

    def discard(self) -> None:
        """Forget gradients and losses of an unfinished step, and what its forward passes added to running statistics."""
        for now, before in self._statistics:
            now.copy_(before)
        self._statistics = []
        forget_gradients(self.optimizer)
        self._sums = {}

    @contextmanager
    def scored_weights(self) -> Iterator[Any]:
        """The model as it is evaluated: with averaged weights where they are kept."""
        if self.ema is None:
            yield self.model
        else:
            with self.ema.applied(self.model):
                yield self.model

    def state(self) -> EngineState:
        """What a checkpoint keeps of weights and optimizer."""
        tensors, groups = optimizer_tensors(self.optimizer, self.model)
        ema = None if self.ema is None else dict(self.ema.weights)
        kinds: list[Any] = [weights_once(self.model), tensors, ema]
        if self.ranks.size > 1:  # all ranks hold the same: each writes a part of it
            rank, size = self.ranks.rank, self.ranks.size
            kinds = [kind if kind is None else share_of(kind, rank, size) for kind in kinds]
        return EngineState(kinds[0], kinds[1], groups, kinds[2], self.ema.updates if self.ema else 0)

    def load(self, state: EngineState) -> None:
        """Take over a checkpoint's weights and optimizer; hyperparameters stay those of this run's
        configuration.
        """
        self.model.load_state_dict(with_aliases(state.model, self.model))
        load_optimizer_tensors(self.optimizer, self.model, state.optimizer, state.groups)
        if self.ema is None:
            return
        if state.ema is None:  # averaging was turned on at the resume
            self.ema = Ema(self.model, self.config.ema_decay)
            return
        self.ema.updates = state.ema_updates
        for name, weight in self.ema.weights.items():
            weight.copy_(state.ema[name])


def running_statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """What forward passes change in training, batch norm's: each buffer, and a copy of what it holds now."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that dropout and stochastic depth draw from, uint8."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def gather_rng(states: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Every rank's states on rank 0, as "cpu.0", "cpu.1", ..."""
    if ranks.size == 1:
        return {f"{name}.0": state for name, state in states.items()}
    found: list[Any] = [None] * ranks.size
    dist.all_gather_object(found, states)
    return {f"{name}.{rank}": state for rank, part in enumerate(found) for name, state in part.items()}


def load_rng(states: Mapping[str, Tensor], rank: int, device: torch.device) -> bool:
    """Set the generators to what they were on this rank; False where the checkpoint has no such rank or
    device.
    """
    if f"cpu.{rank}" not in states or (device.type == "cuda" and f"cuda.{rank}" not in states):
        return False
    torch.set_rng_state(states[f"cpu.{rank}"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[f"cuda.{rank}"], device)
    return True
