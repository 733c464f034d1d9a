"""The report's sentences and figures: what was trained, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any


def lede(summary: Mapping[str, Any]) -> str:
    """What was trained, on what, for how long, in one paragraph."""
    model, data = summary.get("model", {}), summary.get("data", {})
    said = []
    if "parameters" in model:
        size = f" {model['size']}" if model.get("size", "custom") != "custom" else ""
        said.append(
            f"{model.get('family', 'Aurora')}{size}, a model of {number(model['parameters'])} parameters,"
        )
    else:
        said.append("The model")
    pictures = []
    if data.get("train_pairs"):
        pictures.append(f"{data['train_pairs']:,} captioned")
    if data.get("train_uncaptioned"):
        pictures.append(f"{data['train_uncaptioned']:,} uncaptioned")
    said.append("was trained")
    if samples := data.get("train_samples"):
        names = {"image-text": "pictures", "video-text": "videos", "audio-text": "sounds"}
        several = [f"{count:,} {names.get(kind, kind)}" for kind, count in samples.items()]
        said.append(f"on {', '.join(several)} with captions")
    if pictures:
        size = f" of {model['image_size']} × {model['image_size']} pixels" if "image_size" in model else ""
        said.append(f"on {' and '.join(pictures)} pictures{size}")
    text = " ".join(said) + "."
    things = "samples" if samples else "pictures"
    if "steps" in summary and "seconds" in summary:
        text += f" {summary['steps']:,} steps took {duration(summary['seconds'])}"
        text += f" on {summary['device']}" if "device" in summary else ""
        text += f" in {summary['precision']}" if "precision" in summary else ""
        text += f", {number(summary['images'])} {things} in all." if "images" in summary else "."
    if summary.get("interrupted"):
        text += " The run was stopped before its end."
    if data.get("evaluation_images"):
        text += f" All scores are on {data['evaluation_images']:,} held-out pictures."
    if (views := data.get("evaluation_views", 1)) > 1:
        text += f" The last retrieval averages the embeddings of {views} views of each picture."
    return text


def facts(summary: Mapping[str, Any], train: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The figures under the title, from summary.json and the training lines of metrics.jsonl."""
    speeds = [line["images_per_second"] for line in train if "images_per_second" in line]
    model, data = summary.get("model", {}), summary.get("data", {})
    known = [
        ("Parameters", number(model["parameters"]) if "parameters" in model else None),
        ("Training time", duration(summary["seconds"]) if "seconds" in summary else None),
        ("Steps", f"{summary['steps']:,}" if "steps" in summary else None),
        ("Throughput", f"{median(speeds):,.0f} pictures/s" if speeds else None),
        ("Precision", summary.get("precision")),
        ("Vocabulary", f"{data['vocab_size']:,} tokens" if "vocab_size" in data else None),
    ]
    return [(name, str(value)) for name, value in known if value is not None]


def percent(share: float) -> str:
    """0.0345 -> 3.5%; below 1% two digits, so that a chance of 0.2% and one of 0.24% differ."""
    return f"{100 * share:.2f}%".replace(".00%", "%") if 0 < share < 0.01 else f"{100 * share:.1f}%"


def plain(value: float) -> str:
    """4.213 -> 4.21, 1234.5 -> 1,234."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def number(value: float) -> str:
    """8,512,345 -> 8.5 million."""
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.1f} {name}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """118 -> 1 min 58 s; the two largest units."""
    whole = round(seconds)
    units = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((i for i, (count, _) in enumerate(units) if count), 3)
    return " ".join(
        f"{count}\N{NO-BREAK SPACE}{name}" for count, name in units[first : first + 2] if count or name == "s"
    )
