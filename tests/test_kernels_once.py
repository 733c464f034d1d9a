"""A second derivative is right or an error: never a term that is missing."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import contrastive_loss, latent_attention, linear_cross_entropy, window_attention


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def latent(backend: str, **options: object) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return latent_attention(q, k, v, backend=backend, **options)  # type: ignore[arg-type, return-value]

    return call, (numbers(2, 3, 2, 4), numbers(2, 5, 2, 4), numbers(2, 5, 2, 4))


def packed(backend: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return latent_attention(q, k, v, cu_seqlens_k=offsets, backend=backend)  # type: ignore[return-value]

    return call, (numbers(2, 3, 2, 4), numbers(5, 2, 4), numbers(5, 2, 4))


def window(backend: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    def call(qkv: Tensor) -> Tensor:
        return window_attention(qkv, window=2, shift=1, backend=backend)

    return call, (numbers(1, 4, 4, 3, 2, 4),)


def contrastive(backend: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    def call(image: Tensor, text: Tensor) -> Tensor:
        return contrastive_loss(
            image, text, torch.tensor(1.0, dtype=torch.float64), kind="softmax", backend=backend
        )

    return call, (numbers(4, 3), numbers(4, 3) * 2)


def linear(backend: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    targets = torch.tensor([0, 3, 1])

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, backend=backend)

    return call, (numbers(3, 4), numbers(5, 4))


FUNCTIONS = {f.__name__: f for f in (latent, packed, window, contrastive, linear)}


def penalty(call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The gradients of a loss plus a penalty on its gradients: the form in which a missing term makes no noise."""
    loss = call(*inputs).square().sum()
    grads = torch.autograd.grad(loss, inputs, create_graph=True)
    return list(torch.autograd.grad(loss + sum(g.square().sum() for g in grads), inputs))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_right_or_refused(name: str, backend: str) -> None:
    if name in ("contrastive", "linear") and backend == "sdpa":
        backend = "auto"
    expected = penalty(*FUNCTIONS[name]("reference"))
    try:
        found = penalty(*FUNCTIONS[name](backend))
    except RuntimeError as error:
        assert re.search(
            "only backend 'reference' can be differentiated twice|is not implemented", str(error)
        )
        return
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reference_twice(name: str) -> None:
    call, inputs = FUNCTIONS[name]("reference")
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
