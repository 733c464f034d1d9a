"""The benchmark as its users call it: `pytest bench/`, and the program for a GPU machine, rehearsed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import record
from bench.gpu import Program
from bench.profiles import PROFILES

ROOT = Path(__file__).resolve().parent.parent
ONE_CASE = "tiny-64px-stage3 and forward"


def pytest_bench(*arguments: str, plugin: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "bench/test_window_attention.py", "-p", "no:cacheprovider"]
    if plugin:
        command += ["-p", plugin.stem]
    # pytest-benchmark turns itself off where it sees a worker of pytest-xdist, which this process may be
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    if plugin:
        environment["PYTHONPATH"] = str(plugin.parent)
    return subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of one case without FlexAttention, saved as pytest-benchmark's users save it."""
    folder = tmp_path_factory.mktemp("bench")
    done = pytest_bench(
        "-k", f"{ONE_CASE} and not (flex or compiled or timm)", "--budget", "0.2", "--report", str(folder / "report"),
        f"--benchmark-json={folder / 'mine.json'}", "--benchmark-save=first", f"--benchmark-storage={folder / 'store'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_a_run_is_checked_timed_and_reported(measured: tuple[Path, str]) -> None:
    folder, said = measured
    run = record.load(folder / "report" / "run.json")
    rows = {row.peer: row for row in run.rows}
    assert [*rows] == ["auto", "reference", "eager", "sdpa", "triton", "plain"]
    triton = rows.pop("triton")
    if not torch.cuda.is_available():
        assert triton.status == "absent" and "it runs on CUDA devices, got cpu" in triton.note
    assert all(row.status == "ok" and row.accuracy and row.peak_memory for row in rows.values())
    assert len({len(row.seconds) for row in rows.values()}) == 1
    assert run.ceilings and run.ceilings.copy > 1e8 and set(run.ceilings.matmul) == {"float32", "bfloat16"}
    assert {pair.peer for pair in run.rows[0].paired} == {"reference", "eager", "sdpa", "plain"}
    assert run.versions["torch"] and run.kind == "cpu" and "threads" in run.device and not run.rehearsed
    assert str(folder / "report" / "index.html") in said
    page = (folder / "report" / "index.html").read_text()
    assert "tiny-64px-stage3" in page and run.device in page
    assert "tiny-64px-stage3" in (folder / "report" / "report.md").read_text()


def test_pytest_benchmark_has_the_same_rounds(measured: tuple[Path, str]) -> None:
    folder, _ = measured
    rows = {row.peer: row for row in record.load(folder / "report" / "run.json").rows}
    stored = json.loads((folder / "mine.json").read_text())["benchmarks"]
    assert len(stored) == sum(row.status == "ok" for row in rows.values())
    for benchmark in stored:
        row = rows[benchmark["name"].rsplit("/", 1)[1].rstrip("]")]
        assert benchmark["stats"]["median"] == pytest.approx(row.median)
        assert benchmark["stats"]["rounds"] == len(row.seconds)
        assert benchmark["group"] == "window_attention tiny-64px-stage3/forward/float32"
        assert benchmark["extra_info"]["flops"] == row.flops


def test_pytest_benchmark_compares(measured: tuple[Path, str], tmp_path: Path) -> None:
    """--benchmark-compare finds the saved run, and --benchmark-compare-fail fails by it: nothing is 1,000 times faster.
    --against a folder, the one that is written over: the earlier run is read before."""
    folder, _ = measured
    marked = (folder / "report" / "run.json").read_text().replace('"commit": "', '"commit": "EARLIER')
    (tmp_path / "run.json").write_text(marked)
    done = pytest_bench(
        "-k", f"{ONE_CASE} and eager", "--budget", "0", "--report", str(tmp_path), "--against", str(tmp_path),
        f"--benchmark-storage={folder / 'store'}", "--benchmark-compare=0001", "--benchmark-compare-fail=median:100000%",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "(NOW)" in done.stdout and "(0001_first)" in done.stdout
    page = (tmp_path / "index.html").read_text()
    assert "Since the previous run" in page and "EARLIER" in page
    assert "EARLIER" not in (tmp_path / "run.json").read_text()


WRONG = """
from dataclasses import replace

from bench.profiles import PROFILES
from kernels.window_attention import op

gates = tuple(gate for gate in PROFILES["cpu"].gates if gate.task == "tiny-64px-stage3/forward/float32")
PROFILES["cpu"] = replace(PROFILES["cpu"], gates=gates)
right = op.BACKEND_FUNCTIONS["eager"]
op.BACKEND_FUNCTIONS["eager"] = lambda *args: right(*args) * 1.01
"""


def test_a_wrong_kernel_fails_and_gets_no_time(tmp_path: Path) -> None:
    plugin = tmp_path / "planted.py"
    plugin.write_text(WRONG)
    done = pytest_bench(
        "-k",
        f"{ONE_CASE} and (eager or plain)",
        "--budget",
        "0",
        "--report",
        str(tmp_path / "r"),
        "--gate",
        plugin=plugin,
    )
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout
    assert (
        "FAIL  window_attention tiny-64px-stage3/forward/float32: auto / plain = not measured" in done.stdout
    )
    assert "eager is wrong: out: largest error" in done.stdout
    wrong, right = record.load(tmp_path / "r" / "run.json").rows
    assert (wrong.status, wrong.seconds, right.status) == ("wrong", (), "ok") and right.seconds
    assert "**WRONG**: out: largest error" in (tmp_path / "r" / "report.md").read_text()


def test_the_gpu_program_is_bounded_and_leaves_what_it_measured(tmp_path: Path) -> None:
    """A short rehearsal: sections end in time, one that crashes leaves the others, all is written."""
    program = Program(PROFILES["cpu"], tmp_path, 120.0, rehearsed=True)
    program.machine()
    program.process(
        "crash", [sys.executable, "-c", "import os; print('was here', flush=True); os.abort()"], 10
    )
    program.process("endless", [sys.executable, "-c", "import time; time.sleep(60)"], 2)
    program.process("swin_block", [
        sys.executable, "-m", "bench.gpu", "--rehearse", "--subject", "swin_block", "--minutes", "0.01",
        "--out", str(tmp_path / "swin_block"),
    ], 100)  # fmt: skip
    program.report()
    sections = {s.name: s for s in program.done}
    assert sections["crash"].status == "failed" and "was here" in (tmp_path / "crash.log").read_text()
    assert sections["endless"].status == "out of time" and sections["endless"].seconds < 5
    assert sections["swin_block"].status == "out of time"  # after the first task, and it says so
    assert "out of time before" in sections["swin_block"].note
    assert "out of time before" in (tmp_path / "swin_block.log").read_text()
    run = record.load(tmp_path / "run.json")
    assert run.rehearsed and run.rows and "Only rehearsed" in (tmp_path / "index.html").read_text()
    told = json.loads((tmp_path / "sections.json").read_text())
    assert told["rehearsed"] and [s["name"] for s in told["sections"]] == [*sections]
    assert json.loads((tmp_path / "machine.json").read_text())["absent"].keys() >= {"flash_attn"}


def test_the_gpu_program_keeps_an_earlier_report_until_it_has_one(
    measured: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a report is about what this call measured alone."""
    folder, _ = measured
    for path in ("index.html", "run.json", "window_attention/run.json"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((folder / "report" / Path(path).name).read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    Program(PROFILES["cpu"], tmp_path, 1.0, True, sections=["subjects"]).run()  # no time for anything
    assert {path: path.read_bytes() for path in before} == before
    assert capsys.readouterr().out.endswith(f" {tmp_path / 'sections.json'}\n")
    program = Program(PROFILES["cpu"], tmp_path, 1.0, True)
    (tmp_path / "swin_block").mkdir()
    record.save(record.load(folder / "report" / "run.json"), tmp_path / "swin_block" / "run.json")
    program.report()
    assert (
        program.done[-1].note == "6 rows"
        and (tmp_path / "index.html").read_bytes() != before[tmp_path / "index.html"]
    )


def test_the_gpu_program_measures_some_tasks(tmp_path: Path) -> None:
    """By a pattern of subject, case, mode and dtype."""
    program = Program(
        PROFILES["h200-bf16"], tmp_path, 60.0, rehearsed=False, pattern="window_attention/swin-b.*/training"
    )
    assert {task.subject for task in program.tasks} == {"window_attention"} and len(program.runs) == 1
    assert 1 < len(program.tasks) < 10 and all("/training/" in task.name for task in program.tasks)


def test_the_gpu_program_asks_the_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both checks, on tests that there are; and a machine without the tool is told so."""
    program = Program(PROFILES["cpu"], tmp_path, 4000.0, rehearsed=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    program.sanitizer()
    assert program.done[-1].status == "skipped" and "compute-sanitizer on the PATH" in program.done[-1].note
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\necho $@ | /usr/bin/cut -d' ' -f1-4\nshift 4\nexec $1 $2 $3 --collect-only -q $5 -k \"$7\"\n"
    )
    tool.chmod(0o755)
    program.sanitizer()
    for check, section in zip(("memcheck", "racecheck"), program.done[1:], strict=True):
        log = (tmp_path / f"sanitizer-{check}.log").read_text()
        assert section.name == f"sanitizer-{check}" and section.status == "ok", log
        assert log.startswith(f"--tool {check} --error-exitcode 1\n")
        assert "test_exact[cuda-pads-are-keys" in log and "interpreter" not in log


BARE = """
import sys
sys.modules |= dict.fromkeys(("PIL", "sentencepiece", "jinja2", "markupsafe", "timm", "transformers", "torchvision"))
from bench.gpu import measure
from bench.profiles import PROFILES
from pathlib import Path
for subject in ("training_step", "loader"):
    print(measure(PROFILES["cpu"], subject, Path(sys.argv[1]) / subject, 60.0, True))
"""


def test_the_gpu_program_needs_little(tmp_path: Path) -> None:
    """Torch and NumPy: what cannot run without other packages is a row that names them."""
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = [r for path in tmp_path.glob("*/run.json") for r in record.load(path).rows]
    assert {row.subject for row in rows} == {"training_step", "loader"}
    assert {row.status for row in rows} == {"absent"}
    assert {row.note.split(" is not installed")[0] for row in rows} == {"timm", "PIL"}
