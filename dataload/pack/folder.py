"""A folder of pictures, with captions in text or JSON files beside them or without."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from dataload.pack.source import Picture, Source, SourceError, check_folder, tidy
from dataload.tarindex import IMAGE_EXTENSIONS


def read_folder(images: Path, *, split: str = "train") -> Source:
    """Finds all pictures below `images`, sorted by path.

    The captions of NAME.jpg are the lines of NAME.txt, and in NAME.json "caption" (a text), "captions" (a
    list) or a bare list of texts; the same text twice counts once. What is neither a picture nor belongs to
    one is counted by suffix. Raises SourceError for a caption file that cannot be read.
    """
    check_folder(images)
    files = sorted(path for path in images.rglob("*") if path.is_file())
    pictures = [path for path in files if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS]
    stems = {path.with_suffix("") for path in pictures}
    others = [path for path in files if path.suffix.lower().lstrip(".") not in IMAGE_EXTENSIONS]
    ignored = Counter(
        path.suffix.lower() or "(no suffix)"
        for path in others
        if path.suffix not in (".txt", ".json") or path.with_suffix("") not in stems
    )
    source = Source("folder", [])
    for path in pictures:
        name = path.relative_to(images).as_posix()
        captions = tuple(dict.fromkeys(_lines(path.with_suffix(".txt")) + _texts(path.with_suffix(".json"))))
        source.pictures.append(Picture(path, name, split, captions, {"file_name": name}))
    if ignored:
        found = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(ignored.items()))
        source.notes.append(f"{ignored.total():,} other files were ignored: {found}")
    return source


def _lines(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    try:
        return tidy(path.read_text(encoding="utf-8-sig").splitlines(), str(path))
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text: {error}") from error


def _texts(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is not JSON: {error}") from error
    if isinstance(data, dict):
        data = data.get("captions", []) or ([data["caption"]] if data.get("caption") is not None else [])
    if not isinstance(data, list):
        raise SourceError(
            f'{path}: captions are {{"caption": text}}, {{"captions": [text, ...]}} or [text, ...]'
        )
    return tidy(data, str(path))
