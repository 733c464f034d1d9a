"""The model card of an exported model: what it is, what it was trained on, its scores, and how it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.checkpoint import LoadedModel
from train.config import to_dict

USES = {
    "captioning": 'print(model.caption("photo.jpg"))',
    "detection": 'print(model.detect("photo.jpg"))',
    "segmentation": 'print(model.segment("photo.jpg").shape)',
    "vqa": 'print(model.answer("photo.jpg", "what is this?"))',
    "retrieval": 'print(model.classify("photo.jpg", ["a dog", "a cat"]))',
}


def model_card(
    loaded: LoadedModel, scores: Mapping[str, Any] | None = None, programs: Sequence[str] = ()
) -> str:
    """README.md of an exported model. programs: a line about each that lies beside it."""
    config = to_dict(loaded.config)
    task, data = config.get("task", {}), config["data"]
    family = type(getattr(loaded.model, "base", loaded.model)).__name__
    parameters = sum(p.numel() for p in loaded.model.parameters())
    lines = [
        f"# {loaded.config.name}",
        "",
        f"{family}, {parameters / 1e6:.1f}M parameters, {loaded.config.model.image_size} px, step {loaded.step}"
        + (f"; fine-tuned for {task['kind']}" if task else "; pre-trained")
        + (", averaged weights" if loaded.averaged else ""),
        "",
        f"Trained on {_trained_on(data)}. Tokenizer: {loaded.tokenizer.vocab_size:,} pieces, SHA-256 "
        f"`{loaded.tokenizer.sha[:16]}`.",
        "",
        *_use(family, task.get("kind", "")),
        "",
        *([*programs, ""] if programs else []),
        "## Scores",
        "",
        "```json",
        json.dumps(scores, indent=2, ensure_ascii=False) if scores else "none recorded",
        "```",
        "",
        "## Configuration",
        "",
        "```json",
        json.dumps({"model": config["model"], "task": task or None}, indent=2, ensure_ascii=False),
        "```",
    ]
    return "\n".join(lines) + "\n"


def scores_of(step: Path) -> dict[str, Any]:
    """What is recorded of a checkpoint: the JSON files that train.evaluate wrote into it, and the run's summary where that is
    of the same step."""
    found: dict[str, Any] = {}
    for file in sorted(step.glob("*.json")):
        record = _read(file)
        if isinstance(record.get("scores"), dict):
            found[file.stem if record.get("data") else str(record.get("task", file.stem))] = _short(record)
    summary = _read(step.parent.parent / "summary.json")
    if summary.get("evaluation") and str(summary.get("checkpoint") or "").endswith(step.name):
        found["at the end of the run"] = _short(summary["evaluation"])
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _short(record: Mapping[str, Any]) -> dict[str, Any]:
    """Scores with their baselines and counts."""
    return {name: record[name] for name in ("scores", "counts") if name in record}


def _trained_on(data: Mapping[str, Any]) -> str:
    """The training shards by name; of several modalities those of each."""
    named = [
        name for part in (data, *data.values()) if isinstance(part, dict) for name in part.get("train") or ()
    ]
    if len(named) > 6:
        named = [*named[:6], f"{len(named) - 6:,} more"]
    return ", ".join(f"`{name}`" for name in named) or "the built-in generated corpus"


def _use(family: str, kind: str) -> list[str]:
    if kind == "audio":
        return ["    python -m train.evaluate audio --checkpoint path/to/this/folder --data SHARDS"]
    other = 'print(model.image_embedding(["photo.jpg"]).shape)'
    use = USES.get(kind) or (other if family == "PerceiverIO" else 'print(model.caption("photo.jpg"))')
    return [
        "    from models import load_pretrained",
        '    model = load_pretrained("path/to/this/folder")',
        f"    {use}",
    ]
