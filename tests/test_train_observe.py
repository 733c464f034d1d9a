"""What a run shows of itself: utilisation in the metrics, a trace on request, Weights & Biases."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import Aurora
from tests.micro import MODEL, arguments, metric_lines
from train import cli, pretrain
from train.config import PretrainConfig, problems
from train.telemetry.utilization import device_rate, step_flops


class StandIn(ModuleType):
    """What a run asks of wandb; keeps what it was told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.told: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str]] = []
        self.finished = 0

    def init(self, **words: Any) -> StandIn:
        self.begun.append(words)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.told.append(values)

    def finish(self) -> None:
        self.finished += 1


def test_a_run_logs_profiles_and_goes_on_in_the_same_wandb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = StandIn()
    wandb.__spec__ = sys.__spec__  # find_spec asks for one
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    out = tmp_path / "run"
    observed = ("--wandb", "pictures", "--profile", "2", "3")
    assert pretrain.main(arguments(out, "--steps", "4", *observed)) == 0
    said = capsys.readouterr().out

    train = metric_lines(out)
    assert all(0 < line["mfu"] < 1 for line in train)
    assert {"grad_norm", "images_per_second", "data_wait", "peak_memory"} <= set(train[0])
    line = next(line for line in said.splitlines() if line.startswith("step 4/4"))
    assert "MFU" in line and "gradient" in line and "GB" in line and "data wait" in line
    trace = out / "profile" / "steps-2-3.rank-0.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::linear" for event in events) > 20 and str(trace) in said

    assert pretrain.main(arguments(out, "--steps", "6", *observed, "--resume", "auto")) == 0
    first, second = wandb.begun
    assert first["id"] == second["id"] == json.loads((out / "wandb.json").read_text())["id"]
    assert (first["project"], first["resume"], first["config"]["steps"]) == ("pictures", "allow", 4)
    assert ("*", "step") in wandb.metrics and wandb.finished == 2
    losses = [told["loss/total"] for told in wandb.told if "loss/total" in told]
    assert losses == [line["loss"] for line in metric_lines(out)] and len(losses) == 6
    assert any("heldout/R@1" in name or name.startswith("heldout/") for told in wandb.told for name in told)


def test_wandb_that_is_not_installed_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("train.config.find_spec", lambda name: None)
    (said,) = problems(PretrainConfig(wandb="pictures"))
    assert "pip install 'auroraio[wandb]'" in said


@pytest.mark.parametrize("steps", ["3", "5 4", "0 2", "1 2 3"])
def test_profile_wants_two_steps(steps: str) -> None:
    config = cli.parse(["aurora-tiny", "--profile", *steps.split()])
    assert config is not None
    (said,) = problems(config)
    assert said.startswith("profile is [") and "--profile 10 12" in said


def test_step_flops_are_those_of_torchs_counter() -> None:
    """The utilisation's numerator, against torch's counter over the encoder's own matrix products on the CPU."""
    config = PretrainConfig(model=MODEL, batch_size=8)
    model = Aurora(MODEL)
    pictures = torch.randn(8, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model.pixels(model.encoder(pictures, torch.zeros(8, 1, 1, dtype=torch.bool))[3]).sum().backward()
    # The bias tables' small networks work once per micro-batch, not per sample, and are left out.
    with FlopCounterMode(display=False) as tables:
        for stage in model.encoder.stages:
            for block in stage.blocks:
                size = (block.attention.window,) * 2
                block.attention.relative_bias(size).sum().backward()
    expected = counter.get_total_flops() - tables.get_total_flops()
    assert step_flops(config, {"uncaptioned": 1.0}, 1) == pytest.approx(expected, rel=1e-6)


def test_a_cpu_is_measured_and_an_unknown_gpu_has_no_rate() -> None:
    rate = device_rate(torch.device("cpu"), bf16=False)
    assert rate is not None and 1e9 < rate < 1e13
