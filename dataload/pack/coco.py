"""COCO captions: captions_train2017.json and the like, also image_info_*.json, which has no captions."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

from dataload.pack.source import Picture, Source, SourceError, check_folder, inside, load_json, need, tidy


def read_coco(captions: Path, images: Path, *, split: str = "train", captioned_only: bool = False) -> Source:
    """Reads a COCO captions file; every picture belongs to `split`, as COCO has one file per split.

    Picture ids may be any integers or strings. A picture without a caption is packed as an uncaptioned one,
    unless `captioned_only`. Raises SourceError for other files than these.
    """
    check_folder(images)
    data = load_json(captions, "coco")
    texts: dict[int | str, list[str]] = defaultdict(list)
    for note in data.get("annotations", ()):
        texts[need(note, "image_id", captions)].append(need(note, "caption", captions))

    source = Source("coco", [])
    blank = 0
    for entry in data["images"]:
        number, name = need(entry, "id", captions), need(entry, "file_name", captions)
        given = texts.pop(number, [])
        kept = tidy(given, f"{captions}, image {number}")
        blank += len(given) - len(kept)
        if captioned_only and not kept:
            source.problems.setdefault("pictures without a caption (--captioned-only)", []).append(name)
            continue
        path = inside(images, name, str(captions))
        source.pictures.append(Picture(path, name, split, kept, {"image_id": number, "file_name": name}))

    repeated = [
        number for number, count in Counter(entry["id"] for entry in data["images"]).items() if count > 1
    ]
    if repeated:
        raise SourceError(
            f"{captions}: {len(repeated)} image ids stand for several pictures, the first is {repeated[0]}"
        )
    if texts:
        source.problems["captions of an image id that the file does not list"] = [
            f"{number}: {text}" for number, orphans in texts.items() for text in orphans
        ]
    if blank:
        source.notes.append(f"{blank:,} blank captions were left out")
    return source
