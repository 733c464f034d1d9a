"""Operators that torch.compile does not look into, with little time spent on the way to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

DEVICES = ("cpu", "cuda")
LIBRARIES: dict[str, torch.library.Library] = {}  # each operator's registrations last as long as its library


def operator(
    name: str,
    fake: Callable[..., Any],
    derivative: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function of tensors the operator `auroraio::name`, whose results' shapes `fake` gives. derivative: backward
    and setup_context as for torch.library.register_autograd; without it, to ask for one raises RuntimeError.

    torch.library.custom_op does the same and more: it looks at every call for results that share memory with arguments,
    and that takes longer than the launch of a kernel. What is decorated here must not return an argument, a view of one, or
    one tensor twice. A module that is loaded again replaces its operators.
    """

    def make(function: Callable[..., Any]) -> Any:
        full = f"auroraio::{name}"

        def refuse(*_: Any) -> None:
            raise RuntimeError(f"{full} cannot be differentiated")

        if name in LIBRARIES:
            LIBRARIES.pop(name)._destroy()
        library = LIBRARIES[name] = torch.library.Library("auroraio", "FRAGMENT")
        schema = torch.library.infer_schema(function, mutates_args=())
        library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_kernel(full, DEVICES, function, lib=library)
        torch.library.register_fake(full, fake, lib=library)
        backward, setup_context = derivative or (refuse, None)
        torch.library.register_autograd(full, backward, setup_context=setup_context, lib=library)
        return getattr(torch.ops.auroraio, name).default

    return make
