"""How a library's module becomes an accelerated one: its instance gets a class made of two, ours before the library's.

Ours ("family": timm.py, torchvision.py, transformers.py, perceiver.py beside this file) replaces the one method that
attends; for Swin it also rolls, pads, partitions and goes back. Parameters, buffers, names, hooks, norms, MLP and
drop path are the library's, so a state_dict does not change, and giving the instance its old class back undoes
everything. No library is imported here: a family is written against attributes, and lists those that it `needs`.
"""

from __future__ import annotations

import warnings
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

CLASSES: dict[type[nn.Module], type[Accelerated]] = {}  # library's class -> the one made of it
ANNOUNCED: set[str] = set()  # why the library's own path ran; each reason is told once per process


class Accelerated(nn.Module):
    """What all families share."""

    needs: ClassVar[tuple[str, ...]]  # attributes that are used; "a.b" is b of a
    dropout_at: ClassVar[str]  # where the library keeps its attention dropout, which is left to the library
    dropout_why: ClassVar[str] = "the kernel has none"
    skipped: ClassVar[tuple[str, ...]] = ()  # submodules that are no longer called, "a.b" likewise
    function: ClassVar[str] = "window_attention"  # that computes the attention
    unmade: ClassVar[str] = "windows"  # what is not made, for which a hook might wait
    family: ClassVar[type[Accelerated]]
    library: ClassVar[Any]  # the library's class
    attention_backend: str

    def takes_library_path(self, asked: str | None = None) -> bool:
        """Whether this call runs the library's own code: for what the call `asked`, or for what was changed since.

        A reason that has not been told yet is told by a warning, but not from compiled code, which cannot warn.
        """
        why = asked or self._changed()
        if why is None:
            return False
        message = (
            f"{self.library.__name__} was accelerated, but {why}: the library's own attention runs instead"
        )
        if message not in ANNOUNCED and not torch.compiler.is_compiling():
            ANNOUNCED.add(message)
            warnings.warn(message, stacklevel=3)
        return True

    def _changed(self) -> str | None:
        if self.training and attrgetter(self.dropout_at)(self) > 0:
            return "attention dropout has been switched on"
        for name in self.skipped:
            if hooked(attrgetter(name)(self)):  # get_submodule takes several times as long
                return f"a hook on its {name!r} waits for {self.unmade}, which are not made here"
        return None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time, so copies and pickles name its two parents and make it again."""
        made: Any = super().__reduce_ex__(protocol)  # (function, its arguments, state, ...)
        return _blank, (self.family, self.library), *made[2:]


def accelerated_class(family: type[Accelerated], library: type[nn.Module]) -> type[Accelerated]:
    """The one class with `family` before `library`."""
    if library not in CLASSES:
        body = {"family": family, "library": library, "__module__": __name__, "__doc__": family.__doc__}
        CLASSES[library] = type(f"Accelerated{library.__name__}", (family, library), body)
    return CLASSES[library]


def _blank(family: type[Accelerated], library: type[nn.Module]) -> Accelerated:
    """A module without its state, which copy and pickle then fill in."""
    made = accelerated_class(family, library)
    return made.__new__(made)


def plain(projection: nn.Module) -> bool:
    """Whether it is x @ weight.T + bias and nothing else: no adapter, no hook, no quantised weight."""
    bare = type(projection) is nn.Linear and not hooked(projection)
    return bare and type(projection.weight) in (nn.Parameter, Tensor)


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than the forward of its class: hooks, or a forward of the instance's own, which is
    how Hugging Face's accelerate adds its hooks."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
