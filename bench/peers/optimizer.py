"""A clipped optimizer step: global norm, scaling down, AdamW, over gradients that are there.

"plain" is torch.nn.utils.clip_grad_norm_ and then torch's fused AdamW.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from bench import work
from bench.measure import random_like
from bench.subject import Absent, Function, Peer, Subject
from bench.work import Work
from train.config import ConfigError, OptimConfig
from train.optimizers import build_optimizer, clip_and_step

CLIP, LR = 1.0, 1e-4


@dataclass(frozen=True)
class OptimizerCase:
    """Layers of a text model: per layer four square matrices, two of the feed-forward, and four vectors."""

    name: str
    layers: int
    width: int

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of all parameters."""
        w = self.width
        return [(3 * w, w), (w, w), (4 * w, w), (w, 4 * w), (w,), (w,), (w,), (w,)] * self.layers

    @property
    def parameters(self) -> int:
        """How many numbers they have."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def shape(self) -> str:
        """For readers."""
        return f"{self.parameters / 1e6:.1f}M parameters in {len(self.shapes)} tensors, clipped at {CLIP}"

    def inputs(self, device: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        """All gradients in one piece, far longer than the limit."""
        return {
            "gradient": random_like(torch.empty(self.parameters, device=device, dtype=dtype), seed) * 0.01
        }

    def work(self, mode: str, dtype: torch.dtype) -> Work:
        """See work.py."""
        return work.optimizer_step(self.parameters, dtype.itemsize)


class Stepped(nn.Module, ABC):
    """Called, it makes one step and gives all parameters; `step` is what is timed."""

    def __init__(self, case: OptimizerCase, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        start = 0.1 * _start(case.parameters).to(device, dtype)
        sizes = [torch.Size(shape).numel() for shape in case.shapes]
        pieces = zip(start.split(sizes), case.shapes, strict=True)
        self.tensors = nn.ParameterList(nn.Parameter(piece.view(shape).clone()) for piece, shape in pieces)
        self.sizes = sizes

    def forward(self, gradient: Tensor) -> Tensor:
        """[parameters] after a step with a copy of `gradient` [parameters]."""
        self.step(gradient.clone())
        return torch.cat([p.detach().flatten() for p in self.tensors])

    def step(self, gradient: Tensor) -> None:
        """One step; the gradients may be overwritten, as torch's own clipping does."""
        for p, piece in zip(self.tensors, gradient.split(self.sizes), strict=True):
            p.grad = piece.view(p.shape)
        self.update()

    @abstractmethod
    def update(self) -> None:
        """Clip and step."""


class Ours(Stepped):
    """train.optimizers."""

    def __init__(self, case: OptimizerCase, device: str, dtype: torch.dtype, kind: str) -> None:
        super().__init__(case, device, dtype)
        config = OptimConfig(kind=kind, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)  # type: ignore[arg-type]
        self.optimizer = build_optimizer(self, config, torch.device(device)).optimizer
        self.healthy = torch.tensor(True, device=device)

    def update(self) -> None:
        """As train/engine.py does it."""
        clip_and_step(self.optimizer, LR, CLIP, self.healthy)


class Theirs(Stepped):
    """torch's two calls."""

    def __init__(self, case: OptimizerCase, device: str, dtype: torch.dtype) -> None:
        super().__init__(case, device, dtype)
        self.optimizer = torch.optim.AdamW(
            self.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    def update(self) -> None:
        """clip_grad_norm_, then step."""
        nn.utils.clip_grad_norm_(self.parameters(), CLIP)
        self.optimizer.step()


@cache
def _start(count: int) -> Tensor:
    return random_like(torch.empty(count), 7)


def _ours(kind: str) -> Peer:
    def build(case: OptimizerCase, device: str, dtype: torch.dtype) -> Function:
        try:
            return Ours(case, device, dtype, kind)
        except ConfigError as error:
            raise Absent(str(error)) from None

    return Peer(kind, build, ours=True)


def _apex(case: OptimizerCase, device: str, dtype: torch.dtype) -> Function:
    if find_spec("apex") is None:
        raise Absent("apex is not installed")
    return Ours(case, device, dtype, "apex")


OPTIMIZER_STEP = Subject(
    "optimizer_step",
    (
        _ours("torch"),
        Peer("apex", _apex, note="NVIDIA's FusedAdam behind our clipping"),
        Peer("plain", Theirs, note="clip_grad_norm_, torch's fused AdamW"),
    ),
    exact="plain",
    plain=("plain",),
)
