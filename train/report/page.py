"""Builds RUN/report.html from the files of a run: metrics.jsonl, summary.json, config.json, samples.json.

The page is one file without a single request: styles, script, charts and pictures are inside. Captions come
from data that strangers wrote, so the template escapes everything (Jinja autoescape), and the page forbids
itself the network (CSP).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from train.report.charts import Chart, Series, render
from train.report.words import facts, lede, percent, plain

OBJECTIVES = {
    "itc": ("Contrastive", "which caption belongs to which picture"),
    "vtc": ("Contrastive, video", "which caption belongs to which video"),
    "atc": ("Contrastive, sound", "which caption belongs to which sound"),
    "caption": ("Captioning", "writing the caption from the picture"),
    "mlm": ("Masked words", "hidden words, with the help of the picture"),
    "mim": ("Masked pictures", "hidden parts of the picture"),
    "mvm": ("Masked videos", "hidden parts of the video"),
    "mam": ("Masked sounds", "hidden parts of the spectrogram"),
}
WAYS = {
    "text_to_image": ("Finding the picture", "A caption is looked up among {images:,} pictures."),
    "image_to_text": ("Finding the caption", "A picture is looked up among {captions:,} captions."),
    "text_to_video": ("Finding the video", "A caption is looked up among {videos:,} videos."),
    "video_to_text": (
        "Finding a video's caption",
        "A video is looked up among {captions_of_videos:,} captions.",
    ),
    "text_to_audio": ("Finding the sound", "A caption is looked up among {sounds:,} sounds."),
    "audio_to_text": (
        "Finding a sound's caption",
        "A sound is looked up among {captions_of_sounds:,} captions.",
    ),
}

PERPLEXITIES = {
    "perplexity": "Perplexity",
    "perplexity_of_videos": "Of videos",
    "perplexity_of_sounds": "Of sounds",
}


def write_report(run_dir: Path | str) -> Path:
    """Write RUN/report.html and return its path. What the run lacks is left out, and the page says so.

    Raises FileNotFoundError when there is neither metrics.jsonl nor summary.json: nothing to report.
    """
    run = Path(run_dir)
    files = {name: run / name for name in ("metrics.jsonl", "summary.json", "config.json", "samples.json")}
    missing = [name for name, path in files.items() if not path.is_file()]
    if {"metrics.jsonl", "summary.json"} <= set(missing):
        raise FileNotFoundError(
            f"{run} has neither metrics.jsonl nor summary.json: no run, or nothing was logged yet"
        )
    summary = _json(files["summary.json"])
    metrics = read_metrics(files["metrics.jsonl"])
    about = {part: summary[part] for part in ("data", "versions") if part in summary}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_asset("template.html.j2")).render(
        name=summary.get("name", run.name),
        run=_shown(run),
        summary=summary,
        lede=lede(summary),
        facts=facts(summary, metrics["train"]),
        groups=score_groups(summary.get("evaluation") or {}),
        charts=[render(chart) for chart in make_charts(metrics)],
        samples=_json(files["samples.json"]),
        config=json.dumps(_json(files["config.json"]), indent=2) if files["config.json"].is_file() else "",
        about=json.dumps(about, indent=2, ensure_ascii=False) if about else "",
        history=_history(metrics["eval"]),
        missing=missing,
        style=Markup(_asset("style.css")),
        script=Markup(_asset("script.js")),
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """{"train": lines, "eval": lines}, by step; of a step logged twice (a resumed run) the later line counts.

    A last line that was cut off (the run was killed while writing it) is left out.
    """
    by_step: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "eval": {}}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number_, line in enumerate(lines):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            if number_ == len(lines) - 1:
                break
            raise
        if entry.get("kind") in by_step:
            by_step[entry["kind"]][entry["step"]] = entry
    return {kind: [steps[step] for step in sorted(steps)] for kind, steps in by_step.items()}


def score_groups(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The headline: per group a title, a sentence, and rows of bars: the model's, then its baselines'."""
    scores, counts = evaluation.get("scores", {}), evaluation.get("counts", {})
    groups = []
    retrieval = scores.get("retrieval", {})
    counts = {"captions": counts.get("captions_of_images", 0), **counts}
    for way, (title, text) in WAYS.items():
        rows = [
            _row(f"R@{k}", retrieval[f"{way}/R@{k}"], 1.0, percent)
            for k in (1, 5, 10)
            if f"{way}/R@{k}" in retrieval
        ]
        if rows:
            text = f"{text.format(**counts)} R@5: how often a right one is among the first 5."
            groups.append({"title": title, "rows": rows, "text": text, "lower": False})
    groups += _named(scores.get("naming", {}))
    if scenes := scores.get("scenes"):
        rows = [
            _row(name.removesuffix("_f1").capitalize() if name != "f1" else "F1", s, 1.0, percent)
            for name, s in scenes.items()
        ]
        text = "Color and shape words of the generated captions against what is in the picture (F1)."
        groups.append({"title": "Naming what is there", "rows": rows, "text": text, "lower": False})
    if perplexity := scores.get("perplexity", {}):
        rows = [
            _row(PERPLEXITIES.get(name, name), score, max(score.values()), plain)
            for name, score in perplexity.items()
        ]
        text = "Between how many words the model wavers when it fills in a hidden one. Lower is better."
        groups.append({"title": "Filling in words", "rows": rows, "text": text, "lower": True})
    if mim := scores.get("mim", {}).get("error"):
        text = "Mean absolute error in the hidden parts, in standard deviations. Lower is better."
        groups.append(
            {
                "title": "Filling in pictures",
                "rows": [_row("Error", mim, max(mim.values()), plain)],
                "text": text,
                "lower": True,
            }
        )
    return groups


def _named(naming: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each modality whose captions are labels, how many samples are closest to their own."""
    groups = []
    for modality, many in (("image", "pictures"), ("video", "videos"), ("audio", "sounds")):
        rows = [
            _row(title, naming[f"{modality}/{name}"], 1.0, percent)
            for name, title in (("accuracy", "Right"), ("mean_recall", "Mean over labels"))
            if f"{modality}/{name}" in naming
        ]
        if rows:
            text = f"How many of the {many} are closest to their own label's text among all labels."
            groups.append({"title": f"Naming the {many}", "rows": rows, "text": text, "lower": False})
    return groups


def _row(name: str, score: Mapping[str, float], full: float, text: Any) -> dict[str, Any]:
    names = {
        "value": "Model",
        "chance": "Chance",
        "shuffled": "Shuffled pictures",
        "unigram": "Word frequencies",
        "mean_color": "Mean color",
    }
    bars = [
        {
            "name": names.get(which, which),
            "share": min(value / full, 1.0) if full else 0.0,
            "text": text(value),
            "model": which == "value",
        }
        for which, value in score.items()
    ]
    return {"name": name, "bars": bars}


def make_charts(metrics: Mapping[str, list[dict[str, Any]]]) -> list[Chart]:
    """Losses per objective, held-out scores, learning rate and throughput: those that were logged."""
    train, evaluations = metrics["train"], metrics["eval"]

    def line(name: str, *path: str, tone: str = "accent", smooth: bool = False) -> Series:
        points = [(entry["step"], value) for entry in train if (value := _at(entry, path)) is not None]
        return Series(name, [p[0] for p in points], [p[1] for p in points], tone, smooth=smooth)

    def scored(name: str, key: str, tone: str, views: int | None = None) -> Series:
        points = [
            (e["step"], e["scores"][key])
            for e in evaluations
            if key in e["scores"] and views in (None, e.get("views", 1))
        ]
        return Series(name, [p[0] for p in points], [p[1] for p in points], tone, dots=True)

    def pictures(k: int) -> list[Series]:
        """Of one view of each picture, and of several apart: the two do not compare."""
        found = []
        for views in sorted({e.get("views", 1) for e in evaluations}):
            more = f", {views} views" if views > 1 else ""
            found += [
                scored(f"caption → picture{more}", f"text_to_image/R@{k}", "accent", views),
                scored(f"picture → caption{more}", f"image_to_text/R@{k}", "second", views),
            ]
        return [series for series in found if series.x]

    other = [
        Chart(f"Among {many}, right one in the first ten (R@10)", [
            scored(f"caption → {one}", f"text_to_{one}/R@10", "accent"),
            scored(f"{one} → caption", f"{one}_to_text/R@10", "second"),
        ], f"held-out {many}", percent=True)
        for one, many in (("video", "videos"), ("audio", "sounds"))
    ]  # fmt: skip
    words = [
        scored("model", "perplexity", "accent"),
        scored("shuffled pictures", "perplexity/shuffled", "quiet"),
    ]
    charts = [
        Chart("Right one first (R@1)", pictures(1), "held-out pictures", percent=True),
        Chart("Right one in the first ten (R@10)", pictures(10), "held-out pictures", percent=True),
        *other,
        Chart(
            "Sounds named right",
            [scored("accuracy", "naming/audio/accuracy", "accent")],
            "held-out sounds",
            percent=True,
        ),
        Chart("Masked-word perplexity", words, "held-out captions"),
    ]
    charts += [
        Chart(f"{title} loss", [line("loss", "losses", key, smooth=True)], note)
        for key, (title, note) in OBJECTIVES.items()
    ]
    charts += [
        Chart("Learning rate", [line("rate", "lr")], "warm-up, then cosine"),
        Chart(
            "Throughput",
            [line("pictures per second", "images_per_second", smooth=True)],
            "pictures per second",
        ),
    ]
    return [chart for chart in charts if any(len(s.x) > 1 for s in chart.series)]


def _history(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """The evaluations as a table, for those who want figures: {"columns": names, "rows": [(step and views, texts)]}."""
    columns = [
        c
        for c in (
            "text_to_image/R@1",
            "text_to_image/R@10",
            "image_to_text/R@1",
            "image_to_text/R@10",
            "text_to_video/R@10",
            "video_to_text/R@10",
            "text_to_audio/R@10",
            "audio_to_text/R@10",
            "naming/audio/accuracy",
            "perplexity",
            "scenes/f1",
        )
        if any(c in e["scores"] for e in evaluations)
    ]
    rows = [
        (
            f"{e['step']:,}" + (f" ({e['views']} views)" if e.get("views", 1) > 1 else ""),
            [_cell(c, e["scores"].get(c)) for c in columns],
        )
        for e in evaluations
    ]
    return {"columns": columns, "rows": rows}


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "–"
    return plain(value) if column == "perplexity" else percent(value)


def _at(entry: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = entry
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _shown(run: Path) -> str:
    """The run's directory as one would type it here: relative where that is shorter to read."""
    full = run.resolve()
    return str(full.relative_to(Path.cwd())) if full.is_relative_to(Path.cwd()) else str(full)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
