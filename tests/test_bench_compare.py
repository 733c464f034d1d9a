from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.compare import as_json, as_text, main, read
from bench.record import Accuracy, Ceilings, Paired, Row, Run, save
from bench.report.changes import Change, compare, ratio_interval

ROOT = Path(__file__).resolve().parent.parent
NOISE = (0.99, 1.01, 1.0, 0.995, 1.005, 0.985, 1.015, 1.002, 0.998)
EXACT = Accuracy("out", 1e-7, 4e-7, 1e-7, 1e-5)


def row(peer: str = "triton", base: float = 1.0, **changes: Any) -> Row:
    """A row of 9 rounds of about `base` milliseconds."""
    made = Row(
        "window_attention", "tiny", "forward", peer, "float32", "16 x 16x16 map", peer in ("triton", "sdpa"), "ok",
        seconds=tuple(1e-3 * base * noise for noise in NOISE), clock="wall", items=100, unit="tokens",
        peak_memory=1000, accuracy=(EXACT,),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def make_run(*rows: Row, **changes: Any) -> Run:
    run = Run(
        "2026-03-14", "pytest bench/", "abc", "AMD EPYC", "cpu", "quick", {"torch": "2.13.0"}, Ceilings(1e10, {}), rows=rows
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


def only(changes: tuple[Change, ...], measure: str) -> Change:
    (found,) = [change for change in changes if change.measure == measure]
    return found


# --- the interval ---------------------------------------------------------------------------------


def test_the_interval_by_hand() -> None:
    """4 and 4 rounds: 16 ratios, k = floor(8 - 1.96 sqrt(12)) = 1, so the extremes; 9 and 9: k = floor(40.5 - 22.1)."""
    value, low, high = ratio_interval([2.0, 4.0, 8.0, 16.0], [1.0, 1.0, 1.0, 1.0])
    assert (value, low, high) == (6.0, 2.0, 16.0)
    ones, counted = (
        [1.0] * 9,
        [float(i) for i in range(1, 10)],
    )  # each of 1..9 stands 9 times among the ratios
    assert ratio_interval(counted, ones) == (5.0, 2.0, 8.0)  # the 18th of 81 from below, and from above
    assert ratio_interval([3.0], [2.0]) == (1.5, 1.5, 1.5)
    assert ratio_interval([1.0, 5.0], [1.0]) == (3.0, 1.0, 5.0)  # too few rounds: all of it


def test_the_interval_covers_the_truth_in_95_of_100_runs() -> None:
    """Two runs of one skewed, heavy-tailed distribution, one of them 1.2 times as slow."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        a, b = (1 + generator.pareto(2.5, size) for size in (12, 15))
        _, low, high = ratio_interval(list(1.2 * b), list(a))
        hits += low <= 1.2 <= high
    assert 0.94 <= hits / 2000 <= 0.975


# --- what is worse and what is better ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "same"), (1.04, "same"), (1.2, "worse"), (0.97, "same"), (0.8, "better")]
)
def test_slower_and_faster(factor: float, verdict: str) -> None:
    found = compare(make_run(row()), make_run(row(base=factor)))
    change = only(found.changes, "time")
    assert change.verdict == verdict and change.ratio == pytest.approx(factor, rel=0.01)
    assert change.low < factor < change.high
    assert [c.key for c in found.worse] == (
        ["window_attention/tiny/forward/float32/triton"] if verdict == "worse" else []
    )


def test_the_margin_moves_the_line() -> None:
    a, b = make_run(row()), make_run(row(base=1.2))
    assert compare(a, b, margin=0.3).worse == [] and len(compare(a, b, margin=0.1).worse) == 1


def test_noise_alone_is_no_change() -> None:
    """Half as slow again at the median, but the rounds reach from a third to three times."""
    wild = (0.3, 3.0, 1.5, 0.4, 2.5, 1.6, 0.5, 2.0, 1.4)
    change = only(
        compare(make_run(row()), make_run(row(seconds=tuple(1e-3 * x for x in wild)))).changes, "time"
    )
    assert change.ratio > 1.4 and change.low < 1 < change.high and change.verdict == "same"


def test_exactness_and_memory() -> None:
    looser = row(accuracy=(dataclasses.replace(EXACT, relative=2e-7),), peak_memory=500)
    found = compare(make_run(row()), make_run(looser))
    error, memory = only(found.changes, "error"), only(found.changes, "memory")
    assert (error.verdict, error.ratio) == ("worse", pytest.approx(2)) and "out: 1e-07 -> 2e-07" in error.text
    assert (memory.verdict, memory.ratio) == ("better", pytest.approx(0.5))
    assert [c.measure for c in found.changes] == ["error", "time", "memory"]  # from the worst to the best
    none = row(accuracy=(dataclasses.replace(EXACT, relative=0.0),), peak_memory=0)
    assert only(compare(make_run(none), make_run(none)).changes, "error").ratio == 1
    back = compare(make_run(none), make_run(row()))
    assert {c.measure for c in back.worse} == {"error", "memory"} and back.changes[0].ratio == math.inf


def test_a_row_that_became_wrong_is_the_worst_of_all() -> None:
    a = make_run(row(), row("sdpa"))
    b = make_run(row(base=9.0), row("sdpa", status="wrong", seconds=(), note="off by one"))
    found = compare(a, b)
    assert found.changes[0].measure == "status" and found.changes[0].text == "ok -> wrong: off by one"
    assert len(found.worse) == 2
    fixed = compare(b, a)
    assert only(fixed.changes, "status").verdict == "better" and not fixed.worse
    beyond = row("sdpa", accuracy=(dataclasses.replace(EXACT, error=1.0),))  # calls itself ok
    assert compare(a, make_run(row(), beyond)).changes[0].measure == "status"


def test_what_lacks_a_time_is_named() -> None:
    gone = row("sdpa", status="absent", seconds=())
    found = compare(make_run(row(), row("sdpa")), make_run(row(), gone))
    assert (
        found.not_compared == ("window_attention/tiny/forward/float32/sdpa: ok in A, absent in B",)
        and not found.worse
    )
    assert compare(make_run(gone), make_run(gone)).not_compared[0].endswith("absent in both")
    other = compare(make_run(row(), row("sdpa")), make_run(row(), row(case="base")))
    assert other.only_a == ("window_attention/tiny/forward/float32/sdpa",)
    assert other.only_b == ("window_attention/base/forward/float32/triton",)


def test_other_people_s_code_is_shown_and_does_not_count() -> None:
    found = compare(make_run(row(), row("timm")), make_run(row(), row("timm", 1.5)))
    assert [c.verdict for c in found.changes if c.measure == "time"] == ["worse", "same"] and not found.worse
    assert "1 time of other people's code changed too" in found.warnings[0]


# --- runs under other conditions --------------------------------------------------------------------


def paired(base: float, peer_base: float, **changes: Any) -> tuple[Row, Row]:
    value = base / peer_base
    return row(base=base, paired=(Paired("timm", value, value, value),), **changes), row("timm", peer_base)


def test_across_machines_ratios_to_peers_are_compared() -> None:
    """B's machine is 10 times as fast, and ours went from 0.5 to 0.75 of timm's time: 1.5 x worse, and no times."""
    a = make_run(*paired(1.0, 2.0))
    b = make_run(
        *paired(0.15, 0.2), device="NVIDIA H200", kind="cuda", versions={"torch": "2.14", "triton": "4"}
    )
    found = compare(a, b)
    assert not found.same_conditions and not [c for c in found.changes if c.measure == "time"]
    change = only(found.changes, "time against")
    assert change.against == "timm" and change.ratio == pytest.approx(1.5) and change.verdict == "worse"
    warnings = "\n".join(found.warnings)
    for wanted in (
        "device differs: AMD EPYC in A, NVIDIA H200 in B",
        "torch version differs: 2.13.0 in A, 2.14 in B",
    ):
        assert wanted in warnings
    assert "triton version differs: none in A, 4 in B" in warnings and "not comparable as such" in warnings


def test_recorded_ratios_serve_where_rounds_do_not_match() -> None:
    """0.5 [0.4, 0.6] in A and 0.75 [0.7, 0.8] in B: 1.5, from 0.7 / 0.6 to 0.8 / 0.4."""
    a = make_run(row(paired=(Paired("timm", 0.5, 0.4, 0.6),)), row("timm", seconds=(0.1,)))
    b = make_run(row(paired=(Paired("timm", 0.75, 0.7, 0.8),)), row("timm", seconds=(0.1,)), profile="full")
    change = only(compare(a, b).changes, "time against")
    assert (change.ratio, change.low, change.high) == pytest.approx((1.5, 0.7 / 0.6, 2.0))


def test_without_a_common_peer_nothing_is_said_about_time() -> None:
    found = compare(make_run(row()), make_run(row(base=9.0), rehearsed=True))
    assert not found.worse and "has no peer in common" in found.not_compared[0]
    assert "rehearsed differs: False in A, True in B" in found.warnings


def test_our_own_version_is_no_other_condition() -> None:
    found = compare(make_run(row(), versions={"auroraio": "1"}), make_run(row(), versions={"auroraio": "2"}))
    assert found.same_conditions and found.warnings == ()
    both = compare(make_run(row(), rehearsed=True), make_run(row(), rehearsed=True))
    assert both.same_conditions and "only rehearsed" in both.warnings[0]


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    runs = {
        "a": make_run(row(), row("timm")),
        "same": make_run(row(), row("timm")),
        "slow": make_run(row(base=1.3), row("timm")),
        "others": make_run(row("flex")),
        "twice": make_run(row(), row()),
        "empty": make_run(),
    }
    for name, run in runs.items():
        save(run, tmp_path / f"{name}.json")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"schema": 1, "rows": [{"x": 1}], "ceilings": null}')
    (tmp_path / "partial.json").write_text('{"schema": 1, "rows": [], "ceilings": null}')
    (tmp_path / "list.json").write_text("[1]")
    found = json.loads((tmp_path / "a.json").read_text())
    found["rows"][0]["seconds"] = ["soon"]
    (tmp_path / "words.json").write_text(json.dumps(found))
    (tmp_path / "future.json").write_text('{"schema": 99}')
    return {path.stem: str(path) for path in tmp_path.iterdir()}


def test_exit_codes(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([files["a"], files["same"]]) == 0
    assert "Worse by more than 5.0%: nothing" in capsys.readouterr().out
    assert main([files["a"], files["slow"]]) == 1
    out = capsys.readouterr().out
    assert "Worse by more than 5.0%: 1" in out and "window_attention/tiny/forward/float32/triton" in out
    assert "1.00 ms -> 1.30 ms" in out.replace("\N{NO-BREAK SPACE}", " ")
    assert main([files["slow"], files["a"]]) == 0
    assert main([files["a"], files["slow"], "--margin", "0.4"]) == 0
    assert main([files["a"], files["others"]]) == main([files["empty"], files["a"]]) == 2
    assert "nothing to compare: no row is in both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere.json: no such file, neither here nor in bench/results/"),
        ("broken", "is no run of this benchmark"),
        ("other", "is no run of this benchmark"),
        ("partial", "is no run of this benchmark"),
        ("list", "is no run of this benchmark"),
        ("words", "run.rows[0].seconds[0] is 'soon', not of type float"),
        ("future", "has schema 99, this version reads 1"),
        ("twice", "B has more than one row window_attention/tiny/forward/float32/triton"),
    ],
)
def test_bad_input(
    files: dict[str, str], name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([files["a"], files.get(name, f"{name}.json")]) == 2
    told = capsys.readouterr()
    assert message in told.err and told.out == ""


@pytest.mark.parametrize("margin", ["-0.1", "nan", "much"])
def test_a_margin_that_is_none(
    files: dict[str, str], margin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([files["a"], files["a"], f"--margin={margin}"])
    assert ended.value.code == 2 and "--margin" in capsys.readouterr().err


def test_json(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([files["a"], files["slow"], "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["worse"] == 1 and told["changes"][0]["ratio"] == pytest.approx(1.3, rel=0.01)
    assert len(told["changes"]) == 6 and told["same_conditions"] is True  # two rows: time, error, memory
    a, b = make_run(row()), make_run(row(status="failed", seconds=(), note="no"))
    strict = json.loads(as_json(compare(a, b), a, b), parse_constant=lambda name: pytest.fail(name))
    assert strict["changes"][0]["ratio"] is None and strict["changes"][0]["measure"] == "status"


def test_everything_that_was_not_compared_is_printed() -> None:
    a = make_run(row(), row("sdpa"), row("old"))
    b = make_run(row(), row("sdpa", status="absent", seconds=()), row("new"), device="other")
    text = as_text(compare(a, b), a, b)
    for wanted in (
        "WARNING: device differs",
        "Only in A: 1",
        "float32/old",
        "Only in B: 1",
        "float32/new",
        "absent in B",
    ):
        assert wanted in text, wanted


def test_a_run_in_results_goes_by_its_name(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As bench/results/ has them: a folder for each run."""
    monkeypatch.setattr("bench.compare.RESULTS", tmp_path)
    folder = tmp_path / "2026-03-14-cpu"
    folder.mkdir()
    shutil.copy(files["slow"], folder / "run.json")
    assert read(folder.name) == read(f"{folder.name}/run.json") == read(str(folder)) == read(files["slow"])


def test_as_a_command(files: dict[str, str]) -> None:
    """As a user starts it: the exit code arrives, and torch stays out (it costs seconds)."""
    command = [sys.executable, "-X", "importtime", "-m", "bench.compare", files["a"], files["slow"]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout.startswith(
        "A  2026-03-14, commit abc, AMD EPYC, profile quick"
    )
    assert " numpy" in done.stderr and "| torch" not in done.stderr
    usage = subprocess.run(
        [*command[:1], "-m", "bench.compare", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert usage.returncode == 0 and "exit codes: 0 nothing of ours is worse" in usage.stdout
