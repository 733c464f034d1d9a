"""A task as the engine sees it: the methods of a model's family (train/families.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dataload.annotated import Items, TaskBatch
from dataload.tokenizer import Tokenizer
from models.lora import merge_lora
from train.config import ConfigError, PretrainConfig
from train.tasks.config import FinetuneConfig
from train.tasks.registry import task_of
from train.tasks.tuning import load_base, prepare

WORDS = ("decoder.embedding.", "text.embedding.", "text_pool.embedding.")
"""... and on its tokenizer."""
OPTIONAL = ("embeddings.classes.",)
"""Beginnings of the names of a pre-trained model that depend on the data's classes."""


class TaskFamily:
    """The task of a fine-tuning run."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.config, self.task = config, task_of(config.task.kind)
        self.name = f"{config.family}, {self.task.name}"

    def model(self, config: PretrainConfig) -> nn.Module:
        assert isinstance(config, FinetuneConfig)
        model, fresh = self.task.model(config), self.task.fresh
        if config.data.tokenizer:  # new words have new embeddings
            names = [name for name, _ in model.base.named_modules()]  # type: ignore[union-attr]
            fresh = (*fresh, *(word.rstrip(".") for word in WORDS if word.rstrip(".") in names))
        return prepare(model, config.tune, fresh)

    def begin(self, model: nn.Module, config: PretrainConfig) -> list[str]:
        """Take over the weights of the run's checkpoint; lines that say so."""
        from train.checkpoint import load_model

        assert isinstance(config, FinetuneConfig)
        if not config.checkpoint:
            return ["start       no checkpoint: all weights are new"]
        loaded = load_model(config.checkpoint)
        weights = base_of(loaded.model).state_dict()
        optional: tuple[str, ...] = OPTIONAL
        if config.data.tokenizer:  # a row stands for another piece now
            optional = (*OPTIONAL, *WORDS)
            weights = {name: tensor for name, tensor in weights.items() if not name.startswith(WORDS)}
        kept = load_base(model, weights, optional)
        new = f"; new: {', '.join(kept)}" if kept else ""
        return [f"start       {loaded.path}, step {loaded.step}{new}"]

    def attach(self, items: Items, tokenizer: Tokenizer) -> None:
        """Show the task its training data, where it wants to see all of it before the first step."""
        if attach := getattr(self.task, "attach", None):
            attach(self.config, items, tokenizer)

    def counts(self, batch: TaskBatch, config: PretrainConfig) -> Sequence[float]:
        return self.task.counts(batch, self.config)

    def normalizers(self, shares: Sequence[float], micro_steps: int) -> Sequence[float]:
        return shares

    def forward(
        self, module: nn.Module, batch: TaskBatch, objectives: Any, normalizers: Sequence[float], contrast: Any
    ) -> dict[str, Tensor]:  # fmt: skip
        losses = self.task.forward(module, batch, self.config, normalizers)
        if torch.is_grad_enabled() and not any(loss.requires_grad for loss in losses.values()):
            raise ConfigError(
                f"tune.freeze {' '.join(self.config.tune.freeze)}: no weight is left that {self.task.name} learns by"
            )
        return losses


def base_of(model: nn.Module) -> nn.Module:
    """The pre-trained model within a task's model (LoRA merged), or the model itself."""
    base = getattr(model, "base", None)
    return merge_lora(base) if isinstance(base, nn.Module) else model


def as_task(config: PretrainConfig, kind: str) -> FinetuneConfig:
    """The configuration of a pre-trained model as one of a task without a head of its own (captions, retrieval)."""
    from train.tasks.presets import task_preset

    if isinstance(config, FinetuneConfig) and config.task.kind == kind:
        return config
    default = task_preset(kind, config)
    return replace(default, task=replace(default.task, rerank=0))
