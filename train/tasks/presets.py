"""Settings to start a task from: one small function per task; the model is the checkpoint's."""

from __future__ import annotations

from dataclasses import replace

from models.aurora import AuroraConfig
from models.perceiver import PerceiverConfig
from train.config import ConfigError, OptimConfig, PretrainConfig
from train.tasks.config import (
    READ_BY,
    FinetuneConfig,
    PerceiverFinetuneConfig,
    TaskConfig,
    TaskDataConfig,
    TaskObjectives,
)
from train.tasks.registry import task_of


def task_preset(kind: str, start: PretrainConfig) -> FinetuneConfig:
    """The defaults of task `kind` for the model of the run `start`. Raises ConfigError where the task is not for it."""
    make = {
        "captioning": captioning,
        "vqa": questions,
        "retrieval": retrieval,
        "detection": detection,
        "segmentation": segmentation,
        "audio": sounds,
    }.get(kind)
    if make is None:
        raise ConfigError(f"no task is called {kind!r}")
    perceiver = isinstance(start.model, PerceiverConfig)
    has, wanted = "PerceiverIO" if perceiver else "Aurora", task_of(kind).families
    if has not in wanted:
        raise ConfigError(f"{kind} is for {' and '.join(wanted)}; the checkpoint is {has}'s")
    model = start.model
    made = make(PerceiverFinetuneConfig(model=model) if perceiver else FinetuneConfig(model=model))  # type: ignore[arg-type]
    if isinstance(start, FinetuneConfig) and start.task.kind == kind and kind in READ_BY["task.prompt"]:
        # it goes on with what it learned to read first
        made = replace(made, task=replace(made.task, prompt=start.task.prompt))
    return replace(made, name=f"{kind}-{start.name}")


def at_size(model: AuroraConfig, size: int) -> AuroraConfig:
    """The same model for images of another size: windows keep their places' meaning (`bias_windows`)."""
    if size == model.image_size:
        return model
    sides = [model.image_size // 4 // 2**i for i in range(4)]
    trained = model.bias_windows or tuple(min(*pair) for pair in zip(model.windows, sides, strict=True))
    return replace(model, image_size=size, bias_windows=trained)


def captioning(base: FinetuneConfig) -> FinetuneConfig:
    """Pictures with captions."""
    return replace(
        base,
        task=TaskConfig("captioning"),
        objectives=TaskObjectives("captioning", label_smoothing=0.1),
        data=TaskDataConfig(crop_scale=(0.5, 1.0)),
        optim=OptimConfig(lr=5e-4, final_lr=1e-6, warmup=20),
        batch_size=64,
        steps=400,
    )


def questions(base: FinetuneConfig) -> FinetuneConfig:
    """Pictures with questions. Crops are wide: an answer may lie at the edge."""
    return replace(
        base,
        task=TaskConfig("vqa", beams=1, prompt="{question}"),
        objectives=TaskObjectives("vqa"),
        data=TaskDataConfig(crop_scale=(0.85, 1.0), crop_ratio=(0.95, 1.05)),
        optim=OptimConfig(lr=1e-3, final_lr=1e-5, warmup=20),
        batch_size=64,
        steps=300,
    )


def retrieval(base: FinetuneConfig) -> FinetuneConfig:
    """Pictures with captions, contrasted and matched."""
    return replace(
        base,
        task=TaskConfig("retrieval"),
        objectives=TaskObjectives("retrieval"),
        data=TaskDataConfig(crop_scale=(0.5, 1.0)),
        optim=OptimConfig(lr=3e-4, final_lr=1e-6, warmup=20),
        batch_size=64,
        steps=300,
    )


def detection(base: FinetuneConfig) -> FinetuneConfig:
    """Pictures with boxes."""
    return replace(
        base,
        task=TaskConfig("detection"),
        objectives=TaskObjectives("detection"),
        data=TaskDataConfig(crop_scale=(0.6, 1.0)),
        optim=OptimConfig(lr=1e-3, final_lr=1e-5, warmup=20),
        batch_size=32,
        steps=200,
    )


def segmentation(base: FinetuneConfig) -> FinetuneConfig:
    """Pictures with label maps or masks."""
    return replace(
        detection(base), task=TaskConfig("segmentation"), objectives=TaskObjectives("segmentation")
    )


def sounds(base: FinetuneConfig) -> FinetuneConfig:
    """Sounds with labels. A thousand sounds are soon learned by heart: they are played faster, slower, in part, and mixed."""
    return replace(
        base,
        task=TaskConfig("audio"),
        objectives=TaskObjectives("audio", label_smoothing=0.1),
        data=TaskDataConfig(speed=0.15, noise=0.1, hide_sound=0.3, mix_sounds=0.3),
        optim=OptimConfig(lr=1e-3, final_lr=1e-5, warmup=40, weight_decay=0.1),
        batch_size=32,
        steps=600,
        ema_decay=0.98,
    )
