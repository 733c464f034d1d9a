"""Fine-tuning and evaluation on tasks, with a micro model on the built-in corpus."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dataload import annotations as notes
from dataload import images, scenes, shards
from dataload.annotated import Items, LoadingConfig, TaskLoader, TaskSet
from dataload.annotations import Annotations, Object, read_annotations
from dataload.scenes import media as scenes_media
from dataload.scenes.text import Scene, SceneObject
from dataload.scenes.truth import ask
from dataload.tokenizer import EOS, Tokenizer
from dataload.views import GREY, ViewConfig, seen_objects, training_view, whole_view
from models import load_pretrained
from models.pretrained import fitted
from tests.micro import arguments, corpus, losses
from train import finetune
from train.checkpoint import load_model, read_config
from train.evaluate import __main__ as evaluate
from train.export.__main__ import main as export
from train.generate import __main__ as generate
from train.pretrain import main as pretrain
from train.scores import captioning, java
from train.tasks.config import FinetuneConfig, TuneConfig
from train.tasks.presets import at_size
from train.tasks.registry import task_of
from train.tasks.tuning import prepare
from train.tasks.vqa import written


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained micro model."""
    out = tmp_path_factory.mktemp("start") / "run"
    assert pretrain(arguments(out, "--steps", "3")) == 0
    return out


def tune(task: str, start: Path, out: Path, *more: str) -> list[str]:
    paths = corpus()
    data = ("--data.train", *map(str, paths.train), "--data.heldout", *map(str, paths.heldout))
    return [
        task, "--checkpoint", str(start), *data, "--data.workers", "1", "--device", "cpu", "--precision", "fp32",
        "--batch-size", "8", "--steps", "4", "--optim.warmup", "1", "--eval-every", "0", "--save-every", "2",
        "--log-every", "4", "--out", str(out), *more,
    ]  # fmt: skip


# --- the corpus -----------------------------------------------------------------------------------


def test_boxes_and_masks_of_the_corpus_are_where_the_objects_are() -> None:
    index = shards.index(list(corpus().heldout))
    found = list(notes.annotated(index, needs=("objects", "questions")))
    assert len(found) == 12
    for one in found:
        pixels = np.asarray(images.decode(index.image(one.sample))).astype(int)
        ground = np.median(pixels.reshape(-1, 3), axis=0)
        for thing in one.objects:
            mask = thing.mask(one.height, one.width)
            left, top, width, height = map(int, thing.bbox)
            box = np.zeros_like(mask)
            box[top : top + height, left : left + width] = True
            assert mask.sum() == thing.area and not (mask & ~box).any()
            assert mask[top].any() and mask[top + height - 1].any() and mask[:, left].any()
            outside = np.abs(pixels - ground).sum(-1)[~box]
            if len(one.objects) == 1:  # nothing else is to be seen
                assert np.abs(pixels - ground).sum(-1)[mask].mean() > outside.mean() + 40
        for question in one.questions:
            assert len(question.answers) == 10 and question.multiple_choice_answer in question.answers


def test_questions_have_one_true_answer() -> None:
    first = SceneObject("ring", "red", "solid", "small", "top left")
    second = SceneObject("star", "red", "striped", "large", "bottom right")
    for seed in range(40):
        for kind, question, answer in ask(Scene("mint", (first, second)), random.Random(seed)):
            assert kind != "what shape", "two objects are red"
            if kind == "how many":
                assert answer == "2"
            if kind == "what color":
                assert answer == "red"
            if kind == "where":
                assert answer == ("top left" if "ring" in question else "bottom right")
            if kind == "is there":
                there = "red ring" in question or "red star" in question
                assert (answer == "yes") == there


# --- views ----------------------------------------------------------------------------------------


def encoded(width: int, height: int, box: tuple[int, int, int, int]) -> bytes:
    import io

    image = Image.new("RGB", (width, height), (10, 10, 10))
    image.paste((250, 0, 0), box)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_boxes_follow_crops_and_flips() -> None:
    box = (30, 20, 70, 50)
    data = encoded(120, 80, box)
    thing = Object(1, (30, 20, 40, 30), 1, "thing", area=1200)
    for seed in range(12):
        view = training_view(data, ViewConfig(64, (0.6, 1.0)), np.random.default_rng(seed))
        boxes, kept = seen_objects(view, [thing])
        red = (view.pixels[..., 0].astype(int) - view.pixels[..., 1]) > 120
        if len(kept):
            rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
            wanted = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose(boxes[0], wanted, atol=1.6)
        back = view.back(view.boxes(np.array([[30, 20, 70, 50]])))
        np.testing.assert_allclose(back[0], box, atol=1e-6)
    whole = whole_view(data, 60)
    assert whole.shown == (60, 40) and tuple(whole.pixels[50, 5]) == GREY
    stored = np.zeros((80, 120), np.uint8)
    stored[20:50, 30:70] = 3
    seen = whole.label_map(stored)
    assert set(np.unique(seen)) == {0, 3, 255} and (seen[40:] == 255).all()
    assert (seen == 3).sum() == pytest.approx(20 * 15, abs=40)


def test_crowds_and_what_is_cut_off_are_no_targets() -> None:
    data = encoded(100, 100, (0, 0, 10, 10))
    view = whole_view(data, 50)
    objects = [Object(1, (0, 0, 50, 50), 1, "a", True, 1.0), Object(2, (95, 95, 60, 60), 1, "a", False, 1.0)]
    assert len(seen_objects(view, objects)[1]) == 0


# --- the loader -----------------------------------------------------------------------------------


def test_batches_do_not_depend_on_threads_and_go_on_where_they_were() -> None:
    paths = [str(path) for path in corpus().train]
    items = Items(paths, ("questions",), each=lambda one: len(one.questions))
    tokenizer = Tokenizer.load(corpus().tokenizer)

    def make(items: Items, item: object, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        assert rng is not None
        return {"x": rng.random(2), "many": rng.random(int(rng.integers(1, 4)))}

    def loader(workers: int, rank: int = 0, size: int = 1) -> TaskLoader:
        return TaskLoader(
            LoadingConfig(8 // size, workers=workers), items, make, tokenizer, ragged=("many",), rank=rank,
            world_size=size,
        )  # fmt: skip

    with loader(0) as one, loader(2) as two:
        batches = [next(one) for _ in range(3)]
        for batch in batches:
            other = next(two)
            assert batch.items == other.items and torch.equal(batch["many"], other["many"])
        state = json.loads(json.dumps(two.state_dict()))
        following = next(two)
    with loader(1) as third:
        third.load_state_dict(state)
        assert torch.equal(next(third)["x"], following["x"])
    assert len(batches[0]["many"]) == len(batches[0]["many_sample"])
    with loader(0, 0, 2) as left, loader(0, 1, 2) as right:
        assert next(left).items + next(right).items == batches[0].items


# --- fine-tuning ----------------------------------------------------------------------------------

TASKS = {
    "detection": ("class", "box", "center"),
    "segmentation": ("pixel", "dice"),
    "vqa": ("text",),
    "captioning": ("text",),
    "retrieval": ("itc", "match"),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_from_start_to_page(
    task: str, started: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    started_java: list[str] = []
    for name, owner, function in (("PTB", captioning, "ptb_tokenize"), ("METEOR", java, "Meteor")):
        real = getattr(owner, function)
        monkeypatch.setattr(
            owner, function, lambda *given, name=name, real=real: started_java.append(name) or real(*given)
        )
    out = tmp_path / "run"
    more = ["--task.beams", "2"] if task in ("vqa", "captioning") else []
    assert finetune.main(tune(task, started, out, *more)) == 0, capsys.readouterr().err
    assert set(losses(out)[4]) == set(TASKS[task])
    summary = json.loads((out / "summary.json").read_text())
    scores = summary["evaluation"]["scores"]
    assert scores and all(np.isfinite(score["value"]) for score in scores.values())
    assert summary["started_from"] == str(started)
    config = read_config(out / "checkpoints/step-000004")
    assert isinstance(config, FinetuneConfig) and config.task.kind == task
    page = (out / "report.html").read_text()
    assert (
        "default-src 'none'" in page
        and page.count("data:image/") >= 12
        and "http:" not in page
        and "https:" not in page
    )
    # the command gives the figures of the run's own evaluation, and so do three ranks
    output = tmp_path / "again.json"
    command = [task, "--checkpoint", str(out), "--device", "cpu", "--output", str(output)]
    assert evaluate.main(command) == 0, capsys.readouterr().err
    again = json.loads(output.read_text())
    assert again["scores"] == scores and again["data"]["items"] == len(heldout_items(task, config))
    assert {"torch", "pycocotools"} <= set(again["versions"]) and again["tokenizer"]["sha256"]
    assert output.with_suffix(".html").is_file()
    if (
        task == "captioning"
    ):  # Java takes most of the time: once a tokenizer for each evaluation, one METEOR for both
        assert started_java.count("PTB") == 2 * again["caption_tokenizer"].startswith("ptb")
        assert started_java.count("METEOR") <= 1


def heldout_items(task: str, config: FinetuneConfig) -> Items:
    paths = [str(path) for path in corpus().heldout]
    one = task_of(task)
    return Items(paths, one.needs, media=one.media, each=one.parts)


def test_three_ranks_say_what_one_says(started: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert finetune.main(tune("detection", started, out)) == 0
    loaded = load_model(out)
    config, task = loaded.config, task_of("detection")
    assert isinstance(config, FinetuneConfig)
    heldout = TaskSet(heldout_items("detection", config), task.maker(config, loaded.tokenizer), batch_size=2)

    def said(rank: int, size: int) -> list:
        with torch.no_grad():
            return [
                one
                for batch in heldout.batches(rank, size)
                for one in task.predict(loaded.model, batch, heldout.items, config, loaded.tokenizer)
            ]

    alone = said(0, 1)
    three = sorted((one for rank in range(3) for one in said(rank, 3)), key=lambda one: one.item)
    assert [one.item for one in three] == list(range(12)), "each once"
    for a, b in zip(alone, three, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a.value, b.value, strict=True))


def test_a_stopped_run_goes_on_exactly(started: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finetune.main(tune("vqa", started, whole)) == 0
    assert finetune.main(tune("vqa", started, parts)) == 0
    last = parts / "checkpoints/step-000004"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    assert finetune.main(tune("vqa", started, parts, "--resume", "auto")) == 0
    first, second = (load_model(run).model.state_dict() for run in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_lora_and_frozen_parts(started: Path, tmp_path: Path) -> None:
    before = load_model(started).model.state_dict()
    lora, frozen = tmp_path / "lora", tmp_path / "frozen"
    assert finetune.main(tune("segmentation", started, lora, "--tune.lora-rank", "2")) == 0
    assert finetune.main(tune("detection", started, frozen, "--tune.freeze", "encoder")) == 0
    tuned = load_model(lora).model.state_dict()
    kept = {
        n.removeprefix("base.").replace(".base_layer", ""): t for n, t in tuned.items() if ".lora_" not in n
    }
    for name, tensor in before.items():
        if not name.startswith("pyramid"):
            assert torch.equal(kept[name], tensor), name
    ups = [t for n, t in tuned.items() if ".lora_B." in n and "encoder" in n]
    assert ups and all(t.abs().max() > 0 for t in ups), "every layer's change has been learned"
    after = load_model(frozen).model.state_dict()
    assert all(torch.equal(after[f"base.{n}"], t) for n, t in before.items() if n.startswith("encoder."))
    assert not torch.equal(after["base.pyramid.smooth.0.weight"], before["pyramid.smooth.0.weight"])
    image = Image.new("RGB", (40, 30), "red")
    segmented = load_pretrained(lora).segment(image)
    assert segmented.shape == (30, 40)  # merged
    # an exported one is merged in its file, and read by all that reads a run
    whole = tmp_path / "exported"
    assert export(["--checkpoint", str(lora), "--output", str(whole)]) == 0
    exported = load_pretrained(whole)
    assert not any(".lora_" in name for name in load_file(whole / "model.safetensors"))
    merged = load_pretrained(lora).model.state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in exported.model.state_dict().items())
    assert np.array_equal(exported.segment(image), segmented)
    assert "fine-tuned for segmentation" in (whole / "README.md").read_text()
    score = ["segmentation", "--device", "cpu", "--checkpoint"]
    assert evaluate.main([*score, str(lora), "--output", str(tmp_path / "a.json")]) == 0
    assert evaluate.main([*score, str(whole)]) == 0
    both = [json.loads(path.read_text()) for path in (tmp_path / "a.json", whole / "segmentation.json")]
    assert both[0]["scores"]["mIoU"]["value"] == pytest.approx(both[1]["scores"]["mIoU"]["value"], abs=1e-4)
    # the next task starts from this one's model, its LoRA merged
    assert finetune.main(tune("vqa", lora, tmp_path / "next")) == 0


def test_chosen_answers_and_a_submission(
    started: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    assert finetune.main(tune("vqa", started, out, "--task.head", "chosen", "--task.answers", "9")) == 0
    config = read_config(out / "checkpoints/step-000004")
    assert isinstance(config, FinetuneConfig) and len(config.task.classes) == 9
    handed_in = json.loads((out / "vqa_results.json").read_text())
    wanted = [
        q.question_id for one in notes.annotated(shards.index(list(corpus().heldout))) for q in one.questions
    ]
    assert [set(one) for one in handed_in] == [{"question_id", "answer"}] * len(wanted)
    assert [one["question_id"] for one in handed_in] == wanted
    assert all(one["answer"] in config.task.classes for one in handed_in)
    picture = tmp_path / "a.png"
    Image.new("RGB", (48, 48), "blue").save(picture)
    capsys.readouterr()
    ask_it = ["--checkpoint", str(out), "--question", "what color is it?", str(picture)]
    assert generate.main([*ask_it, "--device", "cpu", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["answer"] == load_pretrained(out).answer(picture, "what color is it?")
    assert generate.main(["--checkpoint", str(out), str(picture)]) == 2
    assert "answers a --question" in capsys.readouterr().err


def test_mistakes_are_said_before_any_step(
    started: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def message(*words: str) -> str:
        assert finetune.main(list(words)) == 2
        return capsys.readouterr().err

    assert "detection" in message("detections", "--checkpoint", str(started))
    assert "train.pretrain makes one" in message("vqa", "--checkpoint", str(tmp_path))
    assert "is for PerceiverIO" in message("audio", "--checkpoint", str(started))
    assert "no such part" in message(*tune("vqa", started, tmp_path / "x", "--tune.freeze", "head.of.state"))
    assert "{question}" in message(*tune("vqa", started, tmp_path / "x", "--task.prompt", "what"))
    assert evaluate.main(["detection", "--checkpoint", str(started)]) == 2
    assert "train.finetune detection" in capsys.readouterr().err


def test_zero_shot_classes(started: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "classify.json"
    command = ["classify", "--checkpoint", str(started), "--device", "cpu", "--output", str(output)]
    assert evaluate.main([*command, "--templates", "a {}", "there is a {}"]) == 0, capsys.readouterr().err
    found = json.loads(output.read_text())
    assert found["templates"] == ["a {}", "there is a {}"] and found["counts"]["pictures"] == 12
    assert 0 <= found["scores"]["top-1"]["value"] <= found["scores"]["top-5"]["value"] <= 1


def test_sounds_of_the_built_in_corpus_without_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Labels, classes and the tokenizer are the corpus' own; several labels are noticed."""
    whole = scenes_media.build
    small = {"train": 60, "uncaptioned": 0, "heldout": 4, "sounds": 40, "clips": 1, "heldout_media": 12}
    monkeypatch.setattr(scenes_media, "build", lambda folder, size: whole(folder, size=size, **small))
    out = tmp_path / "run"
    words = ["audio", "--data.cache", str(tmp_path / "cache"), "--data.workers", "1", "--device", "cpu"]
    words += ["--precision", "fp32", "--batch-size", "8", "--steps", "2", "--optim.warmup", "1"]
    words += ["--eval-every", "0", "--save-every", "2", "--out", str(out)]
    assert finetune.main(words) == 0, capsys.readouterr().err
    config = read_config(out / "checkpoints/step-000002")
    assert isinstance(config, FinetuneConfig) and config.task.several_labels and not config.checkpoint
    assert config.task.classes == ("circle", "square", "triangle", "star", "cross", "ring")
    evaluation = json.loads((out / "summary.json").read_text())["evaluation"]
    assert 0 < evaluation["scores"]["mAP"]["value"] <= 1
    again = tmp_path / "again.json"
    command = ["audio", "--checkpoint", str(out), "--device", "cpu", "--output", str(again)]
    assert evaluate.main(command) == 0, capsys.readouterr().err
    assert json.loads(again.read_text())["scores"] == evaluation["scores"]


# --- using a model --------------------------------------------------------------------------------


def test_three_lines_say_what_the_command_says(
    started: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    picture = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)).save(picture)
    model = load_pretrained(started)
    capsys.readouterr()
    assert (
        generate.main(["--checkpoint", str(started), "--method", "beam", "--device", "cpu", str(picture)])
        == 0
    )
    said = capsys.readouterr().out.strip().removeprefix(f"{picture}: ")
    assert " ".join(model.caption(picture).split()) == said
    ours = fitted(Image.open(picture).convert("RGB"), 32, "crop")
    assert np.array_equal(ours, images.resize_center_crop(Image.open(picture).convert("RGB"), 32))
    looks = torch.from_numpy(images.views(Image.open(picture).convert("RGB"), 32, 14))
    views = model.model.features(images.normalize(looks))[0].mean(0, keepdim=True)
    torch.testing.assert_close(
        model.image_embedding(picture, views=14), torch.nn.functional.normalize(views), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="4 views of a picture; supported: 1, 5, 14"):
        model.image_embedding(picture, views=4)
    odds = model.classify(picture, ["circle", "star"])
    assert sum(odds.values()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(model.image_embedding(picture), model.image_embedding([picture]))
    assert torch.equal(model.text_embedding("a circle"), model.text_embedding(["a circle"]))
    with pytest.raises(ValueError, match="not fine-tuned for questions"):
        model.answer(picture, "why?")
    with pytest.raises(FileNotFoundError, match="no checkpoint there"):
        load_pretrained(tmp_path / "nowhere")


def test_written_answers_are_cut_to_fit() -> None:
    tokens, targets = written(list(range(10, 40)), [50, 51], 12)
    assert tokens[0] == 2 and tokens[-1] == EOS and (tokens[-3:-1] == [50, 51]).all()
    assert (targets[-3:] == tokens[-3:]).all() and (targets[:-3] == -100).all()


def test_other_sizes_keep_the_meaning_of_positions() -> None:
    from models import AURORA_SIZES

    tiny = AURORA_SIZES["tiny"]
    larger = at_size(tiny, 256)
    assert larger.image_size == 256 and larger.bias_windows == (8, 8, 4, 2)
    assert at_size(tiny, 64) == tiny and replace(larger, image_size=64, bias_windows=None) == tiny


def test_annotations_of_a_sample_are_read_back(started: Path) -> None:
    index = shards.index(list(corpus().train))
    sample = int(np.flatnonzero(index.captioned)[0])
    one = read_annotations(index, sample)
    assert isinstance(one, Annotations) and one.width == 32 and one.objects[0].category in scenes.SHAPES


def test_statistics_of_frozen_parts_stay() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts = {name: torch.nn.Sequential(torch.nn.BatchNorm1d(3)) for name in ("encoder", "head")}
            self.base = torch.nn.ModuleDict(parts)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base["head"](self.base["encoder"](x))

    model = prepare(Two(), TuneConfig(freeze=("encoder",))).train()
    model(torch.randn(8, 3) + 5)
    before = torch.zeros(3)
    assert torch.equal(model.base["encoder"][0].running_mean, before)
    assert not torch.equal(model.base["head"][0].running_mean, before)
