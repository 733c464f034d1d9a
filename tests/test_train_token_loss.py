"""Training with linear_cross_entropy and with all logits at once: the same losses over a short run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from micro import MODEL
from torch import Tensor

from models import Aurora, objectives
from models.objectives import Normalizers, ObjectiveConfig
from models.tokens import IGNORE
from train.config import OptimConfig
from train.optimizers import build_optimizer, clip_and_step

STILL = dataclasses.replace(MODEL, decoder_dropout=0.0)
OBJECTIVES = ObjectiveConfig(mim=0.0, itc=0.0, label_smoothing=0.1)


def all_logits(x: Tensor, weight: Tensor, targets: Tensor, config: ObjectiveConfig) -> Tensor:
    """What token_loss was: fp32 logits of all tokens that have a target."""
    wanted = targets != IGNORE
    logits = F.linear(x[wanted], weight).float()
    loss = F.cross_entropy(logits, targets[wanted], label_smoothing=config.label_smoothing, reduction="sum")
    return loss + config.z_loss * logits.logsumexp(dim=-1).square().sum()


def run(steps: int) -> list[float]:
    """Losses of a captioning and masked-word model that learns eight captions."""
    torch.manual_seed(0)
    model = Aurora(STILL).train()
    optimizer = build_optimizer(model, OptimConfig(), torch.device("cpu")).optimizer
    images, tokens = torch.randn(8, 3, 32, 32), torch.randint(5, 300, (8, MODEL.text_length))
    targets = torch.where(torch.rand(tokens.shape) < 0.3, tokens, IGNORE)
    nothing = torch.empty(0, 3, 32, 32), torch.empty(0, 1, 1, dtype=torch.bool)
    normalizers = Normalizers.of(tokens, targets, nothing[1])
    found = []
    for _ in range(steps):
        losses = model(
            images, tokens, tokens, targets, *nothing, objectives=OBJECTIVES, normalizers=normalizers
        )
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        clip_and_step(optimizer, 1e-3, 1.0, torch.tensor(True))
        optimizer.zero_grad()
        found.append(total.item())
    return found


def test_losses_of_a_short_run_are_those_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = run(10)
    used = []
    monkeypatch.setattr(objectives, "token_loss", lambda *a: (used.append(1), all_logits(*a))[1])
    theirs = run(10)
    assert len(used) == 20 and theirs[-1] < theirs[0]
    assert ours == pytest.approx(theirs, rel=1e-5)
