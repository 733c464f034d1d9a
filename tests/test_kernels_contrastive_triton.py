"""The Triton kernels of the contrastive loss; see interpreter.py for where they run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreter import interpreter as interpreter
from interpreter import on_each_device
from test_kernels_contrastive_loss import KINDS, check, inputs, ours, results, variations
from torch import Tensor

from kernels import explain
from kernels.contrastive_loss import op

triton = pytest.importorskip("triton", reason="needs Triton, which is for Linux: pip install 'triton>=3.6'")
pytestmark = pytest.mark.usefixtures("interpreter")


def some(*args: Any, device: str, **more: Any) -> list[Tensor]:
    return [t.to(device) for t in inputs(*args, **more)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pairs", "width", "captions"), [(97, 59, 1), (33, 64, 3), (17, 1023, 1), (2, 1, 1)])
@on_each_device
def test_exact(device: str, pairs: int, width: int, captions: int, kind: str, dtype: torch.dtype) -> None:
    check(some(pairs, width, captions, dtype, device=device), kind, "triton")


@on_each_device
def test_one_pair_has_nothing_to_learn_from_softmax(device: str) -> None:
    """Loss and gradients are 0; plain PyTorch finds just that, so the rule would allow nothing. Allowed: eight roundings
    of the logit, which is as large as the scale."""
    given = some(1, 5, device=device)
    found = results(ours("softmax", "triton"), given)
    allowed = 8 * torch.finfo(torch.float32).eps * given[2].exp().item()
    assert all(value.abs().max() < allowed for value in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@on_each_device
def test_in_chunks(device: str, kind: str, dtype: torch.dtype) -> None:
    """Several chunks, an uneven last one: fp32 adds up, half types go through the texts too. The same bits twice."""
    from kernels.contrastive_loss import triton_problem

    given = some(70, 32, 2, dtype, 4.6, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_problem, "CHUNK_BYTES", 33 * 140 * dtype.itemsize)
        patch.setattr(triton_problem, "SUM_ROWS", 40)
        first, second = check(given, kind, "triton"), variations(ours(kind, "triton"), given)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
@on_each_device
def test_the_second_of_two_ranks(device: str, kind: str) -> None:
    """These images are the last third of all: what the operator does for a rank, in fp32 and through the texts."""
    from kernels.contrastive_loss import eager, triton_problem

    for dtype in (torch.float32, torch.float16):
        image, text, scale, bias = some(36, 16, 2, dtype, device=device)
        found = []
        for way in (eager, triton_problem):
            problem: Any = way.Problem(image[24:], text, scale.exp(), 2, 24)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(triton_problem, "CHUNK_BYTES", 7 * 72 * 4)
                if kind == "sigmoid":
                    found.append(way.sigmoid(problem, bias, True)[1])
                else:
                    softmax = way.Softmax(problem)
                    rows, columns, _ = softmax.normalizers(True)
                    found.append(softmax.grads(rows, columns + 0.3))
        for one, other in zip(*found, strict=True):
            near = 1e-5 if dtype == torch.float32 else 2e-3
            torch.testing.assert_close(
                other.double(), one.double(), rtol=near, atol=near * one.abs().max().item()
            )


@on_each_device
def test_is_part_of_torch(device: str) -> None:
    image, text, scale, bias = some(5, 8, device=device)
    call = torch.ops.auroraio.contrastive_loss.default
    for sigmoid in (False, True):
        leaves = [t.detach().requires_grad_() for t in (image, text, scale, bias)]
        torch.library.opcheck(call, (*leaves, sigmoid, "", True, True))
    with torch.no_grad():
        for kind in KINDS:
            assert torch.isfinite(ours(kind, "triton")(image, text, scale, bias))


@on_each_device
def test_double_is_refused(device: str) -> None:
    given = some(3, 8, dtype=torch.float64, device=device)
    assert "float32 at most" in explain(op.contrastive_loss, *given).others["triton"]
