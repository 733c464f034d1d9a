"""python -m bench.steps: one rank's share against a whole engine, the usual window attention against the project's, the
command's rehearsal, and what the plan makes of its rows."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.steps import child, planned, timing
from bench.steps.__main__ import Program
from bench.steps.cases import CASES, STEP, rehearsed, smaller
from bench.steps.plain import attention
from bench.steps.share import RankShare, model_on
from bench.steps.trace import group_of, summed
from tests.micro import MODEL, ROOT
from train.config import PretrainConfig
from train.devices import PEAKS
from train.engine import Ranks, TorchEngine
from train.machine import Precision
from train.plan.batches import batch_of
from train.plan.calibration import Row, reached_by
from train.plan.measure import filled

MICRO = PretrainConfig(model=replace(MODEL, decoder_dropout=0.0), batch_size=8, accumulation=2, steps=100)
CPU, FP32 = torch.device("cpu"), Precision("fp32", "")


def share(of: int) -> RankShare:
    torch.manual_seed(0)
    return RankShare(model_on(MICRO, CPU, torch.float32), MICRO, CPU, FP32, of)


def batch() -> Any:
    torch.manual_seed(1)
    return filled(batch_of(MICRO, {"pair": 3, "uncaptioned": 1}))


def test_all_of_one_rank_is_the_whole_engine() -> None:
    torch.manual_seed(0)
    whole = TorchEngine(model_on(MICRO, CPU, torch.float32), MICRO, CPU, FP32, Ranks(0, 0, 1))
    one = share(1)
    for _ in range(2):
        a, b = (child.optimizer_step(engine, batch(), 2) for engine in (whole, one))
        assert a.loss == pytest.approx(b.loss, rel=1e-6) and a.grad_norm == pytest.approx(
            b.grad_norm, rel=1e-5
        )
    for (name, p), q in zip(whole.model.named_parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def test_a_part_is_updated_and_nothing_else_is_kept() -> None:
    one = share(4)
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    child.optimizer_step(one, batch(), 2)
    moved = 0
    for name, p in one.model.named_parameters():
        n = one.shards[name].values.numel()
        same = p.detach().view(-1) == before[name].view(-1)
        assert bool(same[n:].all()), name
        moved += int((~same[:n]).sum())
        assert p.grad is None and one.own_parameters[name].grad is None
    assert moved > 0
    held = sum(
        m.numel() for state in one.optimizer.state.values() for k, m in state.items() if k == "exp_avg"
    )
    total = sum(p.numel() for p in before.values())
    assert held < 0.27 * total


def test_the_usual_attention_is_the_same_function() -> None:
    losses = []
    for name in ("ours", "timm-style"):
        with attention(name):
            losses.append(child.optimizer_step(share(1), batch(), 1))
    assert losses[0].loss == pytest.approx(losses[1].loss, rel=1e-5)
    assert losses[0].grad_norm == pytest.approx(losses[1].grad_norm, rel=1e-3)


def test_a_smaller_micro_batch_keeps_the_step() -> None:
    case = CASES["aurora-xl"]
    less = smaller(case)
    assert less is not None and less.samples * less.accumulation == case.samples * case.accumulation
    one = replace(case, samples=1)
    assert smaller(one) is None


def test_out_of_memory_is_a_row_and_fewer_samples_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = child.engine_of, []

    def full(case: Any, device: torch.device) -> TorchEngine:
        tried.append(case.samples)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(replace(case, preset="aurora-tiny"), device)

    monkeypatch.setattr(child, "engine_of", full)
    monkeypatch.setattr(timing, "ROUNDS", 1)
    case = replace(rehearsed(CASES["aurora-xl"]), samples=2, accumulation=1)
    assert child.run(case, tmp_path / "row.json", 30) == 0
    row = json.loads((tmp_path / "row.json").read_text())
    assert (
        tried == [2, 1]
        and row["samples"] == 1
        and row["status"] == "ok"
        and "out of memory" in row["notes"][0]
    )


def test_the_command_rehearses_a_row(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.steps", "--out", str(tmp_path), "--rehearse", "--minutes", "1"]
    done = subprocess.run(
        [*command, "--only", "perceiver-xl-latent"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert row["status"] == "ok" and row["variants"]["forward"]["mfu"] > 0
    assert "rehearsal" in (tmp_path / "report.md").read_text()
    refused = subprocess.run([*command[:5], "--only", "aurora-xl"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "no CUDA device" in refused.stderr


def test_rows_without_figures_are_in_the_page(tmp_path: Path) -> None:
    program = Program([CASES["aurora-xl"], CASES["perceiver-xl"]], tmp_path, 1.0, False)
    (tmp_path / "plans.json").write_text(json.dumps({"aurora-xl": {"samples": 4}}))
    for case in program.cases:
        program.row(case)  # there is no second to begin it
    program.rows[1] |= {"status": "failed (exit status 1)", "error": "ValueError: planted"}
    assert program.finish() == 1
    text = (tmp_path / "report.md").read_text()
    assert "not begun" in text and "ValueError: planted" in text
    assert json.loads((tmp_path / "plan.json").read_text())["rows"] == []


def test_a_profile_counts_what_overlaps_once() -> None:
    found = summed([("gemm", 0, 10), ("layer_norm", 5, 10), ("memcpy", 20, 20)])
    assert found["idle share"] == pytest.approx(5 / 40) and found["groups"]["matrix products"] == 1e-8
    assert group_of("whole_forward_kernel") == "window attention"
    assert group_of("nvjet_tst_128x256") == "matrix products"
    assert group_of("multi_tensor_apply_kernel<FusedAdamMathFunctor>") == "optimizer"


def test_latents_flops_are_the_plans() -> None:
    case = rehearsed(CASES["perceiver-xl"])
    config: Any = case.config
    n = config.model.image_grid[0] * config.model.image_grid[1]
    from train.plan.arithmetic import flops_of

    # Half of a sample is read with its text: 12 more rows of the average sample's inputs.
    plan = flops_of(replace(config, objectives=replace(config.objectives, masked_share=0.0)), "image-text")
    assert child.latent_flops(config, n) == pytest.approx(plan.forward["latents"], rel=1e-9)


def test_measured_steps_calibrate_the_plan() -> None:
    peak = next(one for one in PEAKS if one.name == "H200")
    row = {
        "name": "aurora-xl", "title": CASES["aurora-xl"].title, "kind": STEP, "samples": 4, "device": "NVIDIA H200",
        "precision": "bf16", "matmul": 7e14,
        "variants": {"ours": {"peak": 9e9, "before": 8e9, "seconds": 2.0, "flops": 0.4 * 2.0 * peak.bf16}},
    }  # fmt: skip
    plans = {"aurora-xl": {"samples": 4, "above": 1.1e9, "floor": 1.0}}
    (made,) = (Row(**one) for one in planned.calibration([row], plans))
    assert made.memory == pytest.approx(1.1) and made.reached == 0.5
    assert reached_by([made], "aurora-xl", peak, True, 8) == (pytest.approx(0.4), 4)
    assert reached_by([made], "aurora-xl", peak, False, 4) == (0.0, 0)
    assert reached_by([made], "aurora-xl", PEAKS[0], True, 4) == (0.0, 0)
    larger = replace(made, case=made.case.replace("4 samples", "32 samples"), measured_seconds=1.0)
    assert reached_by([made, larger], "aurora-xl", peak, True, 16) == (pytest.approx(0.8), 32)
    assert reached_by([made, larger], "aurora-xl", peak, True, 2) == (pytest.approx(0.4), 4)
