"""DIR/index.html: one corpus on one page, and DIR/stats.json with its figures.

The page is one file without a single request: style, charts and pictures are inside. Captions come from strangers,
so the template escapes everything (Jinja autoescape) and the page forbids itself scripts and the network (CSP).
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from PIL import Image

from dataload import images
from dataload.broken import BrokenSample
from dataload.files import write_atomically
from dataload.shards import ShardIndex
from dataload.stats.charts import histogram
from dataload.stats.compare import Against, Duplicates, Match
from dataload.stats.corpus import KINDS, Corpus

SHEET = 24  # samples on the contact sheet
PAIRS = 24  # matches that are shown of each kind of comparison
THUMBNAIL = 320  # pixels of a picture's longer side
MOST_SHARDS = 200  # rows of the table
WORDS = 15  # of the most frequent ones


def write_report(
    folder: Path,
    name: str,
    told: Mapping[str, Any],
    corpus: Corpus,
    *,
    against: tuple[Against, ShardIndex] | None = None,
    duplicates: Duplicates | None = None,
    seed: int = 0,
    command: str = "python -m dataload.stats",
) -> Path:
    """Writes index.html and stats.json into `folder` (made if need be); returns the page's path.

    `told`: what corpus.tell gave, with what was compared. OSError where the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    captions = told["captions"]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_asset("template.html.j2")).render(
        name=name,
        lede=_lede(told),
        facts=_facts(told),
        sheet=_sheet(corpus, seed),
        seed=seed,
        charts=_charts(told),
        kinds=_kinds(told),
        words=captions["frequent_words"][:WORDS],
        captions=[(text[:200], count) for text, count in captions["frequent_captions"][:WORDS]],
        per_sample=[(n, count) for n, count in captions["per_sample"].items()][:WORDS],
        texts_said=_texts_said(told),
        against=None if against is None else _against(corpus.index, *against),
        duplicates=None if duplicates is None else _duplicates(corpus.index, duplicates),
        shards=told["shards"][:MOST_SHARDS],
        more_shards=max(0, len(told["shards"]) - MOST_SHARDS),
        columns=["samples", *(kind for kind in KINDS if told[kind]), "captioned"],
        problems=_problems(told),
        command=command,
        style=Markup(_asset("style.css")),
    )
    write_atomically(folder / "stats.json", (json.dumps(told, indent=1) + "\n").encode())
    path = folder / "index.html"
    write_atomically(path, page.encode("utf-8", "backslashreplace"))  # a key may hold what is not UTF-8
    return path


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _lede(told: Mapping[str, Any]) -> str:
    names = {"image": "pictures", "audio": "sounds", "video": "videos"}
    held = [f"{told[kind]:,} {names[kind]}" for kind in KINDS if told[kind]]
    captions = told["captions"]
    text = f"{told['samples']:,} samples with {', '.join(held)} in {len(told['shards']):,} shards. "
    if not captions["count"]:
        return text + "None of them has a caption."
    return text + (
        f"{told['captioned']:,} have captions, {captions['count']:,} in all, of {captions['words']['median']:g} words "
        f"in the median; the others serve without text."
        if told["captioned"] < told["samples"]
        else f"All have captions, {captions['count']:,} in all, of {captions['words']['median']:g} words in the median."
    )


def _facts(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [("Samples", f"{told['samples']:,}"), ("Captions", f"{told['captions']['count']:,}")]
    found.append(("Bytes", f"{told['bytes'] / 2**20:,.1f} MiB"))
    if "pictures" in told and told["pictures"]["shortest side"]["count"]:
        found.append(("Shortest side", f"{told['pictures']['shortest side']['median']:g} px"))
    for kind in ("audios", "videos"):
        if kind in told:
            found.append(
                (f"Hours of {'sound' if kind == 'audios' else 'video'}", f"{told[kind]['hours']:,.2f}")
            )
    if "duplicates" in told:
        exact, near = told["duplicates"]["exact"], told["duplicates"]["near"]
        term = "Extra copies by bytes; looks not compared" if near is None else "Extra copies"
        found.append((term, f"{exact + (near or 0):,}"))
    if "against" in told:
        found.append(("Evaluation data here", f"{100 * told['against']['share']:.2f}%"))
    return found


def _charts(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    captions, pictures = told["captions"], told.get("pictures", {})
    wanted = [
        ("Caption length in characters", captions["characters"], "characters"),
        ("Caption length in words", captions["words"], "words"),
        ("Caption length in tokens", captions.get("tokens", {}), "tokens"),
        ("Shortest side", pictures.get("shortest side", {}), "px"),
        ("Width", pictures.get("width", {}), "px"),
        ("Height", pictures.get("height", {}), "px"),
        ("Width over height", pictures.get("aspect", {}), ""),
        ("Length of sounds", told.get("audios", {}).get("seconds", {}), "s"),
        ("Length of videos", told.get("videos", {}).get("seconds", {}), "s"),
    ]
    drawn = (histogram(*one) for one in wanted)
    return [chart for chart in drawn if chart is not None]


def _kinds(told: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, int]]]]:
    found = [("Formats of pictures", told.get("pictures", {}).get("formats", {}))]
    found += [("Kinds of sound", told.get("audios", {}).get("kinds", {}))]
    found += [("Kinds of video", told.get("videos", {}).get("kinds", {}))]
    return [(title, list(kinds.items())[:WORDS]) for title, kinds in found if kinds]


def _texts_said(told: Mapping[str, Any]) -> str:
    captions = told["captions"]
    text = (
        f"{captions['different']:,} different captions of {captions['different_words']:,} different words. "
    )
    text += (
        f"{captions['long']['count']:,} have more than {captions['long']['over_characters']:,} characters. "
    )
    return (
        text
        + f"{told['texts_without_caption']:,} samples have a txt or json without a caption (blank, or a label alone)."
    )


def _sheet(corpus: Corpus, seed: int) -> list[dict[str, Any]]:
    index = corpus.index
    count = min(SHEET, len(index))
    chosen = np.sort(np.random.default_rng(seed).choice(len(index), count, replace=False)).tolist()
    held = {kind: corpus.has(kind) for kind in KINDS}
    found = []
    for sample in chosen:
        captions = index.captions(sample) if index.captioned[sample] else []
        what = " and ".join(kind for kind in KINDS if held[kind][sample])
        picture = thumbnail(index, sample) if held["image"][sample] else ""
        broken = "" if picture or not held["image"][sample] else " (cannot be read)"
        found.append(
            {
                "key": index.key(sample),
                "what": what + broken,
                "picture": picture,
                "captions": [text[:400] for text in captions[:3]],
                "more": max(0, len(captions) - 3),
            }
        )
    return found


def thumbnail(index: ShardIndex, sample: int) -> str:
    """A small copy of the picture as a data: address; empty where it cannot be read."""
    try:
        image = images.decode(index.image(sample))
    except BrokenSample:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR, reducing_gap=2.0)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _shown(matches: Sequence[Match], ours: ShardIndex, theirs: ShardIndex) -> list[dict[str, Any]]:
    """The first few of each kind: what is surely the same would hide what may be a mistake."""
    kinds = ("exact", "near", "mirrored")
    each = {kind: [match for match in matches if match.kind == kind] for kind in kinds}
    room = {kind: len(each[kind]) for kind in kinds}
    while sum(room.values()) > PAIRS:
        room[max(kinds, key=lambda kind: room[kind])] -= 1
    chosen = [match for kind in ("near", "mirrored", "exact") for match in each[kind][: room[kind]]]
    return [
        {
            "kind": match.kind, "distance": match.distance, "check": match.check,
            "key": ours.key(match.sample), "like": theirs.key(match.like),
            "ours": thumbnail(ours, match.sample), "theirs": thumbnail(theirs, match.like),
        }
        for match in chosen
    ]  # fmt: skip


def _against(ours: ShardIndex, found: Against, theirs: ShardIndex) -> dict[str, Any]:
    said = (
        f"{found.found:,} of {found.evaluated:,} evaluation pictures ({100 * found.share:.2f}%) are in the corpus too, "
        f"in {found.training_samples:,} of its samples. {found.captions_found:,} of {found.captioned:,} evaluation samples "
        "have a caption whose words are here as well. On the left the corpus, on the right the evaluation data."
    )
    matches = _shown(found.matches, ours, theirs)
    return {
        "said": said,
        "matches": matches,
        "captions": [(t[:300], a, b) for t, a, b in found.captions[:WORDS]],
    }


def _duplicates(ours: ShardIndex, found: Duplicates) -> dict[str, Any]:
    said = f"{found.exact:,} samples have the very bytes of an earlier one"
    if found.near is None:
        said += ". Whether others look like one was not compared: --duplicates does."
    else:
        said += f", {found.near:,} more look like one."
    if found.matches:
        said += " On the left the extra sample, on the right the earlier one."
    if found.flat:
        said += f" {found.flat:,} pictures without contrast were compared byte for byte alone."
    return {"said": said, "matches": _shown(found.matches, ours, ours)}


def _problems(told: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    found = []
    for name, title in (("pictures", "pictures"), ("audios", "sounds"), ("videos", "videos")):
        if count := told.get(name, {}).get("broken", {}).get("count"):
            listed = told[name]["broken"]["first"]
            found.append((f"{count:,} broken {title}", [f"{key}: {reason}" for key, reason in listed]))
    if told["problems"]["count"]:
        listed = [f"{Path(shard).name}: {key}: {reason}" for shard, key, reason in told["problems"]["first"]]
        found.append((f"{told['problems']['count']:,} problems in the shards", listed))
    if told["captions"]["long"]["count"]:
        listed = [f"{key}: {count:,} characters" for key, count in told["captions"]["long"]["first"]]
        found.append((f"{told['captions']['long']['count']:,} very long captions", listed))
    if told["notes"]:
        found.append(("Notes", list(told["notes"])))
    return found
