"""LoRA (arXiv:2106.09685): a linear layer that keeps its weights and learns a low-rank change of them.

y = W x + (alpha / rank) B A x, with A random and B zero at the start, so that nothing changes at first. Parameters are named
as peft names them (`base_layer`, `lora_A.default`, `lora_B.default`), so that state dicts go either way, and peft's own layers
work in these models too. Training does without peft, which brings transformers and accelerate along.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "default"


class LoraLinear(nn.Module):
    """In place of a `nn.Linear`: [..., in] -> [..., out]."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRA's rank is {rank}; it must be at least 1")
        options: dict[str, Any] = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.base_layer = base
        self.lora_A = nn.ModuleDict({ADAPTER: nn.Linear(base.in_features, rank, **options)})
        self.lora_B = nn.ModuleDict({ADAPTER: nn.Linear(rank, base.out_features, **options)})
        self.dropout, self.scaling = nn.Dropout(dropout), alpha / rank
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        for parameter in base.parameters():
            parameter.requires_grad_(False)

    @property
    def down(self) -> nn.Linear:
        """A: [in] -> [rank]."""
        layer = self.lora_A[ADAPTER]
        assert isinstance(layer, nn.Linear)
        return layer

    @property
    def up(self) -> nn.Linear:
        """B: [rank] -> [out]."""
        layer = self.lora_B[ADAPTER]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.scaling * self.up(self.down(self.dropout(x)))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer with the change added to its weights, in place."""
        self.base_layer.weight += self.scaling * (self.up.weight @ self.down.weight)
        return self.base_layer


def add_lora(
    model: nn.Module, layers: Collection[str], rank: int, alpha: float, dropout: float = 0.0
) -> list[str]:
    """Put LoRA around the linear layers of `model` whose last name is among `layers`, in place; their names. All other
    parameters are frozen. Raises ValueError where there is none."""
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.rpartition(".")[2] in layers
    ]
    if not names:
        raise ValueError(f"LoRA for {', '.join(layers)}: the model has no linear layer of such a name")
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        _put(model, name, LoraLinear(layer, rank, alpha, dropout))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return names


def merge_lora(model: nn.Module) -> nn.Module:
    """The same model without LoRA: its changes are added to the weights beside which they stand, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            _put(model, name, module.merged())
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)
