"""What one of N ranks keeps and computes in a ZeRO-2 step (arXiv:1910.02054), alone on one device.

Whole weights in bf16; of gradients, fp32 master weights and moments a 1/N part. A gradient is freed as soon as it is there,
but for its part. Nothing is exchanged: the time and the buckets of communication are not in it, the gradients are those of
this rank's samples, and the rest of the weights stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from train.config import PretrainConfig
from train.engine import Ranks, StepResult
from train.engines.sharded import Shard, ShardedEngine
from train.families import family_of
from train.machine import Precision
from train.optimizers import clip_and_step, global_norm
from train.plan.standins import replaced


class RankShare(ShardedEngine):
    """The share of the first of `of` ranks: the first 1/of of every parameter's numbers."""

    kind = "share"

    def __init__(
        self, model: nn.Module, config: PretrainConfig, device: torch.device, precision: Precision, of: int
    ) -> None:
        self.of = of
        super().__init__(model, config, device, precision, Ranks(0, 0, 1))

    def build(self) -> None:
        groups = self.name_parameters()
        self._parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        self.replicated = frozenset(name for name, p in self._parameters.items() if p.ndim == 0)
        self.shards = {name: self._own(name, p) for name, p in self._parameters.items()}
        self.build_sharded_optimizer(groups)
        for name, p in self._parameters.items():
            if name not in self.replicated and p.requires_grad:
                p.register_post_accumulate_grad_hook(partial(self._keep, name))
        self.start_average()
        self.module = self.model

    def _own(self, name: str, p: nn.Parameter) -> Shard:
        if name in self.replicated:
            return Shard(p.detach().view(-1), 0, ())
        run = p.detach().view(-1)[: -(-p.numel() // self.of)]
        return Shard(run.to(torch.float32, copy=True), 0, self.shapes[name])

    @torch.no_grad()
    def _keep(self, name: str, p: Tensor) -> None:
        """Add this rank's part of a gradient to the sum, and free the rest."""
        assert p.grad is not None
        own = self.own_parameters[name]
        part = p.grad.reshape(-1)[: own.numel()].to(torch.float32, copy=True)
        p.grad = None
        if own.grad is None:
            own.grad = part
        else:
            own.grad += part

    def step(self, lr: float) -> StepResult:
        totals = self.totals()
        for name in self.replicated:
            gradient = self._parameters[name].grad
            self.own_parameters[name].grad = None if gradient is None else gradient.reshape(-1)
        norm = global_norm([p.grad for p in self.own_parameters.values() if p.grad is not None])
        healthy = torch.isfinite(self.weighted(totals))
        clip_and_step(self.optimizer, lr, self.config.optim.clip, healthy, norm)
        self.publish()
        return self.concluded(totals, norm)

    @torch.no_grad()
    def publish(self) -> None:
        names = [name for name in self.shards if name not in self.replicated]
        values = [self.shards[name].values for name in names]
        runs = [
            self._parameters[name].detach().view(-1)[: v.numel()]
            for name, v in zip(names, values, strict=True)
        ]
        torch._foreach_copy_(runs, values)

    def discard(self) -> None:
        super().discard()
        for p in self._parameters.values():
            p.grad = None


def model_on(config: PretrainConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A run's model, made on `device` in `dtype` (see `made_on`)."""
    return made_on(lambda: family_of(config).model(config), device, dtype)


def made_on(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """A new module made where it computes and in the dtype that it keeps: 18 billion parameters in seconds. Parameters without
    a dimension, and buffers, are fp32. Weights are normal, cut at two deviations by clamping."""

    def normal(weight: Tensor, *, std: float, a: float, b: float, **_: Any) -> Tensor:
        with torch.no_grad():
            return weight.normal_(0, std).clamp_(a, b)

    # torch's own first values, which `init_weights` replaces.
    skipped = ("kaiming_uniform_", "uniform_")
    places: list[Any] = [(nn.init, name, lambda weight, *_, **__: weight) for name in skipped]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, replaced([*places, (nn.init, "trunc_normal_", normal)]):
            model = make()
    finally:
        torch.set_default_dtype(before)
    for p in model.parameters():
        if p.ndim == 0:
            p.data = p.data.float()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.float())
    return model
