"""Options that make no sense are refused by name, before anything is measured; and Ctrl-C leaves no traceback."""

from __future__ import annotations

import math
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import auto, conftest, decoding, gate, gpu
from bench.aot import __main__ as aot
from bench.engines import __main__ as engines
from bench.options import end_with, file_path
from bench.profiles import PROFILES
from bench.session import Session
from bench.steps import __main__ as steps

CLOSED = str(Path(__file__).resolve().parent)
CLOSED_FILE = str(Path(gate.__file__).resolve())
FILE = str(Path(__file__).resolve())
REHEARSE = [] if torch.cuda.is_available() else ["--rehearse"]


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (gpu.main, ["--tasks", "["], "'[' is no regular expression: unterminated character set"),
        (gpu.main, ["--minutes", "-1"], "it must be a number above 0, got '-1'"),
        (
            gpu.main,
            [*REHEARSE, "--peers", "auto", "nobody"],
            "--peers nobody: the tasks have auto; reference; ",
        ),
        (gpu.main, [*REHEARSE, "--tasks", "swin-q"], "matches 'swin-q'"),
        (gpu.main, ["--out", FILE], f"argument --out: {FILE} is no folder"),
        (steps.main, ["--out", f"{FILE}/within"], f"argument --out: {FILE} is no folder"),
        (decoding.main, ["--out", FILE], f"argument --out: {FILE} is no folder"),
        (decoding.main, ["--batch", "0"], "it must be 1, 2, ..., got '0'"),
        (engines.main, ["--out", FILE], f"argument --out: {FILE} is no folder"),
        (gpu.main, ["--out", "a" * 300], "File name too long"),
        (gpu.main, ["--out", CLOSED], f"argument --out: {CLOSED} cannot be written into"),
        (aot.main, ["--json", str(Path(FILE).parent)], "is a folder"),
        (auto.main, ["--out", f"{FILE}/a.json"], f"argument --out: {FILE} is no folder"),
        (aot.main, ["--json", CLOSED_FILE], f"{CLOSED_FILE!r} cannot be written"),
        (gate.main, ["--budget", "inf"], "it must be a number above 0, got 'inf'"),
        (gate.main, ["--budget", "nan"], "it must be a number above 0, got 'nan'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    command: Callable[[list[str]], int],
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = os.access  # root may write anywhere
    monkeypatch.setattr(
        os, "access", lambda path, mode: str(path) not in (CLOSED, CLOSED_FILE) and real(path, mode)
    )
    with pytest.raises(SystemExit) as stopped:
        command(arguments)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"--profile": "a100"}, "no profile is called 'a100'; there are cpu, a100-bf16, h200-bf16"),
        ({"--against": "none.json"}, "none.json: no such file"),
        ({"--budget": -1.0}, "--budget -1.0: seconds, 0 or more"),
        ({"--report": FILE}, f"{FILE} is no folder"),
        ({"--budget": math.inf}, "--budget inf: seconds, 0 or more"),
        ({"--budget": math.nan}, "--budget nan: seconds, 0 or more"),
        ({"-n": 2}, "the benchmark runs in one process"),
    ],
)
def test_pytest_bench_refuses_too(given: dict[str, Any], said: str) -> None:
    options = {
        "--profile": "auto",
        "--against": None,
        "--budget": None,
        "--report": "r",
        "--rehearse": False,
    } | given
    config: Any = SimpleNamespace(
        option=SimpleNamespace(numprocesses=given.get("-n")),
        getoption=options.__getitem__,
        stash=pytest.Stash(),
    )
    with pytest.raises(pytest.UsageError, match=re.escape(said)):
        conftest.pytest_configure(config)


def test_a_gpu_is_asked_for_unless_rehearsing(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "torch finds no CUDA device here; --rehearse walks through" in capsys.readouterr().err


def test_a_link_to_what_cannot_be_there_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(f"{FILE}/a.json")
    (tmp_path / "new").symlink_to(tmp_path / "b.json")
    with pytest.raises(ArgumentTypeError, match=re.escape(f"{FILE} is no folder")):
        file_path(str(tmp_path / "link"))
    assert file_path(str(tmp_path / "new")) == tmp_path / "new"


def test_an_interrupted_command_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    for main, status in ((interrupted, 130), (lambda: 1, 1), (lambda: 0, 0)):
        with pytest.raises(SystemExit) as stopped:
            end_with(main)
        assert stopped.value.code == status
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_times_without_a_shape_and_missing_peers_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = auto.RESULTS / auto.RUNS[0]
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "run.json").write_bytes((whole / "run.json").read_bytes())
    (folder / "others.txt").write_text("  torch-cudnn  ok 1.5 ms\n")
    monkeypatch.setattr(auto, "RESULTS", tmp_path)
    with pytest.raises(SystemExit):
        auto.main(["--runs", "odd", "--out", str(tmp_path / "auto.json")])
    assert "'  torch-cudnn  ok 1.5 ms' stands in front of the first shape" in capsys.readouterr().err
    monkeypatch.undo()
    calls = [call for name in auto.RUNS for call in auto.timed(name)[1]]
    for call in calls:
        if call.dtype == "float32":
            call.seconds.pop("eager", None)
    with pytest.raises(ValueError, match="no call in float32 has the times of all of eager, sdpa, triton"):
        auto.entry("NVIDIA H200", calls)


@pytest.mark.parametrize("text", ["[]", "", "{"])
def test_another_file_is_no_table(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(SystemExit):
        auto.main(["--out", str(tmp_path / "other.json")])
    assert "other.json is no table of this command" in capsys.readouterr().err
    assert (tmp_path / "other.json").read_text() == text


@pytest.mark.parametrize("status", [pytest.ExitCode.OK, pytest.ExitCode.INTERRUPTED])
def test_a_stopped_run_does_not_begin_the_gate(
    status: pytest.ExitCode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(conftest, "write_report", lambda *_, **__: None)
    monkeypatch.setattr(gate, "run", lambda *given: asked.append(given) or ([], []))
    session = Session(PROFILES["cpu"], 0.0, tmp_path, rows={("a", "b"): []})
    stash = pytest.Stash()
    stash[conftest.BENCH], stash[conftest.EARLIER] = conftest.Bench(session, None), None
    config: Any = SimpleNamespace(stash=stash, getoption=lambda name: name == "--gate")
    conftest.pytest_sessionfinish(SimpleNamespace(config=config), status)  # type: ignore[arg-type]
    assert bool(asked) == (status == pytest.ExitCode.OK)
