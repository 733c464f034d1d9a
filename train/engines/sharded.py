"""What the engines that shard have in common: fp32 master weights and moments of which a rank holds runs of numbers, their
checkpoints, their moving average, and a whole model on rank 0 to score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import models
from models.aurora.encoder import SwinBlock
from models.layers import Block
from models.perceiver.classic import ClassicBlock
from models.perceiver.latents import InputRead
from train.config import ConfigError
from train.engine import EngineState, TorchEngine
from train.engines.pieces import Piece, part_of
from train.optim import with_aliases
from train.optimizers import build_optimizer

BLOCKS = (SwinBlock, Block, ClassicBlock, InputRead)
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shard:
    """This rank's run of a parameter's numbers."""

    values: Tensor
    """fp32 master weights, 1-D: what the optimizer updates."""
    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """The first number after it."""
        return self.start + self.values.numel()

    def piece(self, values: Tensor) -> Piece:
        """Other numbers of the same place."""
        return Piece(values, self.start, self.shape)


class ShardedEngine(TorchEngine):
    """A TorchEngine whose weights and optimizer are spread over the ranks.

    Parameters without a dimension (temperatures) stay whole and fp32 on every rank: FSDP2 has no shards of them, and DeepSpeed
    would round them to bf16. `replicated` names them, and what else rank 0 writes alone.
    """

    shapes: dict[str, tuple[int, ...]]
    """Of every parameter."""
    group_names: list[list[str]]
    """The parameters of each of the optimizer's groups."""
    shards: dict[str, Shard]
    """What of them this rank holds; those of which it holds nothing are absent."""
    replicated: frozenset[str]
    averages: dict[str, Tensor] | None = None
    average_updates = 0

    def placed(self, model: nn.Module) -> nn.Module:
        """Where it is made: a whole model in fp32 may be more than a GPU holds."""
        return model

    def name_parameters(self) -> list[dict[str, Any]]:
        """The optimizer's groups, as a single process has them; before anything is sharded."""
        groups = models.parameter_groups(self.model, self.config.optim.weight_decay)
        names = {id(p): name for name, p in self.model.named_parameters()}
        self.group_names = [[names[id(p)] for p in group["params"]] for group in groups]
        self.shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        return groups

    def build_sharded_optimizer(self, groups: list[dict[str, Any]]) -> None:
        """The optimizer of this rank's numbers, in parameters that share memory with the shards: plain tensors, which every
        optimizer takes."""
        self.own_parameters = {name: nn.Parameter(shard.values) for name, shard in self.shards.items()}
        for group, members in zip(groups, self.group_names, strict=True):
            group["params"] = [self.own_parameters[name] for name in members if name in self.shards]
        self.built = build_optimizer(self.model, self.config.optim, self.device, groups)
        self.optimizer = self.built.optimizer

    def moments(self, name: str) -> dict[str, Tensor]:
        """exp_avg, exp_avg_sq (1-D, as the shard) and step [] of a parameter; empty before its first step."""
        return dict(self.optimizer.state.get(self.own_parameters[name], {}))

    def set_moments(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over moments by parameter."""
        held = [name for group in self.group_names for name in group if name in self.shards]
        state = {held.index(name): dict(moments) for name, moments in found.items()}
        self.optimizer.load_state_dict(
            {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )

    def publish(self) -> None:
        """Have the model compute with the master weights as they are now, after these were set from outside."""

    def masters(self) -> dict[str, Tensor]:
        """The numbers of every shard."""
        return {name: shard.values for name, shard in self.shards.items()}

    def start_average(self) -> None:
        """Begin the moving average at the present weights, where the run keeps one."""
        if self.config.ema_decay:
            self.averages = {name: values.detach().clone() for name, values in self.masters().items()}

    @torch.no_grad()
    def average(self) -> None:
        """As `optim.Ema.update`, each rank its own numbers."""
        if self.averages is not None:
            decay = min(self.config.ema_decay, (1 + self.average_updates) / (10 + self.average_updates))
            self.average_updates += 1
            torch._foreach_lerp_(list(self.averages.values()), list(self.masters().values()), 1 - decay)

    def state(self) -> EngineState:
        first = self.ranks.first
        mine = {name: shard for name, shard in self.shards.items() if first or name not in self.replicated}
        model: dict[str, Any] = {name: shard.piece(shard.values) for name, shard in mine.items()}
        if first:
            model |= {name: Piece.of(buffer) for name, buffer in self.buffers().items()}
        optimizer: dict[str, Any] = {}
        for name, shard in mine.items():
            for kind, tensor in self.moments(name).items():
                if kind in MOMENTS:
                    optimizer[f"{kind}.{name}"] = shard.piece(tensor)
                elif shard.start == 0:  # the count of steps, one number
                    optimizer[f"{kind}.{name}"] = Piece.of(tensor)
        averages = self.averages
        ema = (
            None if averages is None else {name: shard.piece(averages[name]) for name, shard in mine.items()}
        )
        return EngineState(model, optimizer, self.groups(), ema, self.average_updates)

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups as JSON-able data, as `optim.optimizer_tensors` gives them."""
        plain = [
            {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
        ]
        return [{**group, "params": names} for group, names in zip(plain, self.group_names, strict=True)]

    def load(self, state: EngineState) -> None:
        if self.group_names != [list(group["params"]) for group in state.groups]:
            raise ValueError("the checkpoint's optimizer groups hold other parameters than this model's")
        if any("/" in key.split(".", 1)[0] for key in state.optimizer):
            raise ValueError("the checkpoint's optimizer keeps its moments in 8 bits, this run's whole")
        if any("step" in group for group in state.groups):
            raise ValueError(
                "the checkpoint's optimizer is apex's, which counts its steps elsewhere than torch's"
            )
        self.set_weights(
            {name: part_of(state.model, name, s.start, s.stop) for name, s in self.shards.items()}
        )
        for name, buffer in self.buffers().items():
            buffer.copy_(state.model[name])
        found: dict[str, dict[str, Tensor]] = {}
        for name, shard in self.shards.items():
            if f"step.{name}" in state.optimizer:
                found[name] = {
                    kind: part_of(state.optimizer, f"{kind}.{name}", shard.start, shard.stop)
                    for kind in MOMENTS
                }
                found[name]["step"] = state.optimizer[f"step.{name}"]
        self.set_moments(found)
        self.publish()
        self.start_average()  # where the checkpoint has none, averaging begins at the resume
        if self.averages is not None and state.ema is not None:
            self.average_updates = state.ema_updates
            for name, shard in self.shards.items():
                self.averages[name].copy_(part_of(state.ema, name, shard.start, shard.stop))

    @torch.no_grad()
    def set_weights(self, values: Mapping[str, Tensor]) -> None:
        """Take over master weights by parameter."""
        for name, found in values.items():
            self.shards[name].values.copy_(found)

    def buffers(self) -> dict[str, Tensor]:
        """The model's persistent buffers (running statistics), each rank's own."""
        kept = self.model.state_dict()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in kept}

    @contextmanager
    def scored_weights(self) -> Iterator[Any]:
        """On rank 0 a whole model of its own, with averaged weights where they are kept; None on the others. All ranks
        enter this together."""
        numbers = self.masters() if self.averages is None else self.averages
        whole = {name: self.collect(name, numbers) for name in self.shapes}
        if not self.ranks.first:
            yield None
            return
        with torch.device("meta"):
            model: Any = self.family.model(self.config)
        weights = {name: tensor for name, tensor in whole.items() if tensor is not None}
        weights |= {name: buffer.clone() for name, buffer in self.buffers().items()}
        model.load_state_dict(with_aliases(weights, model), assign=True)
        yield model.train()

    @torch.no_grad()
    def collect(self, name: str, numbers: Mapping[str, Tensor]) -> Tensor | None:
        """All of a parameter's numbers on rank 0, of which each rank gives its own. All ranks call this."""
        shape, shard = self.shapes[name], self.shards.get(name)
        if name in self.replicated:
            return numbers[name].detach().clone().view(shape) if self.ranks.first else None
        whole = torch.zeros(math.prod(shape), dtype=torch.float32, device=self.device)
        if shard is not None:
            whole[shard.start : shard.stop] = numbers[name]
        if self.ranks.size > 1:
            dist.reduce(whole, 0)
        return whole.view(shape) if self.ranks.first else None

    def mean_over_ranks(self, gradients: list[Tensor]) -> None:
        """Average gradients of whole parameters, in place, in one message."""
        if gradients and self.ranks.size > 1:
            flat = torch.cat([g.reshape(-1).float() for g in gradients])
            dist.all_reduce(flat)
            flat /= self.ranks.size
            for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))


def must_be_torch(kind: str, engine: str) -> None:
    """Raises ConfigError for an optimizer that a sharding engine does not take."""
    if kind not in ("auto", "torch"):
        raise ConfigError(
            f"optim.kind is {kind!r}; --engine {engine} supports torch (auto takes it), because its shards of moments are "
            "plain fp32 numbers that any engine can go on from"
        )


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The layers that models repeat, outermost first found: what is gathered, and reduced, together."""
    found: list[nn.Module] = []
    for child in module.children():
        found += [child] if isinstance(child, BLOCKS) else blocks_of(child)
    return found
