"""COCO: captions_*.json, instances_*.json, stuff and panoptic annotations, one set of files per split; also
image_info_*.json, which has pictures alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataload.pack.coco_places import CocoFiles, Places, read_places
from dataload.pack.source import Picture, Source, SourceError, check_folder, inside, load_json, need, tidy


@dataclass
class _Images:
    """Pictures by id, as one or several files list them."""

    entries: dict[int | str, dict[str, Any]] = field(default_factory=dict)
    files: dict[Path, set[int | str]] = field(default_factory=dict)

    def add(self, file: Path, data: dict[str, Any]) -> None:
        """The pictures of a file. SourceError where an id stands for several pictures, or the file lists only others
        than the files before."""
        listed = data["images"]
        numbers = [need(entry, "id", file) for entry in listed]
        if repeated := [number for number, count in Counter(numbers).items() if count > 1]:
            raise SourceError(
                f"{file}: {len(repeated)} image ids stand for several pictures, the first is {repeated[0]}"
            )
        if self.entries and not self.entries.keys() & set(numbers):
            raise SourceError(
                f"{file} lists {len(numbers):,} pictures, and none of them is among the {len(self.entries):,} of "
                f"{', '.join(str(path) for path in self.files)}: are they of the same split?"
            )
        self.files[file] = set(numbers)
        for number, entry in zip(numbers, listed, strict=True):
            name = need(entry, "file_name", file)
            known = self.entries.setdefault(number, entry)
            if known["file_name"] != name:
                raise SourceError(
                    f"{file}: image {number} is {name} here and {known['file_name']} in another file"
                )

    def notes(self) -> list[str]:
        """Which pictures are in one file and not in another."""
        return [
            f"{len(self.entries) - len(listed):,} of {len(self.entries):,} pictures are not in {file.name}"
            for file, listed in self.files.items()
            if len(listed) < len(self.entries)
        ]


def read_coco(
    captions: Path | CocoFiles, images: Path, *, split: str = "train", captioned_only: bool = False
) -> Source:
    """Reads a captions file, or several files of the same pictures; every picture belongs to `split`, as COCO has one
    file per split.

    Picture ids may be any integers or strings. A picture without a caption is packed as an uncaptioned one,
    unless `captioned_only`. Raises SourceError for other files than these, and for files of different splits.
    """
    files = captions if isinstance(captions, CocoFiles) else CocoFiles(captions)
    check_folder(images)
    if not any((files.captions, files.instances, files.stuff, files.panoptic)):
        raise SourceError(
            "coco needs --captions, --instances, --stuff or --panoptic: a JSON that lists the pictures"
        )
    source, listed = Source("coco", []), _Images()
    texts: dict[int | str, list[str]] = defaultdict(list)
    if files.captions is not None:
        data = load_json(files.captions, "coco")
        listed.add(files.captions, data)
        for note in data.get("annotations", ()):
            texts[need(note, "image_id", files.captions)].append(need(note, "caption", files.captions))
    places = read_places(files, source, listed.add)
    blank = 0
    for number, entry in listed.entries.items():
        given = texts.pop(number, [])
        kept = tidy(given, f"{files.captions}, image {number}")
        blank += len(given) - len(kept)
        if captioned_only and not kept:
            source.problems.setdefault("pictures without a caption (--captioned-only)", []).append(
                entry["file_name"]
            )
            continue
        source.pictures.append(_picture(number, entry, images, split, kept, places))
    source.notes += listed.notes()
    if texts:
        source.problems["captions of an image id that the file does not list"] = [
            f"{number}: {text}" for number, orphans in texts.items() for text in orphans
        ]
    if blank:
        source.notes.append(f"{blank:,} blank captions were left out")
    return source


def _picture(
    number: int | str,
    entry: dict[str, Any],
    images: Path,
    split: str,
    captions: tuple[str, ...],
    places: Places,
) -> Picture:
    name = entry["file_name"]
    facts: dict[str, Any] = {"image_id": number, "file_name": name}
    if number in places.objects:
        facts["objects"] = places.objects[number]
    size = None
    if places and entry.get("width") and entry.get("height"):
        size = (int(entry["width"]), int(entry["height"]))
    label_map = places.map_of(number, name)
    return Picture(
        inside(images, name, "the JSON"), name, split, captions, facts, label_map=label_map, size=size
    )
