"""Flickr30k's and Flickr8k's token files: results_20130124.token, Flickr8k.token.txt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dataload.pack.source import Picture, Source, SourceError, check_folder, inside, tidy

_LINE = re.compile(r"(.+)#(\d+)\t(.*)")


def read_flickr(tokens: Path, images: Path, *, lists: Sequence[Path] = (), split: str = "train") -> Source:
    """Reads lines "1000092795.jpg#0<tab>Two young guys ..."; the lines of a picture are its captions.

    lists: a file per split, named after it (train.txt, val.txt, Flickr_8k.testImages.txt), with one picture per line, with
    or without .jpg; pictures in none are not packed, and listed. Without lists all belong to `split`. Raises SourceError
    for another file, for a picture in two lists, and where no picture of a list has captions.
    """
    check_folder(images)
    captions: dict[str, list[str]] = {}
    blank = 0
    for number, line in enumerate(_read(tokens), 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise SourceError(
                f"{tokens}, line {number}: a line is NAME.jpg#0<tab>caption, this one is {line[:120]!r}"
            )
        kept = tidy([match[3]], f"{tokens}, line {number}")
        blank += not kept
        captions.setdefault(match[1], []).extend(kept)
    if not captions:
        raise SourceError(f"{tokens} has no captions")
    source = Source("flickr", [])
    parts = _splits(lists, captions.keys(), source) if lists else dict.fromkeys(captions, split)
    for name, texts in captions.items():
        if name not in parts:
            source.problems.setdefault("pictures in no list of a split, not packed", []).append(name)
            continue
        path = inside(images, name, str(tokens))
        source.pictures.append(Picture(path, name, parts[name], tuple(texts), {"file_name": name}))
    if blank:
        source.notes.append(f"{blank:,} blank captions were left out")
    return source


def _splits(lists: Sequence[Path], known: object, source: Source) -> dict[str, str]:
    parts: dict[str, str] = {}
    for file in lists:
        split = _split_of(file)
        names = [line.strip() for line in _read(file) if line.strip()]
        names = [name if Path(name).suffix else f"{name}.jpg" for name in names]
        strange = [name for name in names if name not in known]  # type: ignore[operator]
        if len(strange) == len(names):
            raise SourceError(
                f"none of the {len(names):,} pictures of {file} has captions: is it a list of this data set?"
            )
        if strange:
            source.problems[f"pictures of {file.name} without captions, not packed"] = strange
        for name in names:
            if parts.setdefault(name, split) != split:
                raise SourceError(f"{name} is in the split {split!r} and in {parts[name]!r}")
    return parts


def _split_of(file: Path) -> str:
    """train of train.txt, flickr30k_train.txt, Flickr_8k.trainImages.txt."""
    found = re.findall(r"train|val|dev|test", file.name)
    return {"dev": "val"}.get(found[-1], found[-1]) if found else re.sub(r"[^A-Za-z0-9_-]", "_", file.stem)


def _read(file: Path) -> list[str]:
    if not file.is_file():
        raise SourceError(f"{file}: no such file")
    try:
        return file.read_text(encoding="utf-8-sig").split("\n")[:-1] if file.stat().st_size else []
    except UnicodeDecodeError as error:
        raise SourceError(f"{file} is not UTF-8 text: {error}") from error
