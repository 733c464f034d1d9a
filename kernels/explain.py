"""Questions about the backends: which one would run a call, and which there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.backend import BACKENDS, Choice, triton_refusal
from kernels.contrastive_loss import op as contrastive
from kernels.latent_attention import flash_ops
from kernels.latent_attention import op as latent
from kernels.linear_cross_entropy import liger
from kernels.linear_cross_entropy import op as linear
from kernels.window_attention import op as window

EXPLAINERS: dict[Callable[..., Any], Callable[..., Choice]] = {
    window.window_attention: window.explain,
    latent.latent_attention: latent.explain,
    contrastive.contrastive_loss: contrastive.explain,
    linear.linear_cross_entropy: linear.explain,
}
# The backends of functions that are no attention.
NAMES: dict[Callable[..., Any], tuple[str, ...]] = {
    contrastive.contrastive_loss: contrastive.NAMES,
    linear.linear_cross_entropy: linear.NAMES,
}


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Which backend `fn(*args, **kwargs)` would run, and why not the others. Nothing is computed.

    Tensors may be on the meta device. The arguments are checked as the call itself checks them, with the
    same errors; only a named backend that cannot run the call is told in the answer instead of raised.

        print(kernels.explain(kernels.window_attention, qkv, window=7))
    """
    if fn not in EXPLAINERS:
        names = ", ".join(known.__name__ for known in EXPLAINERS)
        raise ValueError(
            f"explain: {getattr(fn, '__name__', fn)!r} has no backends to choose from; supported: {names}"
        )
    return EXPLAINERS[fn](*args, **kwargs)


def available_backends() -> dict[str, dict[str, str | None]]:
    """function -> backend -> None where it can run on this machine, else why it cannot."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = {"triton": triton_refusal(device), "liger": liger.refusal(device, torch.float32)}
    own: dict[Callable[..., Any], dict[str, str | None]] = {
        window.window_attention: {**window.NEVER},
        latent.latent_attention: {"flash_attn": flash_ops.machine_refusal(device)},
    }
    found = {}
    for fn in EXPLAINERS:
        refusals = machine | own.get(fn, {})
        found[fn.__name__] = {name: refusals.get(name) for name in NAMES.get(fn, BACKENDS)}
    return found
