"""What every reader hands to the packer, and what the readers share."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataload.pack.geometry import PLACED, LabelMap, Size


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
    label_map: LabelMap | None = None
    """becomes KEY.seg.png"""
    size: Size | None = None
    """width and height of the picture that the boxes among the facts are for, where the source says it"""

    @property
    def paths(self) -> tuple[Path, ...]:
        """All media files of the sample."""
        return (self.path, *self.others)

    @property
    def is_placed(self) -> bool:
        """Whether something is said about places in the picture, so that its size matters."""
        return self.label_map is not None or any(name in self.facts for name in PLACED)


@dataclass
class Source:
    """All pictures of a source in its own order, and what is to be said about it."""

    kind: str
    pictures: list[Picture]
    notes: list[str] = field(default_factory=list)
    """sentences for the summary"""
    problems: dict[str, list[str]] = field(default_factory=dict)
    """what was left out, listed by reason"""
    classes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """classes.json: what the numbers of "objects", "segmentation" and "labels" stand for"""


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


def read_json(path: Path) -> Any:
    """What a JSON file holds, also one that is compressed by gzip. Raises SourceError for a missing or damaged one."""
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    data = path.read_bytes()
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return json.loads(data.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise SourceError(f"{path} is not JSON: {error}") from error


EXPECTED = {
    "coco": 'COCO\'s captions, {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}',
    "instances": 'COCO\'s objects, {"images": [{"id", "file_name"}], "categories": [{"id", "name"}], '
    '"annotations": [{"image_id", "category_id", "bbox"}]}',
    "panoptic": 'COCO\'s panoptic segments, {"images", "categories", "annotations": [{"file_name", "segments_info"}]}',
    "karpathy": 'Karpathy\'s splits, {"images": [{"filename", "split", "sentences": [{"raw"}]}]}',
    "questions": 'VQA\'s questions, {"questions": [{"question_id", "image_id", "question"}]}',
    "answers": 'VQA\'s annotations, {"annotations": [{"question_id", "image_id", "answers": [{"answer"}]}]}',
}
_FITS = {
    "coco": "use: python -m dataload.pack coco",
    "karpathy": "use: python -m dataload.pack karpathy",
    "questions": "it is a file of VQA questions: python -m dataload.pack vqa --questions",
    "answers": "it is VQA annotations: python -m dataload.pack vqa --annotations",
    "keypoints": "it is COCO keypoints (person_keypoints_*.json); captions are in captions_*.json",
    "instances": "it is COCO instances: boxes and masks (instances_*.json: --instances); captions are in captions_*.json",
    "panoptic": "it is COCO panoptic segments (panoptic_*.json: --panoptic)",
}


def load_json(path: Path, kind: str) -> dict[str, Any]:
    """The object in a JSON file, after making sure that it is of a kind in EXPECTED.

    Raises SourceError for a missing or damaged file, and for another kind of annotations: the message names
    its kind and the command that fits.
    """
    data = read_json(path)
    found = _kind(data)
    if found == kind or (kind == "instances" and found == "keypoints"):
        return dict(data)
    raise SourceError(
        f"{path} is not what is read here ({EXPECTED[kind]}); {_FITS.get(found) or f'it is {found}'}"
    )


def _kind(data: Any) -> str:
    """The kind of a JSON file of annotations, or in words what it is."""
    if not isinstance(data, dict):
        return f"JSON, but a {type(data).__name__} at its top"
    if "questions" in data:
        return "questions"
    images, notes = data.get("images"), data.get("annotations")
    first = notes[0] if isinstance(notes, list) and notes and isinstance(notes[0], dict) else {}
    for key, kind in (
        ("segments_info", "panoptic"),
        ("keypoints", "keypoints"),
        ("bbox", "instances"),
        ("answers", "answers"),
    ):
        if key in first:
            return kind
    if isinstance(images, list) and images and isinstance(images[0], dict):
        if "sentences" in images[0] or ("filename" in images[0] and "split" in images[0]):
            return "karpathy"
        if "file_name" in images[0] and (not notes or "caption" in first):
            return "instances" if not notes and data.get("categories") else "coco"
    return f"an object with the keys {', '.join(sorted(map(str, data)))[:200] or '(none)'}"
