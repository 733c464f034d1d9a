"""The command `python -m train.pretrain` as its users type it: a run, resuming, signals, several processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import ROOT, arguments, command, losses, metric_lines
from safetensors.torch import load_file

from dataload.pipeline import Loader
from train.checkpoint import read
from train.presets import preset
from train.pretrain import main


def weights(out: Path, step: int = 12) -> dict[str, torch.Tensor]:
    return load_file(out / f"checkpoints/step-{step:06d}/model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps without interruption."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main(arguments(out)) == 0
    return out


@pytest.fixture
def halfway(straight: Path, tmp_path: Path) -> Path:
    """The same run as it was after step 6 (later checkpoints removed; metrics still go to the end, as after a
    kill).
    """
    out = tmp_path / "halfway"
    shutil.copytree(straight, out)
    for step in (9, 12):
        shutil.rmtree(out / f"checkpoints/step-{step:06d}")
    return out


def test_a_run_leaves_everything_that_is_promised(straight: Path) -> None:
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["steps"] == 12 and summary["images"] == 12 * 16
    assert summary["checkpoint"] == "checkpoints/step-000012"
    recall = summary["evaluation"]["scores"]["retrieval"]["text_to_image/R@1"]
    assert recall["chance"] == pytest.approx(1 / 12) and "shuffled" in recall
    perplexity = summary["evaluation"]["scores"]["perplexity"]["perplexity"]
    assert perplexity.keys() == {"value", "shuffled", "unigram"}
    assert list(losses(straight)) == list(range(1, 13))
    line = metric_lines(straight)[-1]
    assert line["losses"].keys() == {"mim", "itc", "caption", "mlm"}
    assert line["loss"] == pytest.approx(
        sum(w * line["losses"][k] for k, w in summary["objectives"].items()), rel=1e-5
    )
    assert line["peak_memory"] > 50e6 and line["images_per_second"] > 0 and 0 <= line["data_wait"] <= 1
    assert "<html" in (straight / "report.html").read_text()[:500]
    assert any((straight / "tensorboard").iterdir())
    assert (straight / "checkpoints/latest").read_text() == "step-000012\n"


def test_loss_falls(straight: Path) -> None:
    totals = [line["loss"] for line in metric_lines(straight)]
    assert sum(totals[-3:]) < sum(totals[:3])


def test_resume_is_exact(straight: Path, halfway: Path) -> None:
    assert main(arguments(halfway, "--resume", "auto")) == 0
    assert same_weights(straight, halfway)
    assert losses(straight) == losses(halfway)


def test_resume_comparison_notices_a_wrong_data_position(
    straight: Path, halfway: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Loader.load_state_dict

    def broken(self: Loader, state: dict[str, Any]) -> None:
        load(self, off_by_one(state))

    monkeypatch.setattr(Loader, "load_state_dict", broken)
    assert main(arguments(halfway, "--resume", "auto")) == 0
    assert not same_weights(straight, halfway)
    assert losses(straight) != losses(halfway)


def off_by_one(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a loader that has consumed one pair more than it says."""
    return {**state, "captioned": state["captioned"] + 1}


def test_resume_of_a_finished_run_only_scores_again(halfway: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    shutil.copytree(straight, out)
    assert main(arguments(out, "--resume", "auto")) == 0
    assert same_weights(straight, out)
    assert len(metric_lines(out, "eval")) == 1


def test_damaged_checkpoint_is_passed_over_and_said(
    straight: Path, halfway: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = halfway / "checkpoints/step-000006/model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(arguments(halfway, "--resume", "auto")) == 0
    said = capsys.readouterr().out
    assert re.search(r"passed over: .*step-000006 is damaged: model.safetensors", said)
    assert "going on after step 3 of 12" in said
    assert same_weights(straight, halfway)


def test_resume_from_a_path_that_is_damaged_everywhere_is_refused(
    halfway: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (3, 6):
        (halfway / f"checkpoints/step-{step:06d}/optimizer.safetensors").write_bytes(b"short")
    assert main(arguments(halfway, "--resume", str(halfway))) == 2
    assert "none of the 2 checkpoints" in capsys.readouterr().err


def test_resume_with_another_model_is_refused(halfway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(halfway, "--resume", "auto", "--model.embedding-width", "32")) == 2
    assert "model.embedding_width was 16, now 32" in capsys.readouterr().err


def test_what_changed_since_the_checkpoint_is_said(halfway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = (halfway / "command.txt").read_text().splitlines()[0]
    assert main(arguments(halfway, "--resume", "auto", "--optim.lr", "0.002")) == 0
    said = capsys.readouterr().out
    assert f"optim.lr was {preset('aurora-tiny').optim.lr} in the checkpoint; from now on 0.002" in said
    assert f"that one was begun by {begun}\n" in said and "train.pretrain" in begun


def test_a_disk_without_room_is_named_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.setup.free_disk", lambda out: 1_000_000)
    assert main(arguments(tmp_path / "run", "--steps", "1", "--optim.warmup", "0")) == 0
    assert "but 1 MB are free at" in capsys.readouterr().out


def test_killed_run_ends_as_if_nothing_had_happened(straight: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle, as the kernel or a cluster sends it, then --resume auto."""
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "train.pretrain", *arguments(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    for line in process.stdout:
        if line.startswith("step  7"):
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    assert not (out / "checkpoints/step-000012").exists(), "it was too quick to be killed"
    assert main(arguments(out, "--resume", "auto")) == 0
    assert same_weights(straight, out)
    assert losses(straight) == losses(out)
    assert not list((out / "checkpoints").glob(".unfinished*"))


# with batch norm, whose statistics an unfinished step must not change
ACCUMULATED = ("--save-every", "0", "--accumulation", "2", "--model.image-pooling", "mean")


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps of two micro-steps each, without interruption."""
    out = tmp_path_factory.mktemp("accumulated") / "run"
    assert main(arguments(out, *ACCUMULATED)) == 0
    return out


def test_control_c_saves_and_says_how_to_go_on(accumulated: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, "-m", "train.pretrain", *arguments(out, *ACCUMULATED)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("step  4"):
            process.send_signal(signal.SIGINT)
            break
    said += process.stdout.read()
    assert process.wait() == 130, said
    go_on_and_compare(said, "SIGINT", out, accumulated)


def test_sigterm_between_micro_steps_saves_the_step_before(
    accumulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of step 5's gradients are there when the signal comes: the checkpoint is that of step 4, data
    position included.
    """
    from train.engine import TorchEngine

    real, calls = TorchEngine.losses, iter(range(100))

    def terminated(self: TorchEngine, *args: Any) -> dict[str, torch.Tensor]:
        if next(calls) == 2 * 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "losses", terminated)
        assert main(arguments(out, *ACCUMULATED)) == 143
    said = capsys.readouterr().out
    assert "after step 4 of 12" in said
    go_on_and_compare(said, "SIGTERM", out, accumulated)


def go_on_and_compare(said: str, name: str, out: Path, whole: Path) -> None:
    """Type the command that a stopped run printed, then compare it with a run that was never stopped."""
    stopped = re.search(r"stopped by (\w+) after step (\d+) of 12; saved in (.*)", said)
    assert stopped and stopped[1] == name, said
    assert Path(stopped[3]).name == f"step-{int(stopped[2]):06d}" and Path(stopped[3]).is_dir()
    typed = re.search(r"go on with: \S*python -m train.pretrain (.*)", said)
    assert typed and typed[1].endswith(f"--out {out} --resume auto") and typed[1].count("--out") == 1
    assert main(typed[1].split()) == 0
    assert same_weights(whole, out)
    assert losses(whole) == losses(out)


def test_signal_during_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The evaluation is given up, the run saved; the resumed run makes up for it."""
    import train.run as between

    score = between.evaluate_model

    def interrupted(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)  # the signal ends this
        raise AssertionError("the evaluation went on")

    out = tmp_path / "run"
    monkeypatch.setattr(between, "evaluate_model", interrupted)
    assert main(arguments(out, "--eval-every", "6", "--save-every", "0")) == 143
    assert "stopped by SIGTERM after step 6" in capsys.readouterr().out
    assert metric_lines(out, "eval") == []

    monkeypatch.setattr(between, "evaluate_model", score)
    assert main(arguments(out, "--eval-every", "6", "--save-every", "0", "--resume", "auto")) == 0
    assert [line["step"] for line in metric_lines(out, "eval")] == [6, 12]


def test_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    """A process that hangs after the first Ctrl-C still obeys the second."""
    code = (
        "import os, signal, time; from train.signals import Stop; stop = Stop().install()\n"
        "os.kill(os.getpid(), signal.SIGINT); assert stop; print('first', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(30)"
    )
    started = time.monotonic()
    done = command("-c", code)
    assert done.stdout == "first\n" and done.returncode == -signal.SIGINT
    assert time.monotonic() - started < 20


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    """torchrun with gloo: every loss (negatives come from both ranks) and every gradient, up to rounding."""
    exact = ("--steps", "4", "--save-every", "0", "--model.decoder-dropout", "0", "--accumulation", "2")
    single, double = tmp_path / "single", tmp_path / "double"
    # The negatives of one process come in micro-batches as large as those of two together.
    assert main(arguments(single, *exact)) == 0
    done = command(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train.pretrain"),
        *arguments(double, *exact),
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("step 4/4") == 1
    for step, parts in losses(single).items():
        for name, value in parts.items():
            assert losses(double)[step][name] == pytest.approx(value, rel=1e-5, abs=1e-6), (step, name)
    # Gradients, by AdamW's first moment. (Weights without influence follow the signs of rounding errors.)
    one, two = (read(out / "checkpoints/step-000004")[0].engine.optimizer for out in (single, double))
    moments = [name for name in one if name.startswith("exp_avg.")]
    largest = max(one[name].abs().max().item() for name in moments)
    assert max((one[name] - two[name]).abs().max().item() for name in moments) < 1e-4 * largest
    assert one.keys() == two.keys() and len(moments) > 50


@pytest.mark.parametrize(
    "off, scored, said",
    [
        (("mim", "caption", "mlm"), {"retrieval"}, "R@1/5/10 text to image"),
        (("itc", "mim"), {"perplexity"}, "held out at step 2: masked-word perplexity"),
        (("itc", "caption", "mlm"), {"mim"}, "neither itc nor mlm is trained"),
    ],
)
def test_only_what_is_trained_is_scored(
    off: tuple[str, ...], scored: set[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = [word for name in off for word in (f"--objectives.{name}", "0")]
    assert main(arguments(tmp_path / "run", "--steps", "4", "--eval-every", "2", *weights)) == 0
    result = json.loads((tmp_path / "run/summary.json").read_text())["evaluation"]
    assert set(result["scores"]) == scored
    assert ("generated" in result["counts"]) == ("caption" not in off)
    assert said in capsys.readouterr().out
    assert (tmp_path / "run/report.html").stat().st_size > 10_000


def test_non_finite_steps_are_skipped_then_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.engine import TorchEngine

    real, calls = TorchEngine.losses, iter(range(100))

    def sometimes_nan(self: TorchEngine, *args: Any) -> dict[str, torch.Tensor]:
        found = real(self, *args)
        if next(calls) in (1, 4, 5, 6):
            found["itc"] = found["itc"] * float("nan")
        return found

    monkeypatch.setattr(TorchEngine, "losses", sometimes_nan)
    out = tmp_path / "run"
    assert main(arguments(out, "--optim.max-skipped", "3", "--save-every", "1")) == 1
    said = capsys.readouterr()
    assert "step 2 skipped: loss nan" in said.out
    assert "3 steps in a row had a non-finite loss or gradient" in said.err and "step 4" in said.err
    assert all(tensor.isfinite().all() for tensor in weights(out, 6).values())
    before, after, later = weights(out, 1), weights(out, 2), weights(out, 3)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(after[name], later[name]) for name in before)


def test_a_second_run_takes_another_directory(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(straight, tmp_path / "runs/aurora-tiny")
    without_out = arguments(Path("x"))[:-2]
    assert main([*without_out, "--steps", "3"]) == 0
    assert (tmp_path / "runs/aurora-tiny-2/summary.json").exists()
    assert main([*without_out, "--steps", "3", "--resume", "auto"]) == 0
    assert "runs/aurora-tiny-2/checkpoints/step-000003: going on after step 3 of 3" in capsys.readouterr().out
    assert main([*without_out, "--out", "runs/aurora-tiny"]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_averaged_weights_are_kept_and_scored(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(arguments(out, "--ema-decay", "0.9", "--steps", "6")) == 0
    averaged = load_file(out / "checkpoints/step-000006/ema.safetensors")
    raw = weights(out, 6)
    assert averaged.keys() == raw.keys()
    assert not torch.equal(averaged["decoder.embedding.weight"], raw["decoder.embedding.weight"])
    half = tmp_path / "half"
    shutil.copytree(out, half)
    shutil.rmtree(half / "checkpoints/step-000006")
    assert main(arguments(half, "--ema-decay", "0.9", "--steps", "6", "--resume", "auto")) == 0
    again = load_file(half / "checkpoints/step-000006/ema.safetensors")
    assert all(torch.equal(averaged[name], again[name]) for name in averaged)


def test_dry_run_says_what_it_would_go_on_from(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(straight, "--resume", "auto", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert f"resume      {straight}/checkpoints/step-000012\n" in said and f"output      {straight}\n" in said
    assert main(arguments(straight, "--dry-run")) == 2
    assert f"{straight} holds a run already" in capsys.readouterr().err
    assert main(arguments(straight, "--resume", "auto", "--model.width", "32", "--dry-run")) == 2
    assert "the checkpoint is of another model: model.width was 16, now 32" in capsys.readouterr().err
