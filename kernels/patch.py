"""Put the Swin or Perceiver attention of a timm, torchvision or transformers model on our kernels, and back."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from kernels.accelerated import perceiver, timm, torchvision, transformers
from kernels.accelerated.base import Accelerated, accelerated_class, hooked
from kernels.backend import Plan, resolve
from kernels.window_attention.op import NEVER

NAME = "accelerate"
# module of the library -> class in it -> what accelerates it
SUPPORTED: dict[str, dict[str, type[Accelerated]]] = {
    "timm.models.swin_transformer": {"SwinTransformerBlock": timm.SwinBlock},
    "timm.models.swin_transformer_v2": {"SwinTransformerV2Block": timm.SwinV2Block},
    "torchvision.models.swin_transformer": {
        "ShiftedWindowAttention": torchvision.SwinAttention,
        "ShiftedWindowAttentionV2": torchvision.SwinV2Attention,
    },
    "transformers.models.swin.modeling_swin": {"SwinLayer": transformers.SwinLayer},
    "transformers.models.swinv2.modeling_swinv2": {"Swinv2Layer": transformers.Swinv2Layer},
    "transformers.models.swin2sr.modeling_swin2sr": {"Swin2SRLayer": transformers.Swinv2Layer},
    "transformers.models.donut.modeling_donut_swin": {"DonutSwinLayer": transformers.OlderSwinLayer},
    "transformers.models.clap.modeling_clap": {"ClapAudioLayer": transformers.OlderSwinLayer},
    "transformers.models.maskformer.modeling_maskformer_swin": {
        "MaskFormerSwinLayer": transformers.OlderSwinLayer
    },
    "transformers.models.perceiver.modeling_perceiver": {
        "PerceiverSelfAttention": perceiver.PerceiverSelfAttention
    },
}
FUNCTIONS = ("window_attention", "latent_attention")  # in the order of reports
NAMES_SHOWN = 4  # of the modules in one line of a printed report


class Left(NamedTuple):
    """A module that computes attention and was not replaced."""

    kind: str  # its class
    reason: str


@dataclass(frozen=True)
class Report:
    """What `accelerate` found; printed, it is a few readable lines. Names are those of `model.named_modules()`."""

    backend: str
    replaced: Mapping[str, str]  # name -> the library's class
    already: tuple[str, ...]  # accelerated by an earlier call; the backend is now this call's
    left: Mapping[str, Left]
    functions: tuple[str, ...] = FUNCTIONS[:1]  # those that compute the attention of what was replaced

    def __str__(self) -> str:
        found = len(self.replaced) + len(self.already) + len(self.left)
        on = len(self.replaced) + len(self.already)
        which = " and ".join(self.functions)
        lines = [f"{NAME}: {on} of {found} attention modules on {which}, backend {self.backend!r}"]
        lines += [f"  replaced {_group(names, kind)}" for kind, names in _by_value(self.replaced)]
        if self.already:
            lines.append(f"  already  {_group(list(self.already), 'by an earlier call')}")
        lines += [
            f"  left     {_group(names, left.kind)}: {left.reason}" for left, names in _by_value(self.left)
        ]
        return "\n".join(lines)


def accelerate(model: nn.Module, *, backend: str = "auto") -> Report:
    """Let Swin layers of `model` compute attention by `window_attention`, Perceiver's by `latent_attention`, in place.

        model = timm.create_model("swin_tiny_patch4_window7_224")
        print(kernels.accelerate(model))

    Supported: Swin (arXiv:2103.14030) and SwinV2 (arXiv:2111.09883) of timm and torchvision; Swin, Swinv2, Swin2SR
    and the Swin layers of Donut, CLAP and MaskFormer in transformers; Perceiver (arXiv:2103.03206) and Perceiver IO
    (arXiv:2107.14795) in transformers. Parameters, buffers and their names stay, so checkpoints and optimisers do
    too. Outputs and gradients are the library's up to rounding, for every size of input that it takes. Only classes
    of instances change: deepcopy, pickle, hooks on the layers, gradient checkpointing, autocast and torch.compile go
    on working. Call it before wrappers that change classes themselves, such as FSDP2's fully_shard.

    backend: "auto" or one of those functions', with what that can (gradients of gradients: "reference" alone). A
    second call changes nothing but the backend. `restore` before torch.jit.script, which cannot read the new classes.

    Left as they are, and listed with the reason in the report that is returned: layers with attention dropout (there
    is none in window_attention, and latent_attention drops others than the library); subclasses of supported layers;
    layers that lack an attribute, as another version of the library may; all other attention. What comes up later
    makes a layer's call run the library's own code, with one warning: output_attentions, dropout that was switched
    on, hooks inside the attention; in Perceiver a mask that does more than hide keys, and any mask in compiled code,
    which cannot warn. Dropout after a Swin layer's projection draws other random numbers than before, because tokens
    come in another order.

    Raises TypeError for what is no module; ValueError where nothing of the model runs on the kernel afterwards, with
    all that was found, and for an unknown backend; BackendError for a backend that can never run one of them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{NAME}: model must be a torch.nn.Module, got {type(model).__name__}")
    resolve(NAME, backend, Plan("auto", "", {}))  # raises for a backend that there is not
    families = _loaded()
    replaced: dict[str, nn.Module] = {}
    already: dict[str, Accelerated] = {}
    left: dict[str, Left] = {}
    for name, module in _attention_modules(model, families):
        if isinstance(module, Accelerated):
            already[name] = module
        elif (reason := _refusal(module, families)) is not None:
            left[name] = Left(_kind(type(module)), reason)
        else:
            replaced[name] = module
    kinds = MappingProxyType({name: _kind(type(module)) for name, module in replaced.items()})
    used = {families[type(module)].function for module in replaced.values()}
    used |= {module.function for module in already.values()}
    functions = tuple(name for name in FUNCTIONS if name in used) or FUNCTIONS
    report = Report(backend, kinds, tuple(already), MappingProxyType(left), functions)
    if not replaced and not already:
        raise ValueError(f"{_nothing_for(model)}\n{report}" if left else _nothing_for(model))
    if "window_attention" in used:
        resolve(NAME, backend, Plan("auto", "", NEVER))
    for module in replaced.values():
        module.__class__ = accelerated_class(families[type(module)], type(module))
    for module in (*replaced.values(), *already.values()):
        module.attention_backend = backend  # type: ignore[assignment]
    return report


def restore(model: nn.Module) -> tuple[str, ...]:
    """Undo `accelerate`: every accelerated module in `model` is of its library's class again.

    Returns their names; an empty tuple where there was none. Raises TypeError for what is no module; and ValueError, and
    restores nothing, where another wrapper has given one of them a class of its own since: undo that first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, got {type(model).__name__}")
    found = {name: module for name, module in model.named_modules() if isinstance(module, Accelerated)}
    for name, module in found.items():
        if type(module) is not accelerated_class(module.family, module.library):
            raise ValueError(
                f"restore: {name!r} was given the class {type(module).__name__} after it was accelerated; "
                "undo that first"
            )
    for module in found.values():
        module.__class__ = module.library
        del module.attention_backend
    return tuple(found)


def _loaded() -> dict[type, type[Accelerated]]:
    """The supported classes of libraries that have been imported: a model's own library has been."""
    return {
        getattr(sys.modules[module], name): family
        for module, classes in SUPPORTED.items()
        if module in sys.modules
        for name, family in classes.items()
        if hasattr(sys.modules[module], name)
    }


def _attention_modules(
    model: nn.Module, families: Mapping[type, type[Accelerated]]
) -> Iterator[tuple[str, nn.Module]]:
    """Supported, accelerated, and other attention modules; nothing that lies inside one of them."""
    known = (Accelerated, *families)
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        other = "Attention" in type(module).__name__ and not any(
            isinstance(m, known) for m in module.modules()
        )
        if other or isinstance(module, known):
            inside = f"{name}." if name else ""
            yield name, module


def _refusal(module: nn.Module, families: Mapping[type, type[Accelerated]]) -> str | None:
    """Why the module cannot be replaced, or None."""
    library = type(module)
    if library not in families:
        parents = [_kind(parent) for parent in library.__mro__[1:] if parent in families]
        if parents:
            return f"a subclass of {parents[0]}, which may compute something else"
        return "not an attention that is supported"
    family = families[library]
    for path in (*family.needs, family.dropout_at):
        try:
            attrgetter(path)(module)
        except AttributeError:
            return f"it has no {path}; another version of the library may have none"
    for path in family.skipped:
        inner = module.get_submodule(path)
        if type(inner).__module__ != library.__module__ and not type(inner).__module__.startswith(
            "torch.nn."
        ):
            return f"its {path} is a {_kind(type(inner))}, not the library's own"
        if hooked(inner):
            return f"its {path} has a hook, which would no longer be called"
    dropout = attrgetter(family.dropout_at)(module)
    if dropout > 0:
        return (
            f"attention dropout is {dropout:g}, and {family.dropout_why} ({family.dropout_at} = 0 would do)"
        )
    return None


def _nothing_for(model: nn.Module) -> str:
    classes = ", ".join(
        f"{module.split('.')[0]}'s {name}" for module, names in SUPPORTED.items() for name in names
    )
    return (
        f"{NAME}: nothing in {type(model).__name__} can run on {' or '.join(FUNCTIONS)}; supported: {classes}"
    )


def _kind(cls: type) -> str:
    """The class as "library ClassName"."""
    return f"{cls.__module__.split('.')[0]} {cls.__qualname__}"


def _by_value(names: Mapping[str, object]) -> list[tuple[Any, list[str]]]:
    groups: dict[object, list[str]] = {}
    for name, value in names.items():
        groups.setdefault(value, []).append(name)
    return list(groups.items())


def _group(names: list[str], kind: str) -> str:
    """Count, kind, and the first names."""
    shown = ", ".join(name or "(the model itself)" for name in names[:NAMES_SHOWN])
    more = f", and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{len(names)} {kind} ({shown}{more})"
