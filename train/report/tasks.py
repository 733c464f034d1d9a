"""The page of a task's scores: figures beside their baselines, and pictures with what the model said of them drawn in, the
worst first. One file without a single request, as the report of pre-training (page.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from PIL import Image, ImageDraw

from dataload import images
from dataload.annotated import Items
from dataload.broken import BrokenSample
from train.report.charts import Chart, Series, render
from train.report.page import read_metrics
from train.report.samples import data_uri
from train.tasks.base import Drawn, Example, TaskResult

SHOWN = 24  # examples on the page
SIDE = 288  # pixels of the longer side of a drawn picture
TRUE, FOUND = (16, 160, 90), (220, 60, 40)
LEGENDS = {
    "detection": "Green boxes are true, red ones are the model's with its confidence.",
    "segmentation": "Left to right or top to bottom: the picture, the true map, the model's. Black is not asked for.",
}


def write_task_page(
    path: Path, result: TaskResult, items: Items, record: Mapping[str, Any], run: Path | None = None
) -> Path:
    """Write the page and return its path. record: the JSON of the result, with "command", "name" and "checkpoint"; run: the
    directory of a training run, whose curves are then shown."""
    rows = [{"name": name, "bars": _bars(score.to_json(), name)} for name, score in result.scores.items()]
    table = sorted(result.table.items(), key=lambda one: one[1])[:40]
    reasons = result.about.get("not_scored", {})
    notes = [f"{name} is not scored: {reason}" for name, reason in reasons.items()]
    notes += list(result.about.get("notes", ()))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_asset("tasks.html.j2")).render(
        title=record.get("name", result.task),
        task=result.task,
        lede=f"Scored on {', '.join(f'{count:,} {what}' for what, count in result.counts.items())}.",
        facts=[(name, value) for name, value in _facts(record).items() if value],
        notes=notes,
        rows=rows,
        table=[(name, f"{value:.3f}") for name, value in table],
        examples=[_shown(example, items) for example in result.examples[:SHOWN]],
        legend=LEGENDS.get(result.task, "What the model said, and what is true."),
        charts=[render(chart) for chart in _charts(run)] if run else [],
        command=record.get("command", ""),
        record=json.dumps(record, indent=2, ensure_ascii=False, default=str),
        style=Markup(_asset("style.css")),
    )
    path.write_text(page, encoding="utf-8")
    return path


def draw_boxes(picture: Image.Image, boxes: list[Drawn], scale: float) -> None:
    """Draw boxes of the stored picture into one that is `scale` times its size."""
    pen = ImageDraw.Draw(picture)
    for one in sorted(boxes, key=lambda one: not one.true):
        left, top, right, bottom = (scale * value for value in one.box)
        color = TRUE if one.true else FOUND
        pen.rectangle((left, top, max(right, left), max(bottom, top)), outline=color, width=2)
        if not one.true:
            where = (left + 2, max(top - 11, 0))
            pen.rectangle(pen.textbbox(where, one.name), fill=color)
            pen.text(where, one.name, fill="white")


def palette(label_map: np.ndarray) -> np.ndarray:
    """uint8 [H, W] -> uint8 [H, W, 3]: a color per class, light grey for class 0, black for what is not asked for."""
    numbers = np.arange(256)
    colors = np.stack(
        [(numbers * 67 + 40) % 216 + 30, (numbers * 149 + 90) % 216 + 30, (numbers * 97) % 216 + 30], 1
    )
    colors[0], colors[255] = 225, 0
    return colors.astype(np.uint8)[label_map]


def _shown(example: Example, items: Items) -> dict[str, Any]:
    item = items.items[example.item]
    drawn: list[str] = []
    if items.index.has("image")[item.sample]:
        try:
            stored = images.decode(items.index.image(item.sample))
            drawn = [data_uri(np.asarray(one)) for one in _pictures(stored, example)]
        except (BrokenSample, OSError):
            drawn = []
    return {
        "key": items.index.key(item.sample), "images": drawn, "lines": example.lines, "score": f"{example.score:.3f}"
    }  # fmt: skip


def _pictures(stored: Image.Image, example: Example) -> list[Image.Image]:
    scale = SIDE / max(stored.size)
    size = (max(1, round(stored.width * scale)), max(1, round(stored.height * scale)))
    picture = stored.convert("RGB").resize(size)
    draw_boxes(picture, example.boxes, scale)
    maps = [
        Image.fromarray(palette(one)).resize(size, Image.Resampling.NEAREST) for one in example.maps or ()
    ]
    return [picture, *maps]


def _bars(score: Mapping[str, float], name: str) -> list[dict[str, Any]]:
    full = max(1.0, *score.values()) if max(score.values()) > 1 else 1.0
    return [
        {"name": "Model" if which == "value" else which, "share": min(max(value / full, 0.0), 1.0),
         "text": f"{value:.4f}", "model": which == "value"}
        for which, value in score.items()
    ]  # fmt: skip


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    checkpoint = record.get("checkpoint")
    where = checkpoint.get("path") if isinstance(checkpoint, dict) else checkpoint
    return {
        "Checkpoint": str(where or ""),
        "Split": str((record.get("data") or {}).get("split") or ""),
        "Prompt": str(record.get("prompt") or ""),
        "Date": str(record.get("date") or record.get("finished") or "")[:10],
    }


def _charts(run: Path) -> list[Chart]:
    metrics = read_metrics(run / "metrics.jsonl")
    names = dict.fromkeys(name for line in metrics["train"] for name in line["losses"])
    charts = [
        Chart(
            f"Loss: {name}",
            [Series(name, [line["step"] for line in metrics["train"] if name in line["losses"]],
                    [line["losses"][name] for line in metrics["train"] if name in line["losses"]], smooth=True)],
        )
        for name in names
    ]  # fmt: skip
    scored = dict.fromkeys(name for line in metrics["eval"] for name in line["scores"])
    charts += [
        Chart(
            f"Held out: {name}",
            [Series(name, [e["step"] for e in metrics["eval"] if name in e["scores"]],
                    [e["scores"][name] for e in metrics["eval"] if name in e["scores"]], dots=True)],
        )
        for name in scored
    ]  # fmt: skip
    return [chart for chart in charts if any(len(series.x) > 1 for series in chart.series)]


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
