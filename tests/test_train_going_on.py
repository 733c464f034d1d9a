"""Which checkpoint a run goes on from, and what becomes of those that it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from micro import MODEL, arguments
from test_train_checkpoint import save, snapshot, trained

from train import checkpoint, setup
from train.config import PretrainConfig
from train.engine import Ranks
from train.pretrain import main
from train.saving import SaveError, Saver
from train.telemetry.log import Progress

STILL = Progress(1, 1, 1, on=False)


def steps(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.step_directories(run / "checkpoints")]


def test_a_directory_in_which_another_process_runs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(arguments(out, "--steps", "3")) == 0
    hold = (
        "import sys, time; from pathlib import Path; from train.setup import occupy\n"
        "kept = occupy(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(out)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout and other.stdout.readline() == "held\n"
            before = (out / "config.json").read_bytes()
            assert main(arguments(out, "--steps", "4", "--resume", "auto")) == 2
            said = capsys.readouterr().err
            assert f"is written by another run at this moment (process {other.pid} on " in said
            assert (out / "config.json").read_bytes() == before and steps(out) == [3]
        finally:
            other.kill()  # the lock goes with it
    assert main(arguments(out, "--steps", "4", "--resume", "auto")) == 0
    assert steps(out) == [4, 3]


def test_fewer_steps_than_were_done_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(arguments(out, "--steps", "4")) == 0
    kept = (out / "summary.json").read_bytes()
    assert main(arguments(out, "--steps", "3", "--resume", "auto")) == 2
    assert "has done 4 steps, and --steps asks for 3" in capsys.readouterr().err
    assert (out / "summary.json").read_bytes() == kept


def test_a_run_that_goes_back_leaves_later_checkpoints_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(arguments(out, "--steps", "6", "--save-every", "2")) == 0
    assert steps(out) == [6, 4, 2]
    back = str(out / "checkpoints/step-000002")
    assert (
        main(arguments(out, "--steps", "3", "--save-every", "2", "--keep-checkpoints", "1", "--resume", back))
        == 0
    )
    assert "set-aside-step-000006: a later step, which this run leaves behind" in capsys.readouterr().out
    assert steps(out) == [3]
    assert {path.name for path in (out / "checkpoints").glob("set-aside-*")} == {
        "set-aside-step-000004",
        "set-aside-step-000006",
    }
    assert checkpoint.newest_intact(out, print) == out / "checkpoints/step-000003"


def test_what_was_just_written_is_not_pruned(tmp_path: Path) -> None:
    for step in (200, 250, 300):
        (tmp_path / f"step-{step:06d}").mkdir()
    checkpoint.prune(tmp_path, 1, new=tmp_path / "step-000250")
    assert [checkpoint.step_of(path) for path in checkpoint.step_directories(tmp_path)] == [300, 250]


@pytest.mark.parametrize("name", ["", "chosen"])
def test_a_restart_takes_what_its_own_first_start_has_begun(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    older = save(Path("runs/pretrain/checkpoints"), trained(), step=400)
    config = PretrainConfig(model=MODEL, name="pretrain", out=name)
    ranks = Ranks(0, 0, 1)
    mine = Path(name or "runs/pretrain-2")
    assert setup._resolve(config, ranks, STILL, False) == (mine, None)
    # before the first checkpoint, and after it
    assert setup._resolve(config, ranks, STILL, True) == (mine, None)
    saved = save(mine / "checkpoints", trained(), step=5)
    assert setup._resolve(config, ranks, STILL, True) == (mine, saved)
    # one that is told to start from an older checkpoint goes on with its own all the same
    from_old = PretrainConfig(model=MODEL, name="pretrain", out="third", resume=str(older))
    assert setup._resolve(from_old, ranks, STILL, False) == (Path("third"), older)
    assert setup._resolve(from_old, ranks, STILL, True) == (Path("third"), older)
    third = save(Path("third/checkpoints"), trained(), step=401)
    assert setup._resolve(from_old, ranks, STILL, True) == (Path("third"), third)
    # a start of another launcher, which died before it came here, takes nobody's run
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert setup._resolve(PretrainConfig(model=MODEL, name="new"), ranks, STILL, True) == (
        Path("runs/new"),
        None,
    )


def test_a_file_that_cannot_be_read_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = (save(tmp_path, trained(), step=step) for step in (1, 2))
    real = checkpoint.sha256

    def failing(path: Path) -> str:
        if path.parent == bad:
            raise OSError(5, os.strerror(5))
        return real(path)

    monkeypatch.setattr(checkpoint, "sha256", failing)
    said: list[str] = []
    assert checkpoint.newest_intact(tmp_path, said.append) == good
    assert "cannot be read" in said[0] and "Input/output error" in said[0]


@pytest.mark.parametrize("where", ["write_part", "commit"])
def test_any_error_of_the_writer_is_said(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from micro import corpus

    def failing(*_: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(checkpoint, where, failing)
    said: list[str] = []
    one = trained()
    saver = Saver(
        tmp_path, PretrainConfig(model=MODEL), corpus().tokenizer, Ranks(0, 0, 1), one.device, said.append
    )
    saver.begin(lambda: snapshot(one), wait=False)
    saver.finish(must=False)
    assert "MemoryError: no room" in said[0] and "training goes on" in said[0]
    with pytest.raises(SaveError, match="MemoryError: no room"):
        saver.begin(lambda: snapshot(one), wait=True)
