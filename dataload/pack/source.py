"""What every reader hands to the packer, and what the readers share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class SourceError(ValueError):
    """The source is not what the command expects; the message says what it is and what would fit."""


@dataclass(frozen=True)
class Picture:
    """One sample of a source: a picture, a sound, a video, or several of these that belong together. Without
    captions it is packed as an uncaptioned one."""

    path: Path
    """where the file should be"""
    name: str
    """as the source writes it, for reports and the JSON sidecar"""
    split: str
    captions: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    """joins the captions in the JSON sidecar: ids that the source gives, and "label" where there is one"""
    others: tuple[Path, ...] = ()
    """more files of the sample, each of another kind than `path` and the others"""

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files of the sample."""
        return (self.path, *self.others)


@dataclass
class Source:
    """All pictures of a source in its own order, and what is to be said about it."""

    kind: str
    pictures: list[Picture]
    notes: list[str] = field(default_factory=list)
    """sentences for the summary"""
    problems: dict[str, list[str]] = field(default_factory=dict)
    """what was left out, listed by reason"""


def tidy(captions: Iterable[Any], name: str) -> tuple[str, ...]:
    """Captions with runs of white space, line ends too, made one space; blank ones go.

    Raises SourceError for a caption that is no text.
    """
    kept = []
    for caption in captions:
        if not isinstance(caption, str):
            raise SourceError(
                f"{name}: a caption is text, but this one is {caption!r} ({type(caption).__name__})"
            )
        if text := " ".join(caption.split()):
            kept.append(text)
    return tuple(kept)


def inside(folder: Path, name: str, where: str) -> Path:
    """folder/name; refuses names that lead out of the folder (absolute, or with more ".." than folders)."""
    steps = os.path.normpath(name)
    if not name or os.path.isabs(name) or steps.split(os.sep)[0] == os.pardir:
        raise SourceError(
            f"{where}: {name!r} does not lie in the picture folder; names must be relative to --images"
        )
    return folder / steps


def need(entry: Any, key: str, file: Path) -> Any:
    """entry[key]; raises SourceError where the entry of a JSON file has no such key."""
    if not isinstance(entry, dict) or key not in entry:
        raise SourceError(f"{file}: an entry has no {key!r}: {str(entry)[:200]}")
    return entry[key]


def check_folder(folder: Path) -> None:
    """Raises SourceError where there is no such folder."""
    if not folder.is_dir():
        raise SourceError(f"--images {folder}: " + ("not a folder" if folder.exists() else "no such folder"))


def load_json(path: Path, command: str) -> dict[str, Any]:
    """The object in a JSON file, after making sure that it is of the kind that `command` reads.

    Raises SourceError for a missing or damaged file, and for another kind of annotations: the message names
    its kind and the command that fits.
    """
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is not JSON: {error}") from error
    kind = _kind(data)
    if kind != command:
        advice = f"use: python -m dataload.pack {kind}" if kind in ("coco", "karpathy") else f"it is {kind}"
        expected = {
            "coco": 'COCO\'s captions, {"images": [{"id", "file_name"}], '
            '"annotations": [{"image_id", "caption"}]}',
            "karpathy": 'Karpathy\'s splits, {"images": [{"filename", "split", "sentences": [{"raw"}]}]}',
        }[command]
        raise SourceError(f"{path} is not what `{command}` reads ({expected}); {advice}")
    return data


def _kind(data: Any) -> str:
    """A command of dataload.pack that reads `data`, or in words what it is."""
    if not isinstance(data, dict):
        return f"JSON, but a {type(data).__name__} at its top"
    if "questions" in data:
        return "a file of VQA questions"
    images, notes = data.get("images"), data.get("annotations")
    if isinstance(images, list) and images and isinstance(images[0], dict):
        if "sentences" in images[0] or ("filename" in images[0] and "split" in images[0]):
            return "karpathy"
        if "file_name" in images[0] and (not notes or "caption" in notes[0]):
            return "coco"
    if isinstance(notes, list) and notes and isinstance(notes[0], dict):
        for key, kind in (
            ("keypoints", "COCO keypoints (person_keypoints_*.json); captions are in captions_*.json"),
            ("bbox", "COCO instances: boxes and masks (instances_*.json); captions are in captions_*.json"),
            ("answers", "VQA annotations"),
        ):
            if key in notes[0]:
                return kind
    return f"an object with the keys {', '.join(sorted(map(str, data)))[:200] or '(none)'}"
