"""What tasks make of their data: classes by name, truth that cannot be read, samples that lack something."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataload.annotated import Items, TaskSet
from dataload.annotations import Annotations, Object
from dataload.broken import BrokenSample
from dataload.tokenizer import Tokenizer
from tests.micro import MODEL, arguments, corpus
from train import finetune
from train.config import ConfigError
from train.pretrain import main as pretrain
from train.tasks.classes import with_ids
from train.tasks.config import FinetuneConfig, TaskConfig, TaskObjectives
from train.tasks.detection import Detection
from train.tasks.registry import task_of
from train.tasks.segmentation import Segmentation, Truth

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


def test_the_command_refuses_unknown_classes(started: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--checkpoint", str(started), "--data.train", *map(str, corpus().train)]
    for task in ("detection", "segmentation"):
        assert finetune.main([task, *command, "--task.classes", "unicorn"]) == 2
        said = capsys.readouterr().err
        assert "'unicorn' not in" in said and "'circle'" in said
    assert finetune.main(["captioning", *command, "--task.classes", "star"]) == 2
    assert "captioning has no classes" in capsys.readouterr().err
