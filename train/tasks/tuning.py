"""Which weights learn: frozen parts, LoRA (peft, extra `tune`), and the way from a pre-trained checkpoint into a task's model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from train.config import ConfigError
from train.tasks.config import TuneConfig


def prepare(model: nn.Module, tune: TuneConfig) -> nn.Module:
    """Put LoRA's matrices into `model.base` and freeze what is to be frozen, in place. Raises ConfigError for a part that the
    model lacks, ImportError without peft."""
    if tune.lora_rank:
        add_lora(model, tune)
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
    return model


def add_lora(model: nn.Module, tune: TuneConfig) -> None:
    """LoRA's matrices beside the chosen linear layers of `model.base`; only they and the task's head then learn."""
    peft = _peft()
    base = _base(model)
    names = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in tune.lora_layers
    ]
    if not names:
        raise ConfigError(f"tune.lora_layers {tune.lora_layers}: the model has no such linear layer")
    settings = peft.LoraConfig(
        r=tune.lora_rank, lora_alpha=tune.lora_alpha, lora_dropout=tune.lora_dropout, target_modules=names
    )
    peft.inject_adapter_in_model(settings, base)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def merge_lora(model: nn.Module) -> nn.Module:
    """The same model with LoRA's matrices added to the weights beside which they stand, in place."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "merge"):
            layer: Any = module
            layer.merge()
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, layer.get_base_layer())
    return model


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


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"LoRA needs peft: pip install 'auroraio[tune]' ({error})") from error
    return peft
