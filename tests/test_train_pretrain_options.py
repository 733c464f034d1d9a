"""The command line of `python -m train.pretrain`: mistakes, help, and dry runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from micro import arguments

from train.pretrain import main


@pytest.mark.parametrize(
    "typed, said",
    [
        (["aurora-smal"], "called 'aurora-smal'. Did you mean aurora-small? There are: aurora-tiny, "),
        (["--batch-size", "64", "--accumulation", "7"], "64 cannot be split over accumulation 7 x 1 process; try 63 or 70"),
        (["--steps", "20", "--optim.warmup", "30"], "optim.warmup is 30 steps, but the run has 20"),
        (["--data.train", "nowhere.tar", "--data.tokenizer", "t.model"], "t.model does not exist"),
        (["--data.train", "nowhere.tar"], "python -m dataload.tokenizer --input nowhere.tar --vocab-size "),
        (["--device", "cuda:7"], "this machine has"),
        (["--device", "tpu"], "'tpu' is no torch device"),
        (["--resume", "no/such/run"], "no/such/run: no such directory"),
        ([f"--objectives.{name}=0" for name in ("mim", "itc", "caption", "mlm")], "nothing to learn"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(
    typed: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(typed) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "typed, said",
    [
        (["--model.vocab-size", "100"], "--model.vocab"),
        (["--model.image-size", "100"], "image_size = 100; it must be a positive multiple of 32 pixels"),
        (["--steps", "many"], "many"),
        (["--precision", "fp16"], "bf16"),
        (["--objectives.itc", "-1"], "ObjectiveConfig.itc = -1.0"),
    ],
)
def test_mistyped_options_are_refused(
    typed: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(typed)
    assert error.value.code == 2
    printed = capsys.readouterr()
    assert said in re.sub(r"[│\s]+", " ", printed.err + printed.out)


def test_vocabulary_of_the_tokenizer_must_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path / "run", "--model.vocabulary", "300")) == 2
    assert re.search(
        r"has \d+ pieces, more than the model's vocabulary of 300; set --model.vocabulary \d+",
        capsys.readouterr().err,
    )


def test_help_explains_every_field_and_lists_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["aurora-xl", "--help"])
    assert not end.value.code
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert "Optimizer steps. (default: 976563)" in text
    for words in (
        "aurora-xl",
        "--data.train",
        "--model.vocabulary",
        "Peak learning rate",
        "Samples per optimizer step",
    ):
        assert words in text


def test_list_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-presets"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "aurora-tiny", "aurora-photos", "aurora-small", "aurora-base", "aurora-large", "aurora-xl",
        "perceiver-tiny", "perceiver-real", "perceiver-sounds", "perceiver-small", "perceiver-base", "perceiver-large",
        "perceiver-xl",
    ]  # fmt: skip


def test_dry_run_prints_everything_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(arguments(out, "--dry-run")) == 0
    said = capsys.readouterr().out
    assert json.loads(said[: said.index("\n}") + 2])["model"]["width"] == 16
    assert "train: 1 shards, 80 captioned and 40 uncaptioned pictures" in said
    assert "heldout: 1 shards, 12 captioned and 0 uncaptioned pictures" in said
    for word in ("memory", "disk", "parameters", "time        unknown", "nothing was run"):
        assert word in said
    assert not out.exists()


def test_dry_run_lists_all_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = arguments(
        tmp_path / "run", "--dry-run", "--model.vocabulary", "300", "--keep-checkpoints", "1000000000"
    )
    assert main(typed) == 2
    problems = capsys.readouterr().out.split("this run cannot start:")[1]
    assert "vocabulary of 300" in problems and "disk:" in problems
