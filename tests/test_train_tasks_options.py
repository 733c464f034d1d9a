"""Options of `train.evaluate` and `train.generate` for fine-tuned checkpoints: what they ask for happens, or is refused."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataload import annotations as notes
from dataload import shards
from tests.micro import arguments, corpus
from train import finetune
from train.config import ConfigError, PretrainConfig
from train.evaluate import __main__ as evaluate
from train.generate import __main__ as generate
from train.multimodal.config import PerceiverPretrainConfig
from train.pretrain import main as pretrain
from train.scores.captioning import check
from train.tasks import captioning, evaluating, vqa
from train.tasks.config import LOSSES, FinetuneConfig, TaskConfig, TaskName
from train.tasks.presets import task_preset


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained micro model."""
    out = tmp_path_factory.mktemp("start") / "run"
    assert pretrain(arguments(out, "--steps", "1", "--optim.warmup", "0")) == 0
    return out


def tuned(task: str, started: Path, *more: str) -> Path:
    """It, fine-tuned by one step; nothing is held out."""
    out = started.parent / "-".join([task, *more[1::2]])
    words = [task, "--checkpoint", str(started), "--data.train", *map(str, corpus().train)]
    words += ["--data.workers", "1", "--device", "cpu", "--precision", "fp32", "--batch-size", "8"]
    words += ["--steps", "1", "--optim.warmup", "0", "--eval-every", "0", "--out", str(out), *more]
    assert finetune.main(words) == 0
    return out


@pytest.fixture(scope="module")
def captioner(started: Path) -> Path:
    return tuned("captioning", started, "--task.beams", "2", "--task.length-penalty", "0.5")


@pytest.fixture(scope="module")
def chooser(started: Path) -> Path:
    return tuned("vqa", started, "--task.head", "chosen")


@pytest.fixture(scope="module")
def writer(started: Path) -> Path:
    return tuned("vqa", started, "--task.head", "written")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)).save(path)
    return path


def refusal(command: Any, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert command(list(map(str, words))) == 2
    return capsys.readouterr().err


# --- train.generate -------------------------------------------------------------------------------


def searched(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[dict[str, Any]]:
    """How `generate` was called by a task."""
    calls: list[dict[str, Any]] = []
    real = module.generate

    def spy(*given: Any, **options: Any) -> Any:
        calls.append(options)
        return real(*given, **options)

    monkeypatch.setattr(module, "generate", spy)
    return calls


def test_captions_are_written_as_asked(
    captioner: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = searched(monkeypatch, captioning)
    for options, wanted in (
        ((), ("beam", 2, 0.5, 12)),
        (("--beams", 5, "--length-penalty", 2), ("beam", 5, 2.0, 12)),
        (("--method", "greedy"), ("greedy", 1, 0.5, 12)),
        (("--method", "beam", "--max-length", 5), ("beam", 2, 0.5, 5)),
    ):
        words = ["--checkpoint", captioner, "--device", "cpu", *options, picture]
        assert generate.main(list(map(str, words))) == 0, capsys.readouterr().err
        call = calls.pop()
        assert tuple(call[name] for name in ("method", "beams", "length_penalty", "max_length")) == wanted
    for options, message in (
        (("--method", "greedy", "--beams", 3), "needs --method beam"),
        (("--method", "greedy", "--length-penalty", 2), "is of the beam search"),
        (("--max-length", 13), "from 3 to 12"),
        (("--method", "sample"), "greedy or beam search"),
    ):
        assert message in refusal(
            generate.main, capsys, "--checkpoint", captioner, "--device", "cpu", *options, picture
        )


def test_answers_are_written_as_asked(
    writer: Path, chooser: Path, picture: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    calls = searched(monkeypatch, vqa)
    asked = ["--device", "cpu", "--question", "what?", str(picture), "--checkpoint"]
    lengths = []
    for options, wanted in (
        ((), ("greedy", 1)),
        (("--method", "beam"), ("beam", 4)),
        (("--max-length", 3), ("greedy", 1)),
    ):
        assert generate.main([*asked, str(writer), *map(str, options)]) == 0, capsys.readouterr().err
        call = calls.pop()
        assert (call["method"], call["beams"]) == wanted
        lengths.append(call["max_length"] - call["prompt"].shape[1])
    assert lengths == [4, 4, 2]
    assert "from 3 to 5" in refusal(generate.main, capsys, *asked, writer, "--max-length", 6)
    for option, value in (("--beams", 2), ("--method", "greedy"), ("--max-length", 4), ("--seed", 12345678)):
        said = refusal(generate.main, capsys, *asked, chooser, option, value)
        assert f"{option} {value}: " in said and "chooses its answer" in said
    for option, value in (("--method", "sample"), ("--temperature", 2), ("--num", 3)):
        said = refusal(generate.main, capsys, *asked, writer, option, value)
        assert f"{option} {value}: a fine-tuned model writes by greedy or beam search" in said


# --- train.evaluate -------------------------------------------------------------------------------


def test_a_fine_tuned_model_is_no_pretrained_one(
    captioner: Path, started: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in ("perplexity", "retrieval"):
        said = refusal(evaluate.main, capsys, task, "--checkpoint", captioner, "--device", "cpu")
        assert f"is fine-tuned for captioning; {task} is scored of a pre-trained model" in said
        assert str(started) in said and ("train.finetune retrieval" in said) == (task == "retrieval")


def test_options_that_would_change_nothing_are_refused(
    captioner: Path, chooser: Path, writer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task, run, options, message in (
        ("captioning", captioner, ("--captions", "first"), "--captions first is for retrieval"),
        ("captioning", captioner, ("--pairs", "image-text"), "is for pre-trained models"),
        ("captioning", captioner, ("--beams", 0), "task.beams is 0"),
        ("vqa", chooser, ("--beams", 2), "--beams: "),
        ("vqa", chooser, ("--length-penalty", 2), "--length-penalty: "),
        ("vqa", writer, ("--prompt", "why"), "it must hold {question}"),
    ):
        said = refusal(evaluate.main, capsys, task, "--checkpoint", run, "--device", "cpu", *options)
        assert message in said


def heldout(*options: object) -> list[str]:
    return ["--device", "cpu", "--data", *map(str, corpus().heldout), *map(str, options)]


def test_a_split_that_the_built_in_corpus_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = Namespace(heldout=tuple(map(str, corpus().heldout)))
    monkeypatch.setattr(evaluating, "find_task_sources", lambda *_: sources)
    config = FinetuneConfig(task=TaskConfig("captioning"))
    for split in ("", "heldout"):
        assert evaluating.shards_for(Namespace(data=[], split=split), config) == sources.heldout
    with pytest.raises(ValueError, match="no shards of split 'nosuch'; there are: heldout"):
        evaluating.shards_for(Namespace(data=[], split="nosuch"), config)


def test_the_first_pictures_are_those_with_all_their_questions(writer: Path, tmp_path: Path) -> None:
    output = tmp_path / "vqa.json"
    command = ["vqa", "--checkpoint", str(writer), *heldout("--max-images", 2, "--output", output)]
    assert evaluate.main(command) == 0
    known = list(notes.annotated(shards.index(list(corpus().heldout)), needs=("questions",)))
    wanted = len(known[0].questions) + len(known[1].questions)
    found = json.loads(output.read_text())
    assert wanted > 2 and found["counts"]["questions"] == wanted == found["data"]["items"]
    assert found["data"]["max_images"] == 2


def test_the_pool_and_the_seed_are_those_asked_for(
    started: Path, captioner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    matcher = tuned("retrieval", started, "--seed", "5")
    command = ["retrieval", "--checkpoint", str(matcher), *heldout("--views", 14)]
    assert "--views 14 is for pre-trained models" in refusal(evaluate.main, capsys, *command)
    output = tmp_path / "retrieval.json"
    found = {}
    for pool in ("all", "first"):
        command = ["retrieval", "--checkpoint", str(matcher), *heldout("--captions", pool)]
        assert evaluate.main([*command, "--output", str(output)]) == 0
        found[pool] = json.loads(output.read_text())
    several = list(notes.annotated(shards.index(list(corpus().heldout))))
    assert found["all"]["counts"]["captions"] == sum(len(one.captions) for one in several) > 12
    assert found["first"]["counts"]["captions"] == 12 and found["first"]["captions_per_picture"] == 1
    assert found["all"]["seed"] == 5
    seeds: list[int] = []
    plan = check(("CIDEr",), tokenizer="regex")  # Java takes seconds
    monkeypatch.setattr(captioning.Captioning, "plan", lambda self: plan)
    real = captioning.derangement
    monkeypatch.setattr(
        captioning, "derangement", lambda count, seed: seeds.append(seed) or real(count, seed)
    )
    command = ["captioning", "--checkpoint", str(captioner), *heldout("--output", output, "--beams", 1)]
    assert evaluate.main([*command, "--seed", "7"]) == 0 and seeds == [7]
    assert json.loads(output.read_text())["seed"] == 7


def test_each_evaluation_has_its_own_submission(captioner: Path, tmp_path: Path) -> None:
    """Their plain names are for a run's own and for the scores that stand beside its checkpoint by default."""
    own = tmp_path / "caption_results.json"
    own.write_text("a run's")
    outputs = [tmp_path / "captioning.json", tmp_path / "mine.json"]
    for output in outputs:
        command = ["captioning", "--checkpoint", str(captioner), *heldout("--output", output, "--beams", 1)]
        assert evaluate.main([*command, "--max-images", "2"]) == 0
        assert len(json.loads(output.with_name(f"{output.stem}-caption_results.json").read_text())) == 2
    assert own.read_text() == "a run's"


# --- train.finetune -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*LOSSES])
def test_a_preset_sets_only_what_its_task_reads(kind: TaskName) -> None:
    start = PerceiverPretrainConfig() if kind == "audio" else PretrainConfig()
    assert task_preset(kind, start).part_problems(1) == []


def test_chosen_answers_leave_the_default_beams_unread() -> None:
    config = task_preset("vqa", PretrainConfig())
    assert replace(config, task=TaskConfig("vqa", head="chosen")).part_problems(1) == []


@pytest.mark.parametrize(
    ("kind", "part", "values", "said"),
    [
        ("captioning", "task", {"rerank": 4}, "task.rerank is 4; it is for retrieval, not captioning"),
        ("retrieval", "task", {"beams": 2}, "task.beams is 2; it is for captioning and vqa, not retrieval"),
        ("retrieval", "data", {"captions_per_image": 3}, "data.captions_per_image is 3; it is for captioning, not retrieval"),
        ("captioning", "task", {"class_ids": ("1",)},
         "task.class_ids is ('1',); it is for detection and segmentation and audio, not captioning"),
        ("vqa", "task", {"answers": 9}, "task.answers is for answers that are chosen, not for head written"),
        ("vqa", "task", {"head": "chosen", "beams": 4}, "task.beams is for answers that are written, not for head chosen"),
        ("retrieval", "task", {"rerank": -1}, "task.rerank is -1; it must be 0 (off) or more"),
        ("detection", "data", {"speed": 0.1}, "data.speed is 0.1; it is for audio, not detection"),
        ("vqa", "objectives", {"self_critical": 4}, "objectives.self_critical is 4; it is for captioning, not vqa"),
    ],
)  # fmt: skip
def test_what_another_task_reads_is_refused(
    kind: TaskName, part: str, values: dict[str, Any], said: str
) -> None:
    config = task_preset(kind, PretrainConfig())
    changed = replace(config, **{part: replace(getattr(config, part), **values)})
    assert said in changed.part_problems(1)


def test_what_an_earlier_version_passed_over_does_not_keep_a_model_from_its_scores() -> None:
    config = task_preset("captioning", PretrainConfig())
    old, wrong = (replace(config, task=replace(config.task, **one)) for one in ({"rerank": 4}, {"beams": 0}))
    evaluating.check_writing(Namespace(task="captioning", beams=None, length_penalty=None), old)
    with pytest.raises(ConfigError, match="task.beams is 0"):
        evaluating.check_writing(Namespace(task="captioning", beams=None, length_penalty=None), wrong)
    prompted = replace(task_preset("retrieval", PretrainConfig()), task=TaskConfig("retrieval", prompt="old"))
    assert task_preset("retrieval", prompted).part_problems(1) == []
