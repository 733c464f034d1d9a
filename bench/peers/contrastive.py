"""Contrastive losses of image-text pairs: this project's backends, the textbook, open_clip's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import work
from bench.measure import random_like
from bench.subject import TRAINING, Absent, Function, Peer, Subject
from kernels import contrastive_loss

LOG_SCALE, BIAS = 2.65926, -10.0  # where CLIP begins (1 / 0.07), and SigLIP


@dataclass(frozen=True)
class ContrastiveCase:
    """`pairs` unit vectors of each kind."""

    name: str
    kind: str  # "softmax" or "sigmoid"
    pairs: int
    width: int

    @property
    def shape(self) -> str:
        """For readers."""
        return f"{self.pairs:,} pairs of {self.width}, {self.kind}"

    def inputs(self, device: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        """image, text [N, D]; the log of the scale, and the bias, in fp32 beside rows of half types."""
        rows = [
            random_like(torch.empty(self.pairs, self.width, device=device), 2 * seed + i) for i in range(2)
        ]
        image = F.normalize(rows[0], dim=-1)
        text = F.normalize(image + F.normalize(rows[1], dim=-1), dim=-1)
        scalars = {"logit_scale": LOG_SCALE, "logit_bias": BIAS}
        return {"image": image.to(dtype), "text": text.to(dtype)} | {
            name: torch.tensor(value, device=device) for name, value in scalars.items()
        }

    def work(self, mode: str, dtype: torch.dtype) -> work.Work:
        """See work.contrastive_loss."""
        return work.contrastive_loss(self.pairs, self.width, dtype.itemsize, backward=mode == TRAINING)


def _ours(backend: str) -> Peer:
    def build(case: ContrastiveCase, device: str, dtype: torch.dtype) -> Function:
        def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            return contrastive_loss(image, text, scale, bias, kind=case.kind, backend=backend)  # type: ignore[arg-type]

        return loss

    return Peer(backend, build, ours=True)


def _plain(case: ContrastiveCase, device: str, dtype: torch.dtype) -> Function:
    """One matrix of logits, and cross-entropy along both of its sides (or log-sigmoids)."""
    own = torch.arange(case.pairs, device=device)

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits = (scale.exp() * (image @ text.T)).to(torch.promote_types(dtype, torch.float32))
        if case.kind == "sigmoid":
            signs = 2 * torch.eye(case.pairs, device=device, dtype=logits.dtype) - 1
            return -F.logsigmoid(signs * (logits + bias)).sum() / case.pairs
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2 + 0 * bias

    return loss


def _open_clip(case: ContrastiveCase, device: str, dtype: torch.dtype) -> Function:
    try:
        losses = importlib.import_module("open_clip.loss")
    except ImportError as error:
        raise Absent(f"open_clip_torch cannot be imported ({error})") from None
    theirs: Callable[..., Tensor] = losses.ClipLoss() if case.kind == "softmax" else losses.SigLipLoss()

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        if case.kind == "softmax":
            return theirs(image, text, scale.exp().to(dtype)).to(wide) + 0 * bias
        return theirs(image, text, scale.exp().to(dtype), bias.to(dtype)).to(wide)

    return loss


CONTRASTIVE_LOSS = Subject(
    "contrastive_loss",
    (
        *map(_ours, ("auto", "reference", "eager", "triton")),
        Peer("plain", _plain, note="F.cross_entropy of one matrix along both sides, or F.logsigmoid"),
        Peer("open_clip", _open_clip, note="ClipLoss, SigLipLoss"),
    ),
    exact="reference",
    plain=("plain", "reference"),
)
