"""The gate catches what is planted in an implementation, a slowdown of 1.3x and an error of 1%, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import gate
from bench.profiles import CPU_GATES, PROFILES, Gate, choose
from kernels.latent_attention import sdpa
from kernels.window_attention import op

BUDGET = 0.5  # CPU seconds per task
# Its limit leaves room for another machine, where the same code has 0.75; of the 0.60 to 0.67 here 1.3 times may be below it.
FOR_SEVERAL = "perceiver-tiny/forward/float32"
CPU = replace(PROFILES["cpu"], gates=CPU_GATES)


def implementation(subject: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """Put change(f) in the place of the f that "auto" takes on a CPU."""
    if subject == "latent_attention":
        monkeypatch.setattr(sdpa, "latent_attention", change(sdpa.latent_attention))
    else:
        monkeypatch.setitem(op.BACKEND_FUNCTIONS, "eager", change(op.BACKEND_FUNCTIONS["eager"]))


def subjects() -> list[str]:
    return sorted({g.subject for g in CPU_GATES})


def some(subject: str) -> Any:
    """The profile with the subject's gates alone."""
    return replace(CPU, gates=tuple(g for g in CPU_GATES if g.subject == subject))


@pytest.mark.slow
def test_clean_reruns_pass(timm) -> None:
    """Whatever else the machine does: this suite runs in several processes. (`make gate` is a further one, in CI.)"""
    failed = [str(v) for _ in range(2) for v in gate.run(CPU, BUDGET / 2)[1] if not v.holds]
    assert failed == []


BACKWARD_BEGAN: list[float] = []


class BeginBackward(torch.autograd.Function):
    """Stands behind the slowed function: its backward is the first to run."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        BACKWARD_BEGAN.append(time.process_time())
        return grad


class EndBackward(torch.autograd.Function):
    """Stands before it: its backward is the last."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        spin(0.3 * (time.process_time() - BACKWARD_BEGAN.pop()))
        return grad


def slower(function: Any) -> Any:
    """The function, 1.3 times as slow, forward and backward."""

    def slow(first: torch.Tensor, *others: Any) -> Any:
        start = time.process_time()
        out = BeginBackward.apply(function(EndBackward.apply(first), *others))
        spin(0.3 * (time.process_time() - start))
        return out

    return slow


@pytest.mark.parametrize("subject", ["window_attention", "latent_attention"])
def test_a_slowdown_of_1_3_is_caught(subject: str, monkeypatch: pytest.MonkeyPatch, timm) -> None:
    """By the limits that `make gate` has; that of FOR_SEVERAL is a sixth above what this machine has, where that is less."""
    profile = some(subject)
    wide = replace(profile, gates=tuple(g for g in profile.gates if g.task == FOR_SEVERAL))
    clean = {v.gate.task: v.ratio for v in gate.run(wide, BUDGET)[1]} if wide.gates else {}
    near = tuple(
        replace(g, limit=min(g.limit, 7 / 6 * (clean.get(g.task) or g.limit))) for g in profile.gates
    )
    implementation(subject, monkeypatch, slower)
    verdicts = gate.run(replace(profile, gates=near), BUDGET)[1]
    assert verdicts and not any(v.holds for v in verdicts), list(map(str, verdicts))
    assert all("times the limit" in v.why for v in verdicts)


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.mark.parametrize("subject", subjects())
def test_an_error_of_one_percent_is_caught(subject: str, monkeypatch: pytest.MonkeyPatch, timm) -> None:
    implementation(subject, monkeypatch, lambda whole: lambda *args: whole(*args) * 1.01)
    rows, verdicts = gate.run(some(subject), 0.0)
    assert verdicts and not any(v.holds for v in verdicts)
    ours = [row for row in rows if row.ours]
    assert ours and all(row.status == "wrong" and row.seconds == () for row in ours)  # no time to report
    assert all("is wrong: out: largest error" in v.why for v in verdicts)


def test_what_was_not_measured_does_not_hold() -> None:
    (verdict,) = gate.judge([Gate("s", "c/forward/float32", "auto", "plain", 2.0)], [])
    assert not verdict.holds and str(verdict).startswith("FAIL") and "the task was not run" in str(verdict)


def test_gates_name_tasks_and_peers_that_exist(timm) -> None:
    for profile in PROFILES.values():
        tasks = {(task.subject, task.name): task.peers for task in profile.tasks()}
        for g in profile.gates:
            assert {g.peer, g.against} <= set(tasks[g.subject, g.task]), g


def test_profiles_are_chosen_by_device() -> None:
    assert choose("auto", "cpu", "AMD EPYC").name == "cpu"
    assert choose("auto", "cuda", "NVIDIA A100-SXM4-80GB").name == "a100-bf16"
    assert choose("auto", "cuda", "NVIDIA H200").name == "h200-bf16"
    with pytest.raises(ValueError, match="no profile is called 'a100'; there are cpu, a100-bf16, h200-bf16"):
        choose("a100", "cuda", "NVIDIA A100-SXM4-80GB")
    with pytest.raises(ValueError, match="a100-bf16 is for a cuda device, and this machine has AMD"):
        choose("a100-bf16", "cpu", "AMD EPYC")


def test_what_fails_is_measured_again_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad moment is forgiven, a slowdown that stays is not."""
    asked: list[tuple[int, float]] = []
    gates = CPU.gates[:2]

    def measure(profile: Any, some: Any, budget: float) -> list[Any]:
        asked.append((len(some), budget))
        return []

    def judge(some: Any, rows: Any) -> list[gate.Verdict]:
        bad = {gates[0]: len(asked) == 1, gates[1]: True}
        return [gate.Verdict(g, 2.0 if bad[g] else 0.5, "4 times the limit" if bad[g] else "") for g in some]

    monkeypatch.setattr(gate, "_measure", measure)
    monkeypatch.setattr(gate, "judge", judge)
    _, verdicts = gate.run(replace(CPU, gates=gates), 0.5)
    assert asked == [(2, 0.5), (2, 2.0)]
    assert [v.holds for v in verdicts] == [True, False]
