"""Linear cross-entropy: the loss of a vocabulary's logits, and the gradients of what they are made from.

"plain" is what most models do: all logits, in float32 from there on, and F.cross_entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from bench import work
from bench.measure import random_like
from bench.peers.compiling import compiled_for_gpu
from bench.subject import TRAINING, Absent, Function, Peer, Subject
from bench.work import Work


@dataclass(frozen=True)
class LossCase:
    """Tokens of some width over a vocabulary; one in sixteen has no target."""

    name: str
    tokens: int
    width: int
    vocabulary: int

    @property
    def shape(self) -> str:
        """For readers."""
        return f"{self.tokens:,} tokens x {self.width:,}, vocabulary {self.vocabulary:,}"

    def inputs(self, device: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        """hidden [M, H], weight [V, H], whose logits have a standard deviation of 2, and targets [M]."""
        hidden = random_like(torch.empty(self.tokens, self.width, device=device, dtype=dtype), seed)
        weight = random_like(
            torch.empty(self.vocabulary, self.width, device=device, dtype=dtype), seed + 10_000
        )
        generator = torch.Generator(device).manual_seed(seed)
        targets = torch.randint(self.vocabulary, (self.tokens,), generator=generator, device=device)
        targets[::16] = -100
        return {"hidden": hidden, "weight": weight * (2 * self.width**-0.5), "targets": targets}

    def work(self, mode: str, dtype: torch.dtype) -> Work:
        """See work.py."""
        return work.linear_cross_entropy(
            self.tokens, self.width, self.vocabulary, dtype.itemsize, backward=mode == TRAINING
        )


def _ours(backend: str) -> Peer:
    def build(case: LossCase, device: str, dtype: torch.dtype) -> Function:
        return lambda hidden, weight, targets: kernels.linear_cross_entropy(
            hidden, weight, targets, backend=backend
        )

    return Peer(backend, build, ours=True)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The textbook; float64 stays float64."""
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets)


def _plain(case: LossCase, device: str, dtype: torch.dtype) -> Function:
    return plain


def _compiled(case: LossCase, device: str, dtype: torch.dtype) -> Function:
    return compiled_for_gpu(plain, device)


def _liger(case: LossCase, device: str, dtype: torch.dtype) -> Function:
    if find_spec("liger_kernel") is None:
        raise Absent("liger_kernel is not installed")
    if device == "cpu":
        raise Absent("it runs on CUDA devices")
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda hidden, weight, targets: LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, targets
    )[0]


LINEAR_CROSS_ENTROPY = Subject(
    "linear_cross_entropy",
    (
        *map(_ours, ("auto", "reference", "eager", "liger")),
        Peer("plain", _plain, note="all logits, F.cross_entropy"),
        Peer("compiled", _compiled, note="the textbook, compiled; compile time is not counted"),
        Peer("liger-own", _liger, note="Liger's own autograd function"),
    ),
    exact="plain",
    plain=("plain",),
)
