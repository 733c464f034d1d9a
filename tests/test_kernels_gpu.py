"""The functions on a CUDA device: every backend, half and full precision, forward and gradients.

What is exact, and what error is ordinary, is the benchmark's rule (bench/numerics.py): the reference in fp64, and
plain PyTorch in the same dtype.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from bench.peers.contrastive import CONTRASTIVE_LOSS, ContrastiveCase
from bench.peers.latent import LATENT_ATTENTION, LatentCase
from bench.peers.linear_ce import LINEAR_CROSS_ENTROPY, LossCase
from bench.peers.window import WINDOW_ATTENTION, WindowCase
from bench.record import Row
from bench.subject import FORWARD, TRAINING, Problem, Subject, solve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CASES: list[tuple[Subject, Any]] = [
    (WINDOW_ATTENTION, WindowCase("window-7", 2, 28, 28, 3, 32, 7, 3)),
    (WINDOW_ATTENTION, WindowCase("window-14", 2, 28, 28, 2, 64, 14, 0)),
    (WINDOW_ATTENTION, WindowCase("odd-map", 2, 29, 23, 2, 32, 12, 5)),
    (LATENT_ATTENTION, LatentCase("97-keys", 3, 64, 97, 4, 64)),
    (LATENT_ATTENTION, LatentCase("ragged", 4, 33, 1025, 2, 128, ragged=True)),
    (LATENT_ATTENTION, LatentCase("one-query", 8, 1, 196, 4, 32)),
    (CONTRASTIVE_LOSS, ContrastiveCase("softmax-1025", "softmax", 1025, 96)),
    (CONTRASTIVE_LOSS, ContrastiveCase("sigmoid-97", "sigmoid", 97, 59)),
    (LINEAR_CROSS_ENTROPY, LossCase("few-tokens", 301, 64, 1009)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
@pytest.mark.parametrize(("subject", "case"), CASES, ids=lambda value: value.name)
def test_every_backend_is_exact(subject: Subject, case: Any, mode: str, dtype: torch.dtype) -> None:
    """In one of three draws of the inputs: among few numbers plain PyTorch's largest error is luck, and a correct kernel is
    now and then some percent over twice that; a wrong one is off in every draw."""
    ours = [peer.name for peer in subject.peers if peer.ours]
    bad: dict[str, list[str]] = {}
    for draw in range(3):
        rows = solve(
            subject, Problem(case, mode, dtype), "cuda", budget=0.0, peers=ours, fewest=1, seed=1000 * draw
        )
        assert [row.peer for row in rows] == ours
        for row in rows:
            bad.setdefault(row.peer, []).extend(
                [row.note] * (row.status != "ok" and not is_rounding(row, dtype))
            )
    flash = bad.pop("flash_attn", [])  # optional packages; FlashAttention is for half types alone
    liger = bad.pop("liger", [])
    assert all("not installed" in note or dtype == torch.float32 for note in flash)
    assert len(liger) < 3 or all("needs Liger-Kernel" in note for note in liger)
    assert {peer: notes for peer, notes in bad.items() if len(notes) == 3} == {}


def is_rounding(row: Row, dtype: torch.dtype) -> bool:
    """Whether a result in float32 is off by some roundings alone, whatever plain PyTorch's luck was."""
    found = re.match(r"\w+: largest error \S+ \(allowed \S+\), relative (\S+)", row.note)
    eps = torch.finfo(torch.float32).eps
    return dtype == torch.float32 and found is not None and float(found[1]) <= 8 * eps
