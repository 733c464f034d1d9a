"""Which weights learn: frozen parts, LoRA, and the way from a pre-trained checkpoint into a task's model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.lora import add_lora
from train.config import ConfigError
from train.tasks.config import TuneConfig

PLACES, QUERIES = "adapters.audio.positions", "queries.audio.queries"
"""Learned positions [T, ...] of the moments of a sound; what is asked of each place, all of a moment one behind the other."""
GRID, PATCHES = "adapters.image.positions", "queries.image.queries"
"""Learned positions [H, W, E] of the patches of a picture; what is asked of each patch [H W, E]."""


def prepare(model: nn.Module, tune: TuneConfig, fresh: Collection[str] = ()) -> nn.Module:
    """Put LoRA's matrices into `model.base` and freeze what is to be frozen, in place. `fresh`: parts of `base` that
    pre-training leaves as they were initialised, and that always learn. Raises ConfigError for a part that the model lacks, and
    where nothing is left that learns."""
    if tune.lora_rank:
        try:
            add_lora(_base(model), tune.lora_layers, tune.lora_rank, tune.lora_alpha, tune.lora_dropout)
        except ValueError as error:
            raise ConfigError(f"tune.lora_layers: {error}") from error
    for part in tune.freeze:
        prefix = "base." if part == "all" else f"base.{part}."
        found = False
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name.startswith(prefix) or name == f"base.{part}":
                found = True
                if ".lora_" not in name:
                    parameter.requires_grad_(False)
        if not found:
            parts = ", ".join(name for name, _ in _base(model).named_children())
            raise ConfigError(f"tune.freeze {part}: the model has no such part; it has {parts}")
    for part in fresh:
        _base(model).get_submodule(part).requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"tune.freeze {' '.join(tune.freeze)}: nothing is left that learns, as this task has no head of its own; freeze "
            "less, or add --tune.lora-rank"
        )
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

    optional: beginnings of names that may be missing or of another shape (a head for other classes). Sounds may be of another
    length, and PerceiverIO's pictures of another size: see `with_sounds_of`, `with_pictures_of`. Raises ConfigError naming all
    others that do not fit.
    """
    base = _base(model)
    own = base.state_dict()
    weights = with_pictures_of(with_sounds_of(weights, own), own)
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


def with_sounds_of(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights for sounds of the length that the weights `own` are for. A moment keeps its position, as sounds are not
    stretched to their length; those later than all that were learned begin with the last one's. What differs in more than the
    number of moments stays as it is."""
    found = dict(weights)
    if PLACES not in found or PLACES not in own or found[PLACES].shape[1:] != own[PLACES].shape[1:]:
        return found
    had, has = len(found[PLACES]), len(own[PLACES])
    for name in (PLACES, QUERIES):
        if had == has or name not in found or len(found[name]) % had:
            continue
        moments = found[name].unflatten(0, (had, -1))
        last = moments[-1:].expand(max(has - had, 0), *moments.shape[1:])
        found[name] = torch.cat([moments, last])[:has].flatten(0, 1)
    return found


def with_pictures_of(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights for pictures of the size that the weights `own` are for: what belongs to a patch is interpolated, as
    PerceiverIO does with a picture of another size."""
    found = dict(weights)
    if GRID not in found or GRID not in own or found[GRID].shape[2:] != own[GRID].shape[2:]:
        return found
    had, has = found[GRID].shape[:2], own[GRID].shape[:2]
    if had == has:
        return found

    def at(table: Tensor) -> Tensor:  # [H, W, E]
        wide = table.permute(2, 0, 1)[None].float()
        return (
            F.interpolate(wide, size=tuple(has), mode="bilinear", align_corners=False)[0]
            .permute(1, 2, 0)
            .to(table)
        )

    found[GRID] = at(found[GRID])
    if PATCHES in found and len(found[PATCHES]) == had.numel():
        found[PATCHES] = at(found[PATCHES].unflatten(0, had)).flatten(0, 1)
    return found


def _base(model: nn.Module) -> nn.Module:
    base = model.base
    assert isinstance(base, nn.Module)
    return base
