from __future__ import annotations

import io
import sys

import pytest

from dataload import progress
from dataload.progress import Progress, counted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("samples", 5) as quick:
        quick.step(5)
    assert capsys.readouterr().err == ""  # done sooner than a line is due
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with Progress("samples", 2000, done=1500) as slow:
        slow.step()
    assert capsys.readouterr().err.startswith("1,501 of 2,000 samples, ")
    assert list(counted("abc", "letters")) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[2].startswith("3 letters, ")


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("samples", 10, done=4) as bar:
        bar.step(6)
        bar.say("a line")
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "40%" in shown and "4/10" in shown and "a line\n" in shown
