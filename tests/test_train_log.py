"""metrics.jsonl across resumes, progress on a terminal and without one, words for durations."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from train.telemetry.log import Metrics, Progress, TensorBoard, duration


def lines(path: Path) -> list[tuple[str, int]]:
    return [(line["kind"], line["step"]) for line in map(json.loads, path.read_text().splitlines())]


def write(path: Path, keep_up_to: int, steps: range, evaluations: tuple[int, ...] = ()) -> Metrics:
    metrics = Metrics(path, keep_up_to=keep_up_to, last=10)
    for step in steps:
        metrics.write("train", step, {"loss": 1.0})
        if step in evaluations:
            metrics.write("eval", step, {"scores": {}})
    metrics.close()
    return metrics


def test_resume_leaves_no_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, range(1, 8), evaluations=(4, 7))
    resumed = write(path, 5, range(6, 11), evaluations=(7,))
    assert resumed.evaluated == {4}
    assert lines(path) == [
        *(("train", step) for step in range(1, 5)), ("eval", 4), ("train", 5),
        ("train", 6), ("train", 7), ("eval", 7), ("train", 8), ("train", 9), ("train", 10),
    ]  # fmt: skip


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, range(1, 4))
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    write(path, 3, range(4, 5))
    assert lines(path) == [("train", step) for step in range(1, 5)]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, range(1, 4))
    write(path, 0, range(1, 2))
    assert lines(path) == [("train", 1)]


def test_the_last_evaluation_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, range(1, 11), evaluations=(5, 10))
    assert write(path, 10, range(0)).evaluated == {5}
    assert lines(path).count(("eval", 10)) == 0 and lines(path).count(("train", 10)) == 1


VALUES = {"loss": 1.25, "losses": {"itc": 0.5, "mlm": 0.75}, "lr": 1e-3}


def test_progress_without_a_terminal_is_plain_lines() -> None:
    stream = io.StringIO()
    progress = Progress(steps=20, samples_per_step=64, every=5, stream=stream)
    for step in range(1, 21):
        progress.step(step, VALUES, seconds=0.5, waited=0.1, extra_seconds=60)
    printed = stream.getvalue().splitlines()
    assert len(printed) == 4 and "\r" not in stream.getvalue()
    assert printed[0] == (
        "step  5/20  ETA 1:08  128 images/s  loss 1.250 (itc 0.5, mlm 0.75)  lr 1.0e-03  data wait 20%"
    )


def test_the_last_step_is_always_shown() -> None:
    stream = io.StringIO()
    progress = Progress(steps=7, samples_per_step=64, every=5, stream=stream)
    for step in range(1, 8):
        progress.step(step, VALUES, seconds=0.5, waited=0.1)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["5/7", "7/7"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_one_line_that_words_push_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    progress = Progress(steps=20, samples_per_step=64, every=5, stream=stream)
    progress.step(1, VALUES, seconds=0.5, waited=0.1)
    assert "\n" not in stream.getvalue() and len(stream.getvalue().lstrip("\r")) <= 59
    progress.say("a line that stays")
    assert stream.getvalue().endswith("\ra line that stays\n")


def test_other_ranks_are_silent() -> None:
    stream = io.StringIO()
    progress = Progress(steps=1, samples_per_step=64, every=1, on=False, stream=stream)
    progress.say("words")
    progress.step(1, VALUES, seconds=0.5, waited=0.1)
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0, "0:00"),
        (65.4, "1:05"),
        (3599.6, "1:00:00"),
        (7384, "2:03:04"),
        (90_000, "1 day 1:00:00"),
        (450_000, "5 days 5:00:00"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_tensorboard_purges_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in ((0, range(1, 8)), (5, range(6, 9))):
        board = TensorBoard(tmp_path, start)
        for step in steps:
            board.write("loss", step, {"total": float(step + 100 * start)})
        board.close()
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    assert [(e.step, e.value) for e in reader.Scalars("loss/total")] == [
        *((step, step) for step in range(1, 6)), (6, 506), (7, 507), (8, 508),
    ]  # fmt: skip
