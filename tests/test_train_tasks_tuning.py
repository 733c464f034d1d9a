"""Which weights learn, and how a checkpoint's get into a task's model."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dataload.tokenizer import train_tokenizer
from models.aurora import Aurora
from models.perceiver import PERCEIVER_SIZES
from models.perceiver.classify import SoundClassifier
from models.writing import Writer
from tests.micro import MODEL, arguments, corpus
from train import finetune
from train.checkpoint import load_model
from train.config import ConfigError
from train.pretrain import main as pretrain
from train.tasks.config import FinetuneConfig, TuneConfig
from train.tasks.presets import task_preset
from train.tasks.tuning import load_base, prepare

TINY = replace(
    PERCEIVER_SIZES["tiny"], latents=4, latent_width=64, latent_layers=1, latent_head_dim=32,
    audio_stem="conv", audio_range=10.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained micro model."""
    out = tmp_path_factory.mktemp("start") / "run"
    assert pretrain(arguments(out, "--steps", "1", "--optim.warmup", "0")) == 0
    return out


def command(task: str, start: Path, out: Path, *more: str) -> list[str]:
    words = [
        task,
        "--checkpoint",
        str(start),
        "--data.train",
        *map(str, corpus().train),
        "--data.workers",
        "1",
    ]
    words += [
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--batch-size",
        "8",
        "--steps",
        "2",
        "--optim.warmup",
        "0",
    ]
    return [*words, "--eval-every", "0", "--out", str(out), *more]


def test_a_run_that_could_learn_nothing_is_refused(
    started: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All frozen, and all that the losses reach."""
    assert finetune.main(command("captioning", started, tmp_path / "a", "--tune.freeze", "all")) == 2
    assert "nothing is left that learns" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no head of its own"):
        prepare(Writer(Aurora(MODEL)), TuneConfig(freeze=("all",)))
    assert any(p.requires_grad for p in prepare(Writer(Aurora(MODEL)), TuneConfig(("all",), 2)).parameters())
    rest = [
        name for name, _ in Writer(Aurora(MODEL)).base.named_children() if name != "pyramid"
    ]  # not for captions
    freeze = ("--tune.freeze", *rest, "logit_scale", "logit_bias")
    code = finetune.main(command("captioning", started, tmp_path / "b", *freeze))
    assert code == 2 and "no weight is left that captioning learns by" in capsys.readouterr().err


def test_new_words_learn_beside_lora(started: Path, tmp_path: Path) -> None:
    """Another tokenizer's pieces have new embeddings; LoRA holds the weights that were pre-trained, and not these."""
    out, other = tmp_path / "run", tmp_path / "other.model"
    train_tokenizer(["a red circle left of a small blue square"] * 50, other, 300)
    words = ("--data.tokenizer", str(other), "--tune.lora-rank", "2", "--tune.freeze", "all")
    assert finetune.main(command("captioning", started, out, *words)) == 0
    before, after = load_model(started).model.state_dict(), load_model(out).model.state_dict()
    name = "decoder.embedding.weight"
    assert not torch.equal(after[f"base.{name}"], before[name])
    assert torch.equal(after["base.decoder.norm.weight"], before["decoder.norm.weight"])
    same = command(
        "captioning", started, tmp_path / "same", "--data.tokenizer", str(corpus().tokenizer), "--dry-run"
    )
    assert (
        finetune.completed(finetune.parse(same)).data.tokenizer == ""
    )  # the checkpoint's own: nothing is new
    learning = {n for n, p in load_model(out).model.named_parameters() if p.requires_grad}
    assert f"base.{name}" in learning and all(".lora_" in n or "embedding" in n for n in learning)


def test_a_task_goes_on_with_its_prompt() -> None:
    start = task_preset("captioning", FinetuneConfig(model=MODEL))
    start = replace(start, task=replace(start.task, prompt="a photo of"))
    assert task_preset("captioning", start).task.prompt == "a photo of"
    assert task_preset("vqa", start).task.prompt == "{question}"


@pytest.mark.parametrize(("task", "library"), [("captioning", "pycocoevalcap"), ("detection", "pycocotools")])
def test_what_scores_is_asked_for_before_the_first_step(
    task: str, library: str, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    heldout = ("--data.heldout", *map(str, corpus().heldout))
    assert finetune.main(command(task, started, tmp_path / "run", *heldout)) == 2
    assert "pip install 'auroraio[eval]'" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert finetune.main(command(task, started, tmp_path / "unscored")) == 0


@pytest.mark.parametrize("seconds", [0.5, 2.0])
def test_sounds_of_another_length_keep_their_moments(seconds: float) -> None:
    """A sound that both models can read is read by both alike."""
    torch.manual_seed(0)
    first = SoundClassifier(TINY, 3).eval()
    other = SoundClassifier(replace(TINY, audio_seconds=seconds), 3).eval()
    assert load_base(other, first.base.state_dict()) == []
    other.head.load_state_dict(first.head.state_dict())
    length = 8000 if seconds < 1 else 16000
    sound, offsets = 0.1 * torch.randn(length), torch.tensor([0, length], dtype=torch.int32)
    torch.testing.assert_close(other.classes(sound, offsets), first.classes(sound, offsets))
    if seconds > 1:  # what lies later has the position of the last moment at first
        had, has = (model.base.adapters["audio"].positions for model in (first, other))
        assert torch.equal(has[len(had) :], had[-1:].expand_as(has[len(had) :]))
        longer = torch.randn(32000)
        assert other.classes(longer, torch.tensor([0, 32000], dtype=torch.int32)).isfinite().all()
        rows = [model.base.queries["audio"].queries for model in (first, other)]
        assert torch.equal(rows[1][: len(rows[0])], rows[0])
        assert torch.equal(rows[1][len(rows[0]) :][:4], rows[0][-4:])
    with pytest.raises(ConfigError, match="does not fit the model"):
        load_base(SoundClassifier(replace(TINY, audio_patch=(8, 10)), 3), first.base.state_dict())
