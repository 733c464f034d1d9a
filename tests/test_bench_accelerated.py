"""What the benchmark measures of `kernels.accelerate`, and of attention by dot products: small, and without a clock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.cases import swin
from bench.peers.accelerated import (
    ACCELERATED_ATTENTION,
    ACCELERATED_STEP,
    AttentionCase,
    ModelCase,
)
from bench.peers.window import WINDOW_ATTENTION, WindowCase
from bench.record import Row
from bench.subject import FORWARD, STEP, TRAINING, Problem, Subject, solve
from kernels.window_attention import op

DOTS = WindowCase("dots", 2, 8, 12, 2, 16, 4, 2, cosine=False)
ON_A_GPU = {"compiled": "compiled for GPUs alone", "triton": "backend 'triton' cannot run this call"}

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs a machine without CUDA: it says what a CPU cannot do"
)


def solved(subject: Subject, case: Any, mode: str, dtype: torch.dtype, **options: Any) -> dict[str, Row]:
    rows = solve(subject, Problem(case, mode, dtype), "cpu", budget=0.0, fewest=1, **options)
    return {row.peer: row for row in rows}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [DOTS, replace(DOTS, name="dots-odd", height=9)], ids=lambda case: case.name)
def test_all_compute_dot_products_by_the_case_s_scale(case: WindowCase, dtype: torch.dtype, timm) -> None:
    assert set(case.inputs("cpu", dtype, 0)) == {"qkv", "bias"}
    rows = solved(WINDOW_ATTENTION, case, TRAINING, dtype)
    absent = ON_A_GPU | {"flex": "no backward on a CPU"}
    if case.height % case.window:
        absent |= {"timm": "timm lets its padding take part"}
    assert {p: r.note for p, r in rows.items() if r.status not in ("ok", "absent")} == {}
    assert {p for p, r in rows.items() if r.status == "absent"} == set(absent)
    assert all(part in rows[peer].note for peer, part in absent.items())


def test_whoever_ignores_the_scale_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real, usual = op.BACKEND_FUNCTIONS["eager"], DOTS.head_dim**-0.5
    monkeypatch.setitem(op.BACKEND_FUNCTIONS, "eager", lambda *args: real(*args[:-1], usual))
    rows = solved(WINDOW_ATTENTION, DOTS, FORWARD, torch.float32, peers=("eager", "plain"))
    assert (rows["eager"].status, rows["plain"].status) == ("wrong", "ok")


def test_shapes_of_published_models() -> None:
    """Swin-B at 224 pixels: maps of 56, 28, 14, 7; the last is one window, and is not shifted."""
    stages = [swin("b", number, 1) for number in (1, 2, 3, 4)]
    assert [(c.height, c.heads, c.shift) for c in stages] == [(56, 4, 3), (28, 8, 3), (14, 16, 3), (7, 32, 0)]
    assert not any(c.cosine for c in stages) and swin("b", 3, 1, version=2, window=16).cosine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cosine", [False, True], ids=["swin", "swinv2"])
def test_an_accelerated_layer_computes_what_timm_s_does(cosine: bool, dtype: torch.dtype, timm) -> None:
    case = AttentionCase("small", 2, 9, 8, 2, 16, 4, 2, cosine=cosine)  # timm's padding, too
    rows = solved(ACCELERATED_ATTENTION, case, TRAINING, dtype)
    assert {p: r.note for p, r in rows.items() if r.status not in ("ok", "absent")} == {}
    assert {p for p, r in rows.items() if r.status == "absent"} == set(ON_A_GPU)
    assert all(part in rows[peer].note for peer, part in ON_A_GPU.items())
    assert [pair.peer for pair in rows["accelerated"].paired] == ["timm"]


def test_an_accelerated_model_takes_training_steps(timm) -> None:
    case = ModelCase("swin_tiny_patch4_window7_224", 224, 1)
    rows = solved(ACCELERATED_STEP, case, STEP, torch.float32)
    assert rows["accelerated"].status == rows["timm"].status == "ok"
    assert rows["timm"].flops == pytest.approx(
        3 * 2 * 4.5e9, rel=0.05
    )  # 4.5 G multiply-adds forward, as published


def test_work_of_a_layer_is_what_torch_counts(timm) -> None:
    case = AttentionCase("small", 2, 8, 8, 2, 16, 4, 0, cosine=False)
    layer = ACCELERATED_ATTENTION.peer("timm").build(case, "cpu", torch.float32)
    with FlopCounterMode(display=False) as counter:
        layer(**case.inputs("cpu", torch.float32, 0))
    assert case.work(FORWARD, torch.float32).flops == counter.get_total_flops()
