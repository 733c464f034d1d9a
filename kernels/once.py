"""Derivatives that can be taken once: a second one is refused, never left out."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def once_differentiable(function: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For the backward of an autograd.Function under `function`, its public name: RuntimeError where a graph of this very
    pass is asked for (create_graph=True).

    torch's decorator of this name refuses later, in a node that leads to no input: of a loss plus a penalty on its
    gradients, torch.autograd.grad leaves the penalty's share out without a word.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def wrapper(*args: Any) -> Any:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(f"{function}: only backend 'reference' can be differentiated twice")
            with torch.no_grad():
                return backward(*args)

        return wrapper

    return decorate
