"""From a task's data configuration to loaders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dataload import scenes, shards
from dataload.annotated import Items, LoadingConfig, TaskLoader, TaskSet
from dataload.tokenizer import Tokenizer
from train.config import ConfigError, micro_batch
from train.data import LARGEST_SCENE, load_tokenizer
from train.tasks.base import Task
from train.tasks.config import FinetuneConfig
from train.tasks.registry import task_of


@dataclass(frozen=True)
class TaskSources:
    """The files of a run."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]
    tokenizer: Path
    builtin: bool


@dataclass(frozen=True)
class TaskData:
    """What the loop reads."""

    sources: TaskSources
    tokenizer: Tokenizer
    loader: TaskLoader
    heldout: TaskSet | None


def find_task_sources(config: FinetuneConfig, say: Callable[[str], None]) -> TaskSources:
    """Expand the shards; makes the built-in corpus first where none are named. Raises ValueError or OSError where something
    named is not there."""
    data = config.data
    sounds = task_of(config.task.kind).media == "audio"
    if data.tokenizer:
        tokenizer = Path(data.tokenizer)
    elif sounds and not config.checkpoint and not data.train:
        tokenizer = Path()  # the corpus' own, below
    else:
        tokenizer = find_tokenizer(config.checkpoint)
    if tokenizer != Path() and not tokenizer.is_file():
        raise ConfigError(
            f"data.tokenizer {tokenizer} does not exist; make one with python -m dataload.tokenizer"
        )
    if data.train:
        train = tuple(str(path) for path in shards.expand(data.train))
        heldout = tuple(str(path) for path in shards.expand(data.heldout)) if data.heldout else ()
        return TaskSources(train, heldout, tokenizer, builtin=False)
    directory = Path(data.cache).expanduser() if data.cache else scenes.default_directory()
    say(
        f"data        the built-in corpus, in {directory} (drawn the first time; --data.train takes your own)"
    )
    if sounds:
        from dataload.scenes import media as scenes_media

        media = scenes_media.build(directory, size=LARGEST_SCENE)
        train, heldout = (tuple(map(str, paths)) for paths in (media.sounds, media.heldout_sounds))
        return TaskSources(
            train, heldout, media.tokenizer if tokenizer == Path() else tokenizer, builtin=True
        )
    paths = scenes.build(directory, size=min(config.model.image_size, LARGEST_SCENE))
    return TaskSources(tuple(map(str, paths.train)), tuple(map(str, paths.heldout)), tokenizer, builtin=True)


def find_tokenizer(checkpoint: str) -> Path:
    """The tokenizer of a checkpoint. Raises ConfigError where there is none."""
    from train.checkpoint import find

    found = find(Path(checkpoint)) if checkpoint else []
    if not found:
        raise ConfigError(
            f"--checkpoint {checkpoint or '(none)'}: no finished checkpoint there; give a run (runs/NAME) or one of its "
            "checkpoints (runs/NAME/checkpoints/step-000100). python -m train.pretrain makes one"
        )
    return found[0] / "tokenizer.model"


def find_items(task: Task, patterns: tuple[str, ...], config: FinetuneConfig, *, training: bool) -> Items:
    """What a task learns from or is scored on. Raises what `Items` raises."""
    data = config.data
    learnable = getattr(task, "learnable", None)
    return Items(
        patterns,
        task.needs,
        media=task.media,
        each=task.parts,
        most=data.most if training else None,
        usable=learnable if training and learnable else lambda *_: True,
        exclude=data.exclude if training else (),
    )


def open_task(config: FinetuneConfig, sources: TaskSources, rank: int, world_size: int) -> TaskData:
    """Open the training loader of one rank and the held-out set."""
    task = task_of(config.task.kind)
    tokenizer = load_tokenizer(sources.tokenizer, config.model.vocabulary)
    maker = task.maker(config, tokenizer)
    settings = LoadingConfig(
        micro_batch(config, world_size),
        config.seed,
        config.data.workers,
        config.data.prefetch,
        config.data.max_broken,
        str(Path(config.out) / "broken.jsonl"),
    )
    loader = TaskLoader(
        settings,
        find_items(task, sources.train, config, training=True),
        maker,
        tokenizer,
        ragged=task.ragged,
        rank=rank,
        world_size=world_size,
    )
    heldout = None
    if sources.heldout:
        items = find_items(task, sources.heldout, config, training=False)
        heldout = TaskSet(items, maker, ragged=task.ragged, workers=config.data.workers)
    return TaskData(sources, tokenizer, loader, heldout)


def classes_beside(items: Items) -> Path:
    """The folder in which classes.json is looked for: that of the first shard."""
    return Path(str(items.index.shards[0].path)).parent
