"""Timing, statistics, memory and the error rule of the benchmark, against closed forms and things of known size."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import measure, numerics, work
from bench.peaks import PEAKS, peak_of
from bench.peers import tokenizing
from bench.record import Ceilings, Paired, Row, Run, bound, fraction, load, median_interval, save
from bench.subject import TRAINING, Problem, pair_rows, results, worst

ROOT = Path(__file__).resolve().parent.parent
# NVIDIA's data sheets: dense bf16 TFLOP/s and memory bandwidth in GB/s.
SHEETS = {
    "A100-SXM4-80GB": (312, 2039),
    "A100-SXM4-40GB": (312, 1555),
    "A100 80GB PCIe": (312, 1935),
    "H200": (989, 4800),
    "H100 80GB HBM3": (989, 3350),
    "H100 PCIe": (756, 2048),
    "L40S": (362, 864),
    "RTX 4090": (165.2, 1008),
}


@pytest.mark.parametrize("peak", PEAKS, ids=lambda peak: peak.name)
def test_peaks_follow_from_the_chip_and_are_the_data_sheets(peak) -> None:
    tflops, gigabytes = SHEETS[peak.name]
    assert peak.bf16 / 1e12 == pytest.approx(tflops, rel=0.003)
    assert peak.bandwidth / 1e9 == pytest.approx(gigabytes, rel=0.003)
    assert peak_of(f"NVIDIA {peak.name}") is peak


def test_ridges_and_unknown_devices() -> None:
    assert peak_of("NVIDIA A100-SXM4-80GB").ridge == pytest.approx(153, abs=0.5)  # type: ignore[union-attr]
    assert peak_of("NVIDIA H200").ridge == pytest.approx(206, abs=0.5)  # type: ignore[union-attr]
    assert peak_of("NVIDIA GeForce GTX 1080") is None and peak_of("NVIDIA GH200 480GB") is None


def binomial_tail(k: int, n: int) -> float:
    return sum(math.comb(n, i) for i in range(k + 1)) / 2**n


@pytest.mark.parametrize("n", [6, 9, 15, 16, 25, 50, 101])
def test_intervals_of_medians_hold_95_percent_and_are_the_narrowest(n: int) -> None:
    middle, low, high = median_interval([float(v) for v in range(n)])
    assert middle == (n - 1) / 2 and low + high == n - 1
    assert 2 * binomial_tail(int(low), n) <= 0.05 < 2 * binomial_tail(int(low) + 1, n)


def test_few_values_have_their_range() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.mark.parametrize("clock", ["cpu", "wall"])
def test_ratios_are_those_of_the_work(clock: str) -> None:
    """One call computes twice as long as the other; a wall clock on a busy machine is given more room."""
    calls = {"one": [lambda: spin(2e-3)] * 2, "two": [lambda: spin(4e-3)] * 2}
    timed = measure.interleave(calls, device="cpu", budget=0.3, clock=clock)
    assert {c for c, _ in timed.values()} == {clock}
    one, two = (timed[name][1] for name in ("one", "two"))
    assert len(one) == len(two) >= measure.FEWEST_ROUNDS
    ratio = median_interval([b / a for a, b in zip(one, two, strict=True)])[0]
    assert ratio == pytest.approx(2, rel=0.05 if clock == "cpu" else 0.5)
    if clock == "cpu":
        assert median_interval(one)[0] == pytest.approx(2e-3, rel=0.05)


def test_cpu_seconds_leave_waiting_out() -> None:
    calls = {"waits": [lambda: (time.sleep(5e-3), spin(1e-3))]}
    ((clock, seconds),) = measure.interleave(calls, device="cpu", budget=0.05, clock="cpu").values()
    assert clock == "cpu" and median_interval(seconds)[0] == pytest.approx(1e-3, rel=0.2)


def test_inputs_take_turns_and_rounds_interleave() -> None:
    seen: list[str] = []
    calls = {n: [lambda n=n, i=i: (seen.append(f"{n}{i}"), spin(5e-3)) for i in range(3)] for n in "ab"}
    measure.interleave(calls, device="cpu", budget=0.0)
    assert set(seen) == {"a0", "a1", "a2", "b0", "b1", "b2"}
    a = [name for name in seen if name[0] == "a"]
    assert all(int(then[1]) == (int(first[1]) + 1) % 3 for first, then in zip(a, a[1:], strict=False))
    late = "".join(
        name[0] for name in seen[-2 * measure.FEWEST_ROUNDS :]
    )  # after calibration: one each per round
    assert all(set(late[i : i + 2]) == {"a", "b"} for i in range(0, len(late), 2))


def test_sets_exceed_the_cache() -> None:
    assert measure.sets_needed(1 << 20, "cpu", 16 << 20) == 32
    assert measure.sets_needed(1 << 30, "cpu", 16 << 20) == 2
    assert measure.sets_needed(1, "cpu", 16 << 20) == 64


def test_peak_memory_of_known_allocations() -> None:
    x = torch.ones(1 << 18)  # 1 MiB

    def call() -> torch.Tensor:
        a = x + 1  # 1 MiB
        b = torch.cat((a, a))  # 3 MiB in all
        del a
        return b[:10].clone()

    assert measure.peak_memory(call, "cpu") == pytest.approx(3 << 20, rel=0.01)


def exact_and(error: float, dtype: torch.dtype) -> tuple[dict, list[dict], dict]:
    torch.manual_seed(0)
    exact = {"out": torch.randn(64, 64, dtype=torch.float64), "q": torch.randn(64, 64, dtype=torch.float64)}
    plain = {n: t.to(dtype) for n, t in exact.items()}
    mine = {n: (t * (1 + error)).to(dtype) for n, t in exact.items()}
    return mine, [plain], exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("error", "good"), [(0.0, True), (0.01, False), (-0.01, False)])
def test_one_percent_is_too_much_in_any_dtype(dtype: torch.dtype, error: float, good: bool) -> None:
    verdicts = numerics.judge(*exact_and(error, dtype), dtype)
    assert [v.name for v in verdicts] == ["out", "q"] and [v.good for v in verdicts] == [good, good]


def test_not_a_number_and_missing_results_never_pass() -> None:
    mine, plain, exact = exact_and(0.0, torch.float32)
    mine["q"][3, 3] = float("nan")
    assert [v.good for v in numerics.judge(mine, plain, exact, torch.float32)] == [True, False]
    with pytest.raises(ValueError, match="q is missing; there are out"):
        numerics.judge({"out": mine["out"]}, plain, exact, torch.float32)
    with pytest.raises(
        ValueError, match=r"out is torch.float64 \[64, 64\], expected torch.float32 \[64, 64\]"
    ):
        numerics.judge({**mine, "out": exact["out"]}, plain, exact, torch.float32)


def test_what_allows_no_difference_says_what_differs() -> None:
    """Of ids no share may differ, so that nothing can be divided by what is allowed."""
    verdict = tokenizing.check([[5, 6], [7]], [[5, 6], [8]])
    assert not verdict.good
    assert (
        worst([verdict])
        == "out: largest error 1.00e+00 (allowed 0.00e+00), relative 5.00e-01 (allowed 0.0e+00)"
    )
    assert tokenizing.check(torch.tensor([[5, 6]]), [[5, 6]]).good


def test_rounding_is_the_rule_of_the_design() -> None:
    exact = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    x = exact.bfloat16()
    assert numerics.rounding(exact, torch.bfloat16) == 2 * float(((x + 0.3 - 0.3) - x).abs().max())
    assert numerics.rounding(exact, torch.float64) < 1e-15


def test_flops_are_what_torch_counts() -> None:
    """The formulas of work.py against torch's own counter on the same products."""
    from torch.utils.flop_counter import FlopCounterMode

    windows, slots, heads, dim = 6, 16, 2, 8
    q, k, v = (torch.randn(windows * heads, slots, dim, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        out = (q @ k.mT).softmax(-1) @ v
    said = work.window_attention(windows * slots, heads * dim, slots, 4, backward=False)
    assert said.flops == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # a fused backward computes the logits once more: 10TNC against the 8TNC of kept probabilities
    both = work.window_attention(windows * slots, heads * dim, slots, 4, backward=True)
    assert both.flops - said.flops == counter.get_total_flops() * 10 / 8

    batch, queries, keys, dv = 3, 4, 10, 12
    q, k, v = (torch.randn(batch * heads, n, d) for n, d in ((queries, dim), (keys, dim), (keys, dv)))
    with FlopCounterMode(display=False) as counter:
        (q @ k.mT).softmax(-1) @ v
    said = work.latent_attention(batch * keys, queries, batch, heads, heads, dim, dv, 2, backward=False)
    assert said.flops == counter.get_total_flops()
    assert said.bytes == 2 * (q.numel() + k.numel() + v.numel() + batch * heads * queries * dv)
    hidden, table = (torch.randn(n, dim, requires_grad=True) for n in (keys, 31))
    for backward, wanted in ((False, 1), (True, 3)):
        with FlopCounterMode(display=False) as counter:
            out = hidden @ table.T
            if backward:
                out.sum().backward()
        said = work.linear_cross_entropy(keys, dim, 31, 4, backward=backward)
        assert said.flops == counter.get_total_flops() == wanted * 2 * keys * dim * 31


def test_the_exact_gradient_is_that_of_the_same_numbers() -> None:
    """The gradient of a copy is the cotangent: in bf16 it is exact, and no rounding of it counts as an error."""
    problem = Problem(None, TRAINING, torch.bfloat16)
    x = torch.randn(50)
    exact, low = (results(lambda x: x * 1, {"x": x.to(t)}, problem) for t in (torch.float64, torch.bfloat16))
    assert low["x"].dtype == torch.bfloat16 and torch.equal(exact["x"], low["x"].double())


def row(peer: str, seconds: tuple[float, ...], **others: object) -> Row:
    values = {"ours": peer == "auto", "flops": 2e9, "bytes": 1e9, **others}
    return Row("s", "c", "forward", peer, "float32", "shape", status="ok", seconds=seconds, **values)  # type: ignore[arg-type]


def test_roofline_fractions() -> None:
    ceilings = Ceilings(copy=1e9, matmul={"float32": 1e12})
    memory_bound, compute_bound = row("a", (2.0, 4.0, 3.0)), row("b", (8.0,), flops=4e12)
    assert bound(memory_bound, ceilings) == (1.0, "memory") and fraction(
        memory_bound, ceilings
    ) == pytest.approx(1 / 3)
    assert bound(compute_bound, ceilings) == (4.0, "compute") and fraction(compute_bound, ceilings) == 0.5
    assert bound(row("c", (1.0,), bytes=0.0), ceilings) is None and fraction(row("d", ()), ceilings) is None
    assert math.isnan(row("d", ()).median)
    emulated = Ceilings(
        copy=1e9, matmul={"float32": 1e12, "bfloat16": 1e10}
    )  # a CPU without bf16 instructions
    half = replace(compute_bound, dtype="bfloat16")
    assert bound(half, emulated) == (4.0, "compute")
    assert bound(half, Ceilings(1e9, {"bfloat16": 4e12, "float32": 1e11})) == (1.0, "memory")


def test_pairs_are_taken_within_rounds() -> None:
    """Three times slower rounds for both leave the ratio alone."""
    mine, theirs = row("auto", (1.0, 3.0, 1.1)), row("plain", (2.0, 6.0, 2.2))
    paired, other = pair_rows([mine, theirs])
    assert paired.paired == (Paired("plain", 0.5, 0.5, 0.5),) and other.paired == ()
    graph, events = pair_rows([row("auto", (1.0,), clock="graph"), row("plain", (2.0,), clock="events")])
    assert graph.paired == events.paired == ()  # launches would count for one of them alone


class FakeTimer:
    """A second per call, by some clock."""

    def __init__(self, clock: str) -> None:
        self.clock = clock

    def __call__(self, count: int) -> float:
        return float(count)


@pytest.mark.parametrize(
    ("no_graph", "clocks"),
    [
        ((), {"graph"}),
        (("reference",), {"graph", "events"}),
        (("plain",), {"events"}),
    ],
)
def test_what_is_compared_has_one_clock(
    monkeypatch: pytest.MonkeyPatch, no_graph: tuple[str, ...], clocks: set[str]
) -> None:
    """One that no graph can hold brings all to events, but for the one that may stand apart."""

    def timer_for(calls: list, device: str, clock: str = "auto") -> FakeTimer:
        return FakeTimer("events" if clock == "events" or calls[0] in no_graph else "graph")

    monkeypatch.setattr(measure, "timer_for", timer_for)
    calls: dict = {name: [name] for name in ("auto", "reference", "plain")}
    timed = measure.interleave(calls, device="cuda", budget=0.0, fewest=1, apart=("reference",))
    assert {clock for clock, _ in timed.values()} == clocks and timed["auto"][0] == timed["plain"][0]


def test_a_run_survives_its_file(tmp_path) -> None:
    run = Run("2026-01-01T00:00:00+00:00", "pytest bench", "abc", "cpu", "cpu", "cpu", {"torch": "2"},
              Ceilings(1.0, {"float32": 2.0}), rows=(row("auto", (1.0, 2.0)), row("x", (), peak_memory=7)))  # fmt: skip
    save(run, tmp_path / "a" / "run.json")
    assert load(tmp_path / "a" / "run.json") == run
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["run.json"]
    (tmp_path / "b.json").write_text('{"schema": 99, "rows": []}')
    with pytest.raises(ValueError, match="schema 99, this version reads 1"):
        load(tmp_path / "b.json")
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no run of this benchmark"):
        load(tmp_path / "c.json")


def test_a_command_is_written_as_anyone_can_type_it(tmp_path: Path) -> None:
    """By `python -m`, or by a script; of absolute paths the last part."""
    (tmp_path / "tool.py").write_text("from bench.machine import command\nprint(command())\n")
    more = ["--out", str(tmp_path / "a"), f"--report={tmp_path}/b", "c/d", "--tasks", "x/(y|z)"]
    said = [
        subprocess.run(
            [sys.executable, *how, *more], cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
            capture_output=True, text=True, check=True,
        ).stdout.strip()
        for how in (["-m", "tool"], [str(tmp_path / "tool.py")])
    ]  # fmt: skip
    end = "--out a --report=b c/d --tasks 'x/(y|z)'"
    assert said == [f"python -m tool {end}", f"tool.py {end}"]
