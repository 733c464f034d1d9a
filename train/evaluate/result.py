"""What an evaluation gives back: scores beside their baselines, counts, and the material behind them.

Legend: I images, C captions, R restored images, H W pixels, E embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def output_for(folder: Path, task: str, data: Mapping[str, Any]) -> Path:
    """Where scores go whose JSON has this `data`: TASK.json; TASK-2.json ... where that one has the scores of other samples,
    which are kept. What the samples are is told by the hash of the shards' contents, how many were scored, and the views of
    each."""
    number, path = 1, folder / f"{task}.json"
    while path.exists() and _scored(path) != (data["manifest"], data["max_images"], data.get("views", 1)):
        number += 1
        path = folder / f"{task}-{number}.json"
    return path


def _scored(path: Path) -> Any:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))["data"]
        return data["manifest"], data.get("max_images"), data.get("views", 1)
    except (ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Score:
    """One figure and what it is to be read against, e.g. {"chance": 0.002, "shuffled": 0.003}."""

    value: float
    baselines: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, **self.baselines}


@dataclass(frozen=True)
class Material:
    """What the scores were computed from, on the CPU: for the report's pictures and for later analysis."""

    keys: list[str]
    captions: list[list[str]]  # per image
    image_embeddings: Tensor  # float32 [I, E]
    text_embeddings: Tensor  # float32 [C, E]
    image_of_text: Tensor  # int64 [C]
    generated: list[str]  # of the first len(generated) images
    thumbnails: Tensor | None  # uint8 [I, h, w, 3], at most THUMBNAIL pixels wide
    masks: Tensor  # bool [R, H/32, W/32] of the first R images, True = hidden
    restored: Tensor  # uint8 [R, h, w, 3], the model's picture in the hidden places, the original elsewhere


_NONE = torch.empty(0)
NOTHING = Material(
    [], [], _NONE, _NONE, _NONE.long(), [], torch.empty(0, 1, 1, 3).byte(), _NONE.bool(), _NONE.byte()
)
"""Of an evaluation that had nothing to score."""


@dataclass(frozen=True)
class EvalResult:
    """Scores by task and name, how much they were measured on, and the material behind them."""

    scores: dict[str, dict[str, Score]]
    counts: dict[str, int]
    material: Material
    materials: dict[str, Material] = field(default_factory=dict)
    """of a model of several modalities: by the kind of pair ("image-text"); `material` is that of the pictures"""

    def scalars(self) -> dict[str, float]:
        """Flat, for logs: "text_to_image/R@1", "perplexity", "perplexity/shuffled", "scenes/f1" ..."""
        flat = {name: score.value for name, score in self.scores.get("retrieval", {}).items()}
        for name, score in self.scores.get("perplexity", {}).items():
            flat[name] = score.value
            flat.update({f"{name}/{which}": value for which, value in score.baselines.items()})
        for task in ("naming", "scenes", "mim"):
            flat.update({f"{task}/{name}": score.value for name, score in self.scores.get(task, {}).items()})
        return flat

    def to_json(self) -> dict[str, object]:
        scores = {task: {k: s.to_json() for k, s in part.items()} for task, part in self.scores.items()}
        return {"scores": scores, "counts": self.counts}

    def lines(self) -> list[str]:
        """A table to read: every score beside its baselines, aligned, without colour codes."""
        rows = []
        for task, part in self.scores.items():
            for name, score in part.items():
                text = _percent if "R@" in name or name.endswith(("f1", "accuracy", "recall")) else _plain
                against = ", ".join(f"{which} {text(value)}" for which, value in score.baselines.items())
                rows.append((task, name, text(score.value), f"  ({against})" if against else ""))
        return [f"{task:<11} {name:<26} {value:>9}{against}" for task, name, value, against in rows]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _plain(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
