"""Which weights learn: frozen parts, LoRA, and the way from a pre-trained checkpoint into a task's model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.lora import add_lora
from train.config import ConfigError
from train.tasks.config import TuneConfig


def prepare(model: nn.Module, tune: TuneConfig, fresh: Collection[str] = ()) -> nn.Module:
    """Put LoRA's matrices into `model.base` and freeze what is to be frozen, in place. `fresh`: parts of `base` that
    pre-training leaves as they were initialised, and that always learn. Raises ConfigError for a part that the model lacks."""
    if tune.lora_rank:
        try:
            add_lora(_base(model), tune.lora_layers, tune.lora_rank, tune.lora_alpha, tune.lora_dropout)
        except ValueError as error:
            raise ConfigError(f"tune.lora_layers: {error}") from error
    for part in tune.freeze:
        prefix = "base." if part == "all" else f"base.{part}."
        found = False
        for name, parameter in model.named_parameters():
            if name.startswith(prefix) or name == f"base.{part}":
                found = True
                if ".lora_" not in name:
                    parameter.requires_grad_(False)
        if not found:
            parts = ", ".join(name for name, _ in _base(model).named_children())
            raise ConfigError(f"tune.freeze {part}: the model has no such part; it has {parts}")
    for part in fresh:
        _base(model).get_submodule(part).requires_grad_(True)
    _keep_still(model)
    return model


def _keep_still(model: nn.Module) -> None:
    """Batch norms with frozen weights normalise by what they have seen before, and their statistics stay, too."""
    still = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters())
    ]

    def rest(*_: object) -> None:
        for norm in still:
            norm.eval()

    if still:
        model.register_forward_pre_hook(rest)


def load_base(model: nn.Module, weights: Mapping[str, Tensor], optional: Collection[str] = ()) -> list[str]:
    """Copy a pre-trained model's weights into `model.base`; returns the names that stay as they were initialised.

    optional: beginnings of names that may be missing or of another shape (a head for other classes). Raises ConfigError
    naming all others that do not fit.
    """
    base = _base(model)
    own = base.state_dict()
    kept: list[str] = []
    wrong: list[str] = []
    for name, tensor in own.items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        given = weights.get(plain)
        if given is not None and given.shape == tensor.shape:
            with torch.no_grad():
                tensor.copy_(given)
        elif any(plain.startswith(start) for start in optional):
            kept.append(plain)
        else:
            found = "missing" if given is None else f"{list(given.shape)}"
            wrong.append(f"{plain} {list(tensor.shape)} (there: {found})")
    if wrong:
        raise ConfigError(
            f"the checkpoint does not fit the model: {'; '.join(wrong[:5])}"
            + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        )
    return kept


def _base(model: nn.Module) -> nn.Module:
    base = model.base
    assert isinstance(base, nn.Module)
    return base
