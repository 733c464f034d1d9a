"""What tasks make of their data: classes by name, truth that cannot be read, samples that lack something."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataload.annotated import Items, TaskSet, collate
from dataload.annotations import Annotations, Object
from dataload.broken import BrokenSample
from dataload.tokenizer import Tokenizer
from dataload.views import whole_view
from models.aurora.detection import Detector, Found
from models.pretrained import Pretrained
from tests.micro import MODEL, arguments, corpus
from train import finetune
from train.config import ConfigError
from train.evaluate import __main__ as evaluate
from train.pretrain import main as pretrain
from train.scores.vqa import accuracy as official
from train.tasks.base import Prediction
from train.tasks.classes import with_ids
from train.tasks.config import FinetuneConfig, TaskConfig, TaskObjectives
from train.tasks.data import find_items
from train.tasks.detection import Detection
from train.tasks.registry import task_of
from train.tasks.running import score_task
from train.tasks.segmentation import Segmentation, Truth
from train.tasks.vqa import worth
from train.tasks.zeroshot import ZeroShot

SIDE = 24


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained micro model."""
    out = tmp_path_factory.mktemp("start") / "run"
    assert pretrain(arguments(out, "--steps", "1", "--optim.warmup", "0")) == 0
    return out


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def shard(folder: Path, samples: list[dict[str, bytes]], classes: dict[str, Any] | None = None) -> Path:
    """A tar whose samples have these members by extension, and classes.json beside it."""
    folder.mkdir(exist_ok=True)
    path = folder / "val-000000.tar"
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(samples):
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:04d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    if classes is not None:
        (folder / "classes.json").write_text(json.dumps(classes))
    return path


def picture(number: int = 0, **record: Any) -> dict[str, bytes]:
    pixels = np.random.default_rng(number).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    known = {"image_id": number, "width": SIDE, "height": SIDE, **record}
    return {"png": png(pixels), "json": json.dumps(known).encode()}


def items_of(task: Any, path: Path) -> Items:
    return Items([str(path)], task.needs, media=task.media, each=task.parts)


def config_of(kind: Any, **task: Any) -> FinetuneConfig:
    return FinetuneConfig(model=MODEL, task=TaskConfig(kind, **task), objectives=TaskObjectives(kind))


# --- classes --------------------------------------------------------------------------------------


def test_classes_by_name_get_the_ids_of_the_data() -> None:
    items = Items(list(map(str, corpus().train)), ("objects",))
    ids = {thing.category: thing.category_id for one in items.all() for thing in one.objects}
    found = Detection().complete(TaskConfig("detection", classes=("star", "circle")), items)
    assert found.classes == ("star", "circle")
    assert found.class_ids == (str(ids["star"]), str(ids["circle"]))
    by_id = Detection().complete(TaskConfig("detection", class_ids=(str(ids["ring"]),)), items)
    assert by_id.classes == ("ring",)
    seen = Segmentation().complete(TaskConfig("segmentation", classes=("star",)), items)
    assert (seen.classes, seen.class_ids) == (("background", "star"), ("", str(ids["star"])))
    again = Segmentation().complete(TaskConfig("segmentation", classes=("background", "star")), items)
    assert again == seen and Segmentation().complete(seen, items) == seen
    # something is asked of the model in each task
    for task, done in ((Detection(), found), (Segmentation(), seen)):
        config = replace(config_of(task.name), task=done)
        maker = task.maker(config, Tokenizer.load(corpus().tokenizer))
        views = [maker(items, item, np.random.default_rng(0)) for item in items.items[:8]]
        if task.name == "detection":
            assert any((view["classes"] >= 0).any() for view in views)
        else:
            assert any((view["label_map"] == 1).any() for view in views)


def test_classes_that_the_data_lacks_are_refused() -> None:
    listed = {"3": "cat", "7": "dog", "9": "dog"}
    for task, words in (
        (TaskConfig(classes=("cat", "unicorn")), ("'unicorn' not in here", "'cat', 'dog'")),
        (TaskConfig(class_ids=("4",)), ("'4' not in here", "'3', '7', '9'")),
        (TaskConfig(classes=("dog",)), ("'dog' has several ids", "'7', '9'")),
        (TaskConfig(classes=("cat",), class_ids=("3", "7")), ("1 names", "2 ids")),
        (TaskConfig(classes=("cat", "cat")), ("'cat' twice",)),
    ):
        with pytest.raises(ConfigError) as caught:
            with_ids(task, listed, "here")
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert with_ids(TaskConfig(), listed, "here").class_ids == ("3", "7", "9")
    assert with_ids(TaskConfig(classes=("hound",), class_ids=("7",)), listed, "here").classes == ("hound",)


def test_sounds_may_have_some_of_the_classes(tmp_path: Path) -> None:
    """By name or by AudioSet's ids; whether a sound has several is still noticed."""
    ids = {"/m/1": "bark", "/m/2": "meow", "/m/3": "rain"}
    listed = {"labels": [{"id": number, "name": name} for number, name in ids.items()]}
    task, known = task_of("audio"), ({"labels": ["bark"]}, {"labels": ["meow", "rain"]})
    samples = [{"wav": b"RIFF", "json": json.dumps(one).encode()} for one in known]
    items = items_of(task, shard(tmp_path, samples, listed))
    for given in (
        TaskConfig("audio", classes=("rain", "bark")),
        TaskConfig("audio", class_ids=("/m/3", "/m/1")),
    ):
        done = task.complete(given, items)
        assert (done.classes, done.class_ids) == (("rain", "bark"), ("/m/3", "/m/1")) and done.several_labels
    with pytest.raises(
        ConfigError, match="'snow' not in the labels of the training sounds; there are 'bark'"
    ):
        task.complete(TaskConfig("audio", classes=("snow", "rain")), items)


def test_the_command_refuses_unknown_classes(started: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--checkpoint", str(started), "--data.train", *map(str, corpus().train)]
    for task in ("detection", "segmentation"):
        assert finetune.main([task, *command, "--task.classes", "unicorn"]) == 2
        said = capsys.readouterr().err
        assert "'unicorn' not in" in said and "'circle'" in said
    assert finetune.main(["captioning", *command, "--task.classes", "star"]) == 2
    assert "captioning has no classes" in capsys.readouterr().err


# --- truth that cannot be read --------------------------------------------------------------------

MAPS = {"segmentation": [{"id": 0, "name": "sky"}, {"id": 1, "name": "sea"}]}
SEA = np.ones((SIDE, SIDE), np.uint8)


def test_damaged_label_maps_are_counted_when_scored(tmp_path: Path) -> None:
    whole = png(SEA)
    maps = [whole, whole[:40], whole, png(np.ones((SIDE, SIDE - 4), np.uint8)), whole]
    samples = [{**picture(i), "seg.png": one} for i, one in enumerate(maps)]
    task = Segmentation()
    items = items_of(task, shard(tmp_path, samples, MAPS))
    done = task.complete(TaskConfig("segmentation"), items)
    config = replace(config_of("segmentation"), task=done)
    tokenizer = Tokenizer.load(corpus().tokenizer)
    heldout = TaskSet(items, task.maker(config, tokenizer), batch_size=2)
    result = score_task(task.model(config), heldout, config, tokenizer, device=torch.device("cpu"), task=task)
    assert result is not None and result.counts["broken_left_out"] == 2
    assert [one.key for one in heldout.broken] == ["0001", "0003"]
    assert "label map" in heldout.broken[0].reason and f"{SIDE - 4}x{SIDE}" in heldout.broken[1].reason
    assert result.counts["pixels"] == 3 * SIDE * SIDE


def test_segmentation_refuses_the_other_kind_of_truth() -> None:
    """Its numbers mean other classes: a category that is called 1 is not the label map's 1."""
    thing = Object(1, (0, 0, 5, 5), 1, "boat", area=25.0)
    with_map = Annotations("k", label_map=SEA, has=frozenset(("segmentation",)))
    with_objects = Annotations("k", objects=(thing,), has=frozenset(("objects",)))
    maps = Truth(TaskConfig("segmentation", classes=("sky", "sea"), class_ids=("0", "1")))
    objects = Truth(TaskConfig("segmentation", classes=("background", "boat"), class_ids=("", "1")))
    assert (maps(with_map, SIDE, SIDE) == 1).all() and objects(with_objects, SIDE, SIDE).sum() == 25
    with pytest.raises(BrokenSample, match="it has objects, and this task's truth is a label map"):
        maps(with_objects, SIDE, SIDE)
    with pytest.raises(BrokenSample, match="it has a label map, and this task's truth is objects"):
        objects(with_map, SIDE, SIDE)


def test_masks_that_cannot_be_read_are_broken_samples() -> None:
    pytest.importorskip("pycocotools", reason="needs pycocotools: pip install 'auroraio[eval]'")
    good = Object(1, (0, 0, 4, 4), 1, "a", segmentation={"size": [8, 6], "counts": [0, 8, 40]})
    assert good.mask(8, 6)[:, 0].all() and good.mask(8, 6).sum() == 8
    for shape, size, words in (
        (((1.0, 2.0),), (8, 6), "mask cannot be read"),
        ({"size": [8, 6], "counts": "?"}, (9, 6), "mask"),
        ({"size": [8, 6], "counts": [0, 8, 40]}, (9, 6), "mask is 6x8, the picture 6x9"),
    ):
        with pytest.raises(BrokenSample, match=words):
            replace(good, segmentation=shape).mask(*size)


# --- items ----------------------------------------------------------------------------------------


def test_samples_without_an_item_are_lacking(tmp_path: Path) -> None:
    asked = {"question_id": 1, "question": "why?", "answers": ["so"]}
    records = [
        {"questions": [asked]},
        {"questions": []},
        {},
        {"questions": [asked, {**asked, "answers": []}]},
    ]
    task = task_of("vqa")
    items = items_of(task, shard(tmp_path, [picture(i, **one) for i, one in enumerate(records)]))
    assert (len(items), items.samples, items.lacking) == (3, 2, 2)
    first = Items([str(tmp_path)], task.needs, each=task.parts, most=2)
    assert [one.sample for one in first.items] == [0, 3, 3], (
        "a sample without a question is none of the first two"
    )


# --- boxes ----------------------------------------------------------------------------------------


class Fixed(Detector):
    """A detector that always finds the same."""

    def __init__(self, box: list[float]) -> None:
        torch.nn.Module.__init__(self)
        self.box = torch.nn.Parameter(torch.tensor([box]), requires_grad=False)

    def detect(self, images: torch.Tensor, **_: Any) -> list[Any]:
        return [Found(self.box, torch.ones(1), torch.zeros(1, dtype=torch.int64)) for _ in images]


@pytest.mark.parametrize(("width", "height"), [(67, 41), (100, 3), (41, 67), (200, 200)])
def test_boxes_go_back_by_the_factor_of_each_side(width: int, height: int, tmp_path: Path) -> None:
    """A picture's sides are rounded to whole pixels of the square, each by itself."""
    side = MODEL.image_size
    image = png(np.zeros((height, width, 3), np.uint8))
    (tmp_path / "picture.png").write_bytes(image)
    view = whole_view(image, side)
    whole = [0.0, 0.0, *map(float, view.shown)]
    classes = {"objects": [{"id": 5, "name": "thing"}]}
    known = {"objects": [], "width": width, "height": height}
    path = shard(tmp_path, [{"png": image, "json": json.dumps(known).encode()}], classes)
    task, config = Detection(), config_of("detection", classes=("thing",), class_ids=("5",))
    items = items_of(task, path)
    maker = task.maker(config, Tokenizer.load(corpus().tokenizer))
    (batch,) = TaskSet(items, maker).batches()
    half = [view.shown[0] / 2, view.shown[1] / 2]
    for box, wanted in (
        (whole, [0, 0, width, height]),
        ([0.0, 0.0, *half], [0, 0, width / 2, height / 2]),
        ([-9.0, -9.0, 99.0, 99.0], [0, 0, width, height]),
    ):
        (one,) = task.predict(Fixed(box), batch, items, config, None)
        np.testing.assert_allclose(one.value[0], [wanted], atol=1e-4)
        found = Pretrained(Fixed(box), MODEL, corpus().tokenizer.read_bytes(), {"classes": ["thing"]})
        (ours,) = found.detect(tmp_path / "picture.png")
        np.testing.assert_allclose(ours.box, wanted, atol=1e-4)


# --- zero-shot classes ----------------------------------------------------------------------------

LABELS: list[dict[str, Any]] = [
    {"labels": ["cat", "rug"]},
    {"label": "dog"},
    {"label": "fox"},
    {"label": "cat"},
]


def test_zero_shot_counts_what_was_guessed(tmp_path: Path) -> None:
    names = ("cat", "dog", "rug", "owl", "elk", "yak", "bee")
    task = ZeroShot(("a {}",), names)
    path = shard(tmp_path, [picture(i, **one) for i, one in enumerate(LABELS)])
    items = task.items(lambda: items_of(task, path))
    assert len(items) == 3 and items.lacking == 1, "a fox is none of the classes"
    config = config_of("retrieval")
    config = replace(config, task=task.complete(config.task, items))
    assert config.task.classes == names
    guesses = np.eye(7, dtype=np.float32)[[2, 1, 1]]  # rug, dog, dog; then in the order of the classes
    result = task.score([Prediction(i, row) for i, row in enumerate(guesses)], items, config, None)
    assert result.scores["top-1"].value == 2 / 3
    assert result.table == {"cat": 0.0, "rug": 1.0, "dog": 1.0}, "whoever said rug has found no cat"
    for score, tries in (("top-1", 1), ("top-5", 5)):
        blind = list(itertools.combinations(range(7), tries))
        share = [np.mean([bool(set(some) & set(range(right))) for some in blind]) for right in (2, 1, 1)]
        assert result.scores[score].baselines["chance"] == pytest.approx(np.mean(share))
    assert result.about["labels_of_other_classes"] == {"fox": 1}


def test_zero_shot_classes_are_checked_before_any_compute(
    started: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shard(tmp_path / "shards", [picture(i, **one) for i, one in enumerate(LABELS)])
    command = ["classify", "--checkpoint", str(started), "--device", "cpu", "--data", str(path)]
    output = tmp_path / "classify.json"
    for more, message in (
        (
            ("--classes", "horse", "cow"),
            "no picture is of one of --classes horse, cow; the data's are cat, dog",
        ),
        (("--classes", "cat"), "'cat' alone"),
        (("--classes", "cat", "cat"), "'cat' twice"),
        (("--templates", "a"), "lacks {}"),
    ):
        assert evaluate.main([*command, *more]) == 2
        assert message in capsys.readouterr().err
    assert evaluate.main([*command, "--classes", "cat", "owl", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["counts"] == {"pictures": 2, "classes": 2} and found["data"]["lacking_left_out"] == 2


# --- questions ------------------------------------------------------------------------------------


def question(number: int, *answers: str) -> dict[str, Any]:
    return {"question_id": number, "question": "how many?", "answers": list(answers)}


def test_chosen_answers_are_spelled_as_people_who_agree_spell_them(tmp_path: Path) -> None:
    """The official rule compares as is where all people gave one answer: "2" is wrong where all ten said "two"."""
    asked = [
        question(1, *["two"] * 10),
        question(2, *["two"] * 10),
        question(3, *["2"] * 10),
        question(4, *["the cat"] * 4, *["2"] * 6),
        question(5, *["A dog"] * 10),
    ]
    task = task_of("vqa")
    items = items_of(task, shard(tmp_path, [picture(0, questions=asked)]))
    done = task.complete(TaskConfig("vqa", head="chosen"), items)
    assert done.classes == ("two", "A dog", "the cat")
    values = {one["question_id"]: one["answers"] for one in asked}
    assert [official("two", values[i]) for i in (1, 2, 3, 4)] == [1, 1, 0, 1]
    assert official("2", values[1]) == 0 and official("dog", values[5]) == 0 < official("A dog", values[5])
    questions = items.annotations(items.items[0]).questions
    rows = np.stack([worth(one, done.classes, str) for one in questions])
    np.testing.assert_allclose(rows[[0, 2]], [[1, 0, 0]] * 2)  # what is meant is learned
    np.testing.assert_allclose(rows[4], [0, 1, 0])
    assert rows[3, 0] == official("2", values[4]) and rows[3, 2] == official("cat", values[4]) > 0
    with pytest.raises(ConfigError, match="no training question has one of these 1 answers; .*'2'"):
        task.complete(TaskConfig("vqa", head="chosen", classes=("maybe",)), items)


def test_questions_without_answers_are_not_learned_from(tmp_path: Path) -> None:
    asked = [question(1, *["two"] * 10), question(2), question(3, *["red"] * 10)]
    path = shard(tmp_path, [picture(0, questions=asked), picture(1, questions=[question(4)])])
    task, tokenizer = task_of("vqa"), Tokenizer.load(corpus().tokenizer)
    for head in ("written", "chosen"):
        config = config_of("vqa", head=head)
        items = find_items(task, (str(path),), config, training=True)
        assert [item.part for item in items.items] == [0, 2]
        assert (items.samples, items.lacking, items.unusable) == (1, 1, 1)
        config = replace(config, task=task.complete(config.task, items))
        maker = task.maker(config, tokenizer)
        rows = [maker(items, item, np.random.default_rng(0)) for item in items.items]
        batch = collate(rows, (), (0, 1), ("a", "b"))
        assert sum(task.counts(batch, config)) > 0
    # scored: what can be scored is, and the rest is counted; all are handed in
    items = find_items(task, (str(path),), config, training=False)
    said = [Prediction(i, "two") for i in range(len(items))]
    result = task.score(said, items, config, tokenizer)
    assert result.scores["accuracy"].value == 0.5 and result.counts["questions"] == 2
    assert result.about["questions_without_answers"] == 2
    assert [one["question_id"] for one in result.files["vqa_results.json"]] == [1, 2, 3, 4]
    baselines = " ".join(result.scores["accuracy"].baselines)
    assert "by the scored answers themselves" in baselines
