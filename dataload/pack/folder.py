"""A folder of pictures, sounds and videos, with captions and labels in files beside them or without."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from dataload.pack.kinds import kind_of
from dataload.pack.source import Picture, Source, SourceError, check_folder, tidy

FIRST = ("image", "video", "audio")  # of a sample's files, the first of these names it


def read_folder(images: Path, *, split: str = "train", label_from_folder: bool = False) -> Source:
    """Finds all pictures, sounds and videos below `images`, sorted by path.

    Files of the same name and of different kinds (NAME.mp4, NAME.wav, NAME.jpg) are one sample; a second one
    of a kind (NAME.png beside NAME.jpg) is a sample of its own. The captions of NAME.jpg are the lines of
    NAME.txt, and in NAME.json "caption" (a text), "captions" (a list) or a bare list of texts; the same text
    twice counts once. "label" in NAME.json (a text or a whole number) is the sample's label; with
    `label_from_folder` it is the name of the folder that the file lies in. What is neither media nor belongs
    to any is counted by suffix. Raises SourceError for a caption file that cannot be read, and for a file
    outside of any class's folder.
    """
    check_folder(images)
    files = sorted(path for path in images.rglob("*") if path.is_file())
    media = [path for path in files if kind_of(path)]
    stems = {path.with_suffix("") for path in media}
    ignored = Counter(
        path.suffix.lower() or "(no suffix)"
        for path in files
        if not kind_of(path) and (path.suffix not in (".txt", ".json") or path.with_suffix("") not in stems)
    )
    source = Source("folder", [])
    for group in _groups(media):
        path, *others = sorted(group, key=lambda one: FIRST.index(kind_of(one)))
        name = path.relative_to(images).as_posix()
        texts, label = _sidecar(path.with_suffix(".json"))
        captions = tuple(dict.fromkeys(_lines(path.with_suffix(".txt")) + texts))
        facts: dict[str, Any] = {"file_name": name}
        if others:
            facts["files"] = [one.relative_to(images).as_posix() for one in (path, *others)]
        if label_from_folder:
            if path.parent == images:
                raise SourceError(f"--label-from-folder: {name} lies in no folder below {images}")
            label = path.parent.relative_to(images).as_posix()
        if label is not None:
            facts["label"] = label
        source.pictures.append(Picture(path, name, split, captions, facts, tuple(others)))
    if ignored:
        found = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(ignored.items()))
        source.notes.append(f"{ignored.total():,} other files were ignored: {found}")
    return source


def _groups(media: list[Path]) -> list[list[Path]]:
    """Files of the same name, at most one of a kind, in the order of their first."""
    groups: list[list[Path]] = []
    open_for: dict[tuple[Path, str], list[Path]] = {}  # (stem, a kind that it still lacks)
    for path in media:
        stem, kind = path.with_suffix(""), kind_of(path)
        group = open_for.pop((stem, kind), None)
        if group is None:
            group = []
            groups.append(group)
            for lacking in FIRST:
                if lacking != kind:
                    open_for.setdefault((stem, lacking), group)
        group.append(path)
    return groups


def _lines(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    try:
        return tidy(path.read_text(encoding="utf-8-sig").splitlines(), str(path))
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text: {error}") from error


def _sidecar(path: Path) -> tuple[tuple[str, ...], str | int | None]:
    """Captions and label of a NAME.json."""
    if not path.is_file():
        return (), None
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is not JSON: {error}") from error
    label = None
    if isinstance(data, dict):
        label = data.get("label")
        data = data.get("captions", []) or ([data["caption"]] if data.get("caption") is not None else [])
    if not isinstance(data, list):
        raise SourceError(
            f'{path}: captions are {{"caption": text}}, {{"captions": [text, ...]}} or [text, ...]'
        )
    if label is not None and (not isinstance(label, str | int) or isinstance(label, bool)):
        raise SourceError(f"{path}: a label is a text or a whole number, but this one is {label!r}")
    return tidy(data, str(path)), label
