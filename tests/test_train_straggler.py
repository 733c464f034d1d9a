"""Ranks' times, and the one that holds the others up: by the numbers, and with two real ranks of which one is slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.micro import ROOT, arguments, metric_lines
from train.engine import Ranks
from train.engines.straggler import RankReport, Watch, as_columns, stragglers

EVEN = RankReport(data_wait=0.01, step_seconds=0.5, probe=0.002, peak_memory=1e9)


def test_even_ranks_and_a_single_one_have_no_straggler() -> None:
    assert stragglers([EVEN] * 8) == []
    assert stragglers([replace(EVEN, data_wait=0.4)]) == []
    # a tenth of a step is the bound
    assert stragglers([EVEN, EVEN, replace(EVEN, data_wait=0.055)]) == []


def test_a_rank_that_waits_for_data_is_named() -> None:
    (said,) = stragglers([EVEN, EVEN, replace(EVEN, data_wait=0.2), EVEN])
    assert said == (
        "rank 2 is a straggler: it waits 200 ms per step for data, the others 10 ms; steps take 500 ms"
    )


def test_a_slow_device_is_named() -> None:
    (said,) = stragglers([replace(EVEN, probe=0.008), EVEN])
    assert said.startswith("rank 0 is a straggler: its device takes 4.0 times as long")


def test_a_watch_gives_means_and_begins_anew() -> None:
    watch = Watch(Ranks(0, 0, 1), torch.device("cpu"))
    watch.add(1.0, 0.25)
    watch.add(3.0, 0.75)
    (mine,) = watch.report()
    assert (mine.step_seconds, mine.data_wait) == (2.0, 0.5) and mine.probe > 0 and mine.peak_memory > 1e6
    assert as_columns([mine])["step_seconds"] == [2.0]
    assert watch.report()[0].step_seconds == 0


SLOW_RANK = """
import os, sys, time
from dataload.pipeline import Loader
fetch = Loader.__next__
def slow(self):
    if os.environ["RANK"] == "1":
        time.sleep(0.6)
    return fetch(self)
Loader.__next__ = slow
from train.pretrain import main
sys.exit(main(sys.argv[1:]))
"""


def test_of_two_ranks_the_slow_one_is_named(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SLOW_RANK)
    words = arguments(tmp_path / "run", "--steps", "4", "--save-every", "0", "--log-every", "2")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *words],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    named = [line for line in done.stdout.splitlines() if "straggler: it waits" in line]
    assert named and all("rank 1 is a straggler" in line for line in named), done.stdout
    assert named[-1].startswith("step 4: ")  # the first steps of a run are slow in any case
    reports = metric_lines(tmp_path / "run", "ranks")
    assert [line["step"] for line in reports] == [2, 4]
    for line in reports:
        assert len(line["data_wait"]) == len(line["peak_memory"]) == 2
        assert line["data_wait"][1] > 0.59 and line["data_wait"][0] >= 0
    assert json.loads((tmp_path / "run/summary.json").read_text())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_probe_runs_on_a_gpu() -> None:
    from train.engines.straggler import probe

    assert 1e-6 < probe(torch.device("cuda")) < 1
