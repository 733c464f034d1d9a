"""torch's own sharding: `fully_shard` (FSDP2). With `reshard_after_forward=False` it is ZeRO-2, else ZeRO-3 (arXiv:1910.02054).

Weights are fp32 shards; in bf16 runs they are gathered as bf16, and gradients are reduced in fp32. The optimizer works on the
plain tensors inside the shards, so it is the one that a single process has, clipping included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from train.engine import StepResult
from train.engines.sharded import Shard, ShardedEngine, blocks_of, must_be_torch
from train.optimizers import clip_and_step, global_norm


class Fsdp2Engine(ShardedEngine):
    """ZeRO-2, or ZeRO-3 with `zero_stage` 3, by torch alone."""

    kind = "fsdp2"

    def build(self) -> None:
        must_be_torch(self.config.optim.kind, self.kind)
        groups = self.name_parameters()
        self._shard()
        self._parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        self.replicated = frozenset(name for name, p in self._parameters.items() if p.ndim == 0)
        owned = {name: self._own(name, p, self.shapes[name]) for name, p in self._parameters.items()}
        self.shards = {name: shard for name, shard in owned.items() if shard.values.numel()}
        self.build_sharded_optimizer(groups)
        self.start_average()

    def _shard(self) -> None:
        half = self.precision.autocast
        policy = MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False
        )
        mesh = init_device_mesh(self.device.type, (self.ranks.size,))
        settings: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": policy,
            "reshard_after_forward": self.config.zero_stage == 3,
        }
        for block in blocks_of(self.model):
            fully_shard(block, **settings)
        scalars = {p for p in self.model.parameters() if p.ndim == 0}
        for p in scalars:
            p.data = p.data.to(self.device)
        fully_shard(self.model, ignored_params=scalars, **settings)
        if hasattr(self.model, "embed"):
            register_fsdp_forward_method(self.model, "embed")
        self.module = torch.compile(self.model) if self.config.compile else self.model  # type: ignore[assignment]

    def _own(self, name: str, parameter: nn.Parameter, shape: tuple[int, ...]) -> Shard:
        """The rows that this rank holds. FSDP2 deals rows as torch.chunk does."""
        if name in self.replicated:
            return Shard(parameter.detach().view(-1), 0, ())
        local: Tensor = parameter.detach().to_local()  # type: ignore[attr-defined]
        rows, each = -(-shape[0] // self.ranks.size), math.prod(shape[1:])
        start = min(self.ranks.rank * rows, shape[0])
        assert local.shape[0] == min(rows, shape[0] - start), name
        return Shard(local.view(-1), start * each, shape)

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Gradients are reduced in every micro-step: a rank never holds more than its shard of their sum. Weights stay
        gathered from one micro-step to the next."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_reshard_after_backward(last or self.config.zero_stage == 3)
        yield

    def step(self, lr: float) -> StepResult:
        totals = self.totals()
        replicated = [
            p.grad for name, p in self._parameters.items() if name in self.replicated and p.grad is not None
        ]
        self.mean_over_ranks(replicated)
        sharded = []
        for name, p in self._parameters.items():
            if p.grad is not None and name in self.shards:
                gradient = p.grad if name in self.replicated else p.grad.to_local()  # type: ignore[attr-defined]
                self.own_parameters[name].grad = gradient.reshape(-1)
                if name not in self.replicated:
                    sharded.append(gradient)
        squares = global_norm(sharded).to(self.device).double() ** 2
        dist.all_reduce(squares)
        norm = (squares + global_norm(replicated).to(squares) ** 2).sqrt().float()
        healthy = torch.isfinite(self.weighted(totals))
        clip_and_step(self.optimizer, lr, self.config.optim.clip, healthy, norm)
        return self.concluded(totals, norm)

    def discard(self) -> None:
        super().discard()
        for p in self._parameters.values():
            p.grad = None
