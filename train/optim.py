"""The learning rate, AdamW, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import models
from train.config import OptimConfig


def lr_at(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (0-based) of `steps`: a pure function, so that a resumed run
    needs no state.

    Linear over the first `warmup` steps (step 0 takes lr / warmup), then a cosine (SGDR, arXiv:1608.03983,
    without restarts) from `lr` at step `warmup` to `final_lr` at the last step.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = min((step - config.warmup) / max(steps - 1 - config.warmup, 1), 1.0)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def make_adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW (3.3x its for-loop on a CPU) over the model's parameter groups; the rate is set at
    every step.
    """
    groups = models.parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


class Ema:
    """Exponential moving average of a model's parameters, fp32, one copy.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that the average does not
    remember the initial weights for its whole time constant.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights: dict[str, Tensor] = {
            name: p.detach().float().clone() for name, p in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """weights += (1 - decay) * (parameters - weights)."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        current = [p.detach().float() for _, p in model.named_parameters()]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights inside the `with` block, and exactly its own again after it."""
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._copy(self.weights, model)
        try:
            yield
        finally:
            self._copy(own, model)

    @staticmethod
    @torch.no_grad()
    def _copy(weights: dict[str, Tensor], model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.copy_(weights[name])


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state under parameter names ("exp_avg.encoder.stem.weight"), and its groups as JSON-able
    data.

    A parameter that has had no gradient has no state and is absent.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {
        f"{kind}.{names[id(p)]}": value
        for p, state in optimizer.state.items()
        for kind, value in state.items()
    }  # fmt: skip
    groups = []
    for group in optimizer.param_groups:
        settings = {k: v for k, v in group.items() if k != "params"}
        groups.append({**settings, "params": [names[id(p)] for p in group["params"]]})
    return tensors, groups


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """The inverse. Hyperparameters stay the optimizer's own. Raises ValueError where the groups hold other
    parameters.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    own = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    if own != [list(group["params"]) for group in groups]:
        raise ValueError("the checkpoint's optimizer groups hold other parameters than this model's")
    state: dict[int, dict[str, Tensor]] = {}
    number = {name: i for i, name in enumerate(name for group in own for name in group)}
    for key, value in tensors.items():
        kind, name = key.split(".", 1)
        state.setdefault(number[name], {})[kind] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
