"""The learning rate, the optimizer's state under names, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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


def aliases(model: nn.Module) -> dict[str, str]:
    """Further names of parameters that a model has under several (a tied embedding): alias -> the name it is saved under."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: names[id(p)] for name, p in every if names[id(p)] != name}


def weights_once(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without aliases: files hold every tensor once."""
    also = aliases(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in also}


def with_aliases(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What `weights_once` gave, as `load_state_dict` wants it."""
    return {**weights, **{also: weights[name] for also, name in aliases(model).items() if name in weights}}


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

    A parameter that has had no gradient has no state and is absent. A moment in 8 bits is several tensors
    ("exp_avg/codes.encoder.stem.weight"); what is a number in the state is a tensor [] here.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for p, state in optimizer.state.items():
        for kind, value in state.items():
            if hasattr(value, "__tensor_flatten__"):
                inner = {f"{kind}/{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}
            else:
                inner = {kind: torch.as_tensor(value)}
            tensors |= {f"{part}.{names[id(p)]}": tensor for part, tensor in inner.items()}
    groups = []
    for group in optimizer.param_groups:
        settings = {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        groups.append({**settings, "params": [names[id(p)] for p in group["params"]]})
    return tensors, groups


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """The inverse. Hyperparameters stay the optimizer's own. Raises ValueError where the groups hold other
    parameters, or the state is of another kind of optimizer.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    own = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    if own != [list(group["params"]) for group in groups]:
        raise ValueError("the checkpoint's optimizer groups hold other parameters than this model's")
    state: dict[int, dict[str, Any]] = {}
    number = {name: i for i, name in enumerate(name for group in own for name in group)}
    for key, value in tensors.items():
        kind, name = key.split(".", 1)
        state.setdefault(number[name], {})[kind] = value
    if state and any("step" in kinds for kinds in state.values()) == _counts_by_group(optimizer):
        raise ValueError(
            "the checkpoint's optimizer counts its steps elsewhere than this run's: --optim.kind was another then"
        )
    parameters = dict(model.named_parameters())
    flat = [name for group in own for name in group]
    for index, kinds in state.items():
        _assemble(optimizer, parameters[flat[index]], kinds)
    settings = optimizer.state_dict()["param_groups"]
    for setting, group in zip(settings, groups, strict=True):
        if "step" in group:  # apex's count is a setting of the group
            setting["step"] = group["step"]
    optimizer.load_state_dict({"state": state, "param_groups": settings})


def _counts_by_group(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the number of steps is a setting of the group (apex) rather than a state of each parameter."""
    return type(optimizer).__module__.split(".")[0] == "apex"


def _assemble(optimizer: torch.optim.Optimizer, p: Tensor, kinds: dict[str, Any]) -> None:
    """Put the parts of 8-bit moments together, in place. Raises ValueError where `optimizer` keeps them otherwise."""
    make = getattr(
        optimizer, "_new_buffer", None
    )  # torchao's own: which moments are in 8 bits is its decision
    for kind, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        parts = {key.split("/")[1]: kinds.pop(key) for key in list(kinds) if key.startswith(f"{kind}/")}
        moment: Any = make(p, signed) if make is not None else None
        wanted = moment.__tensor_flatten__()[0] if hasattr(moment, "__tensor_flatten__") else []
        if sorted(parts) != sorted(wanted):
            found, needed = ("in 8 bits" if x else "whole" for x in (parts, wanted))
            raise ValueError(
                f"the checkpoint's optimizer keeps its moments {found}, this run's {needed}: "
                "--optim.kind was another then"
            )
        for part in wanted:
            getattr(moment, part).copy_(parts[part])
        if wanted:
            kinds[kind] = moment
