"""Which checkpoint a run goes on from, and what becomes of those that it leaves behind."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from micro import MODEL, arguments
from test_train_checkpoint import save, snapshot, trained

from train import checkpoint, directory, setup
from train.config import ConfigError, PretrainConfig
from train.engine import Ranks
from train.pretrain import main
from train.saving import SaveError, Saver
from train.telemetry.log import Progress

STILL = Progress(1, 1, 1, on=False)


def steps(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.step_directories(run / "checkpoints")]


@contextmanager
def another_run(out: Path) -> Iterator[int]:
    """The number of a process that holds the directory, until it is killed."""
    hold = (
        "import sys, time; from pathlib import Path; from train.directory import Lock\n"
        "kept = Lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(out)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout and other.stdout.readline() == "held\n"
            yield other.pid
        finally:
            other.kill()


def test_a_directory_in_which_another_process_runs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs/here"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    assert main(arguments(out, "--steps", "3")) == 0
    assert not (out / directory.LOCK).exists()
    again = arguments(out, "--steps", "4", "--resume", "auto")
    with another_run(out) as other:
        before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
        for more in ([], ["--dry-run"]):
            assert main([*again, *more]) == 2
            assert f"is written by another run at this moment (process {other} on " in capsys.readouterr().err
        assert steps(out) == [3] and {path: path.read_bytes() for path in before} == before
        # a new run by that name takes another directory
        assert directory._new(out, directory.look) == (tmp_path / "runs/here-2", None)
    assert main(again) == 0  # the lock went with the process, its file did not
    assert steps(out) == [4, 3]


def test_a_second_run_of_the_same_process_is_refused(tmp_path: Path) -> None:
    lock = directory.Lock(tmp_path / "a/run")
    for take in (directory.Lock, directory.look):
        with pytest.raises(directory.TakenError, match="another run at this moment .in this process"):
            take(tmp_path / "a/../a/run")
    lock.close()
    assert not (tmp_path / "a").exists()  # nothing came of it
    assert directory.look(tmp_path / "a/run") is None and not (tmp_path / "a").exists()


def test_a_start_that_fails_leaves_no_lock_and_no_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new/run"

    def failing(*_: Any) -> Any:
        raise ConfigError("no data")

    with monkeypatch.context() as broken:
        broken.setattr(setup, "_open", failing)
        assert main(arguments(out, "--steps", "3")) == 2
        assert "no data" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert main(arguments(out, "--steps", "3")) == 0
    (tmp_path / "file").write_text("")
    for inside, more in itertools.product(("file/run", "file"), ([], ["--dry-run"])):
        assert main(arguments(tmp_path / inside, "--steps", "3", *more)) == 2
        assert f"{inside} cannot be written into: " in capsys.readouterr().err


def test_a_lock_waits_for_who_only_looks_and_for_who_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / directory.LOCK
    look = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a+'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", look, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdin and other.stdout.readline() == "held\n"

        def pause(_: float) -> None:
            if other.poll() is None:
                other.communicate("\n")

        monkeypatch.setattr(directory.time, "sleep", pause)
        directory.Lock(tmp_path / "run").close()
    made, asked = Path.mkdir, []

    def taken_back(path: Path, *args: Any, **options: Any) -> None:
        made(path, *args, **options)
        asked.append(path)
        if len(asked) == 1:
            path.rmdir()  # by another start, which failed

    monkeypatch.setattr(Path, "mkdir", taken_back)
    directory.Lock(tmp_path / "other").close()
    assert len(asked) == 2


def test_a_launch_that_fails_takes_its_name_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    out = tmp_path / "run"
    assert main(arguments(out, "--steps", "3", "--data.train", "nope.tar")) == 2
    assert not out.exists()
    (out / directory.LAUNCH).mkdir(parents=True)
    assert main(arguments(out, "--steps", "3")) == 2
    assert "this run cannot start: [Errno 21] Is a directory" in capsys.readouterr().err


def test_runs_of_a_name_are_numbered(tmp_path: Path) -> None:
    first = tmp_path / "runs/name"
    assert directory._new(first, directory.look) == (first, None)
    for name in ("name", "name-3", "name-10", "name-x", "name-1", "other"):
        (tmp_path / "runs" / name / "checkpoints/step-000001").mkdir(parents=True)
    assert [out.name for out in directory._named(first)] == ["name", "name-3", "name-10"]
    assert directory._new(first, directory.look) == (first.with_name("name-11"), None)
    (tmp_path / "runs/name-11").mkdir()  # of a run that never came to a checkpoint
    assert directory._new(first, directory.look) == (first.with_name("name-11"), None)


def test_fewer_steps_than_were_done_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(arguments(out, "--steps", "4")) == 0
    kept = (out / "summary.json").read_bytes()
    for more in ([], ["--dry-run"]):
        assert main(arguments(out, "--steps", "3", "--resume", "auto", *more)) == 2
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

    def resolve(config: PretrainConfig, again: bool) -> tuple[Path, Path | None]:
        out, start, lock = setup._resolve(config, ranks, STILL, again)
        assert lock
        lock.close()
        return out, start

    mine = Path(name or "runs/pretrain-2")
    assert resolve(config, False) == (mine, None)
    # before the first checkpoint, and after it
    assert resolve(config, True) == (mine, None)
    saved = save(mine / "checkpoints", trained(), step=5)
    assert resolve(config, True) == (mine, saved)
    # one that is told to start from an older checkpoint goes on with its own all the same
    from_old = PretrainConfig(model=MODEL, name="pretrain", out="third", resume=str(older))
    assert resolve(from_old, False) == (Path("third"), older)
    assert resolve(from_old, True) == (Path("third"), older)
    third = save(Path("third/checkpoints"), trained(), step=401)
    assert resolve(from_old, True) == (Path("third"), third)
    # a start of another launcher, which died before it came here, takes nobody's run
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert resolve(PretrainConfig(model=MODEL, name="new"), True) == (
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
