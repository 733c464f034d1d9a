"""`torchrun -m train.evaluate`: three ranks say what one process says, also of pictures that cannot be read."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.micro import arguments, corpus
from tests.ranks import Agent
from train import finetune
from train.evaluate import __main__ as evaluate
from train.pretrain import main as pretrain

BROKEN = 3  # of pictures in batches of two, the second rank's
CHANGING = ("date", "command")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained micro model."""
    out = tmp_path_factory.mktemp("start") / "run"
    assert pretrain(arguments(out, "--steps", "1", "--optim.warmup", "0")) == 0
    return out


@pytest.fixture(scope="module")
def detector(started: Path) -> Path:
    """It, fine-tuned."""
    paths, out = corpus(), started.parent / "detector"
    words = ["detection", "--checkpoint", str(started), "--data.train", *map(str, paths.train)]
    words += ["--data.workers", "1", "--device", "cpu", "--precision", "fp32", "--batch-size", "8"]
    assert (
        finetune.main([*words, "--steps", "1", "--optim.warmup", "0", "--eval-every", "0", "--out", str(out)])
        == 0
    )
    return out


def with_a_broken_picture(folder: Path) -> Path:
    """The held-out pictures, one of which is no picture."""
    (source,), shard = corpus().heldout, folder / "heldout-000000.tar"
    keys: list[str] = []
    with tarfile.open(source) as read, tarfile.open(shard, "w") as written:
        for member in read:
            file = read.extractfile(member)
            assert file is not None
            data = file.read()
            key, _, kind = member.name.partition(".")
            keys += [] if key in keys else [key]
            if len(keys) == BROKEN + 1 and kind in ("jpg", "jpeg", "png", "webp"):
                data = b"no picture"
            member.size = len(data)
            written.addfile(member, io.BytesIO(data))
    (folder / "classes.json").write_bytes((source.parent / "classes.json").read_bytes())
    return shard


def said(output: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(output.read_text())
    return {name: value for name, value in record.items() if name not in CHANGING}


def test_three_ranks_score_what_one_does(
    detector: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shard = with_a_broken_picture(tmp_path)
    command = ["detection", "--checkpoint", str(detector), "--data", str(shard), "--device", "cpu"]
    command += ["--batch-size", "2", "--output"]
    alone, three = tmp_path / "one/detection.json", tmp_path / "three/detection.json"
    assert evaluate.main([*command, str(alone)]) == 0, capfd.readouterr().err
    launcher = ["--nproc-per-node", "3", "--monitor-interval", "0.1", "--rdzv-backend", "c10d"]
    agent = Agent(
        [*launcher, "--rdzv-endpoint", "localhost:0"], evaluate.main, [*command, str(three)],
        RANKS_OUTPUT=str(tmp_path / "said"),
    )  # fmt: skip
    try:
        assert agent.join(120) == [0], (tmp_path / "said-0.txt").read_text()
    finally:
        agent.kill()
    one, several = said(alone), said(three)
    assert one["counts"]["images"] == 11 and one["counts"]["broken_left_out"] == 1
    assert one["data"]["items"] == 12 and one["data"]["broken_left_out"] == 1
    assert several == one, "every figure, and what was left out"
    for name in ("detection-detection_results.json",):
        assert (three.parent / name).read_bytes() == (alone.parent / name).read_bytes()
    found = json.loads((alone.parent / "detection-detection_results.json").read_text())
    assert len({box["image_id"] for box in found}) == 11
    printed = (tmp_path / "said-0.txt").read_text()
    assert printed.count("written to") == 1 and printed.count("left out, cannot be read") == 1


def test_a_pretrained_model_is_scored_by_the_first_rank(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "retrieval.json"
    command = ["retrieval", "--checkpoint", str(started), "--device", "cpu", "--output", str(output)]
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, written in ((2, False), (1, False), (0, True)):
        monkeypatch.setenv("RANK", str(rank))
        assert evaluate.main(command) == 0
        assert output.exists() == written


def test_options_are_judged_before_any_picture(
    detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["detection", "--checkpoint", str(detector), "--device", "cpu"]
    for more, message in (
        (("--batch-size", "0"), "--batch-size must be at least 1"),
        (("--max-images", "-2"), "--max-images must be at least 1"),
        (("--output", str(tmp_path)), "is a directory"),
    ):
        assert evaluate.main([*command, *more]) == 2
        assert message in capsys.readouterr().err
