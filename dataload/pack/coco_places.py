"""Where things are in COCO's pictures: boxes and masks, stuff as masks or as maps, panoptic segments.

Classes of label maps are numbered without gaps, 0, 1, ... in the order of the file's categories (stuffthingmaps have their
own, 0 to 181); classes.json has the names, and COCO's category id as "source_id".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from dataload.pack.geometry import LabelMap, MapFile, Painted, PanopticFile
from dataload.pack.source import Source, SourceError, load_json, need

MOST_CLASSES = 255
Add = Callable[[Path, dict[str, Any]], None]
"""takes the pictures that a file lists"""


@dataclass(frozen=True)
class CocoFiles:
    """Which files of a split there are."""

    captions: Path | None = None
    """captions_train2017.json"""
    instances: Path | None = None
    """instances_train2017.json: boxes and masks"""
    stuff: Path | None = None
    """stuff_train2017.json: label maps are painted from its masks"""
    stuff_maps: Path | None = None
    """a folder of stuffthingmaps: NAME.png, 0 to 181, 255 = unlabelled"""
    stuff_labels: Path | None = None
    """COCO-Stuff's labels.txt, which names the values of `stuff_maps`"""
    panoptic: Path | None = None
    """panoptic_train2017.json"""
    panoptic_maps: Path | None = None
    """its folder of PNGs"""


@dataclass
class Places:
    """By picture: its objects, and how its label map is made."""

    objects: dict[int | str, list[dict[str, Any]]] = field(default_factory=dict)
    """of every picture that the instances file lists, be it an empty list"""
    maps: dict[int | str, LabelMap] = field(default_factory=dict)
    folder: Path | None = None
    """of stuffthingmaps, for every picture"""

    def __bool__(self) -> bool:
        return bool(self.objects or self.maps or self.folder)

    def map_of(self, number: int | str, name: str) -> LabelMap | None:
        """The label map of a picture; None where there is none."""
        if self.folder is not None:
            return MapFile(self.folder / PurePosixPath(name).with_suffix(".png").name)
        return self.maps.get(number)


def read_places(files: CocoFiles, source: Source, add: Add) -> Places:
    """Reads what there is; `add` is told the pictures. Notes classes, problems and notes in `source`. SourceError."""
    given = [name for name in ("stuff", "stuff_maps", "panoptic") if getattr(files, name) is not None]
    if len(given) > 1:
        options = " and ".join("--" + name.replace("_", "-") for name in given)
        raise SourceError(f"{options} each make a label map; a picture has one, so choose")
    places = Places()
    if files.instances is not None:
        places.objects = _instances(files.instances, source, add)
    if files.stuff is not None:
        places.maps = _stuff(files.stuff, source, add)
    if files.panoptic is not None:
        places.maps = _panoptic(files.panoptic, files.panoptic_maps, source, add)
    if files.stuff_maps is not None:
        places.folder = files.stuff_maps
        _folder_of_maps(files.stuff_maps, "--stuff-maps")
        source.classes["segmentation"] = _stuff_labels(files.stuff_labels)
    return places


def _instances(file: Path, source: Source, add: Add) -> dict[int | str, list[dict[str, Any]]]:
    data = load_json(file, "instances")
    add(file, data)
    names = _categories(data, file)
    source.classes["objects"] = [{"id": number, "name": name} for number, name in names.items()]
    found: dict[int | str, list[dict[str, Any]]] = {entry["id"]: [] for entry in data["images"]}
    orphans, flat = [], 0
    for note in data.get("annotations", ()):
        number, category = need(note, "image_id", file), need(note, "category_id", file)
        box = [float(value) for value in need(note, "bbox", file)]
        if category not in names:
            raise SourceError(
                f"{file}: object {note.get('id')} has the category {category}, which is not listed"
            )
        flat += box[2] <= 0 or box[3] <= 0
        if number not in found:
            orphans.append(f"{number}: object {note.get('id')}, {names[category]}")
            continue
        entry = {
            "id": need(note, "id", file), "bbox": box, "category_id": category, "category": names[category],
            "iscrowd": int(note.get("iscrowd", 0)), "area": note.get("area", box[2] * box[3]),
        }  # fmt: skip
        if note.get("segmentation"):
            entry["segmentation"] = note["segmentation"]
        found[number].append(entry)
    if orphans:
        source.problems["objects of an image id that the file does not list"] = orphans
    if flat:
        source.notes.append(f"{flat:,} boxes have no width or no height; they are packed as they are")
    return found


def _stuff(file: Path, source: Source, add: Add) -> dict[int | str, LabelMap]:
    data = load_json(file, "instances")
    add(file, data)
    numbers = _numbered(_categories(data, file), source, file)
    masks: dict[int | str, list[tuple[int, Any]]] = defaultdict(list)
    for note in data.get("annotations", ()):
        category = need(note, "category_id", file)
        if category not in numbers:
            raise SourceError(
                f"{file}: mask {note.get('id')} has the category {category}, which is not listed"
            )
        masks[need(note, "image_id", file)].append((numbers[category], need(note, "segmentation", file)))
    return _known(
        {number: Painted(tuple(several)) for number, several in masks.items()}, data, source, "masks of stuff"
    )


def _panoptic(file: Path, folder: Path | None, source: Source, add: Add) -> dict[int | str, LabelMap]:
    data = load_json(file, "panoptic")
    if folder is None:
        raise SourceError(
            "--panoptic names the segments; --panoptic-maps DIR has to say where their PNGs are"
        )
    _folder_of_maps(folder, "--panoptic-maps")
    add(file, data)
    numbers = _numbered(_categories(data, file), source, file)
    found: dict[int | str, LabelMap] = {}
    for note in data["annotations"]:
        segments = {}
        for segment in need(note, "segments_info", file):
            category = need(segment, "category_id", file)
            if category not in numbers:
                raise SourceError(
                    f"{file}: segment {segment.get('id')} has the category {category}, which is not listed"
                )
            segments[int(need(segment, "id", file))] = numbers[category]
        name = PurePosixPath(need(note, "file_name", file)).name
        found[need(note, "image_id", file)] = PanopticFile(folder / name, segments)
    return _known(found, data, source, "panoptic maps")


def _known(
    found: dict[int | str, LabelMap], data: Mapping[str, Any], source: Source, what: str
) -> dict[int | str, LabelMap]:
    listed = {entry["id"] for entry in data["images"]}
    if orphans := [str(number) for number in found if number not in listed]:
        source.problems[f"{what} of an image id that the file does not list"] = orphans
    if without := len(listed - found.keys()):
        source.notes.append(
            f"{without:,} of {len(listed):,} pictures have no {what}; they are packed without a label map"
        )
    return found


def _categories(data: Mapping[str, Any], file: Path) -> dict[int, str]:
    return {
        int(need(entry, "id", file)): str(need(entry, "name", file)) for entry in data.get("categories", ())
    }


def _numbered(names: dict[int, str], source: Source, file: Path) -> dict[int, int]:
    """Category id -> class of the label map; classes.json is told."""
    if not names or len(names) > MOST_CLASSES:
        raise SourceError(f"{file} has {len(names):,} categories; a label map has 1 to {MOST_CLASSES}")
    source.classes["segmentation"] = [
        {"id": place, "name": name, "source_id": number} for place, (number, name) in enumerate(names.items())
    ]
    return {number: place for place, number in enumerate(names)}


def _folder_of_maps(folder: Path, option: str) -> None:
    if not folder.is_dir():
        raise SourceError(f"{option} {folder}: " + ("not a folder" if folder.exists() else "no such folder"))


def _stuff_labels(file: Path | None) -> list[dict[str, Any]]:
    """The classes of stuffthingmaps, from lines "1: person": a value in a map is one less."""
    if file is None:
        raise SourceError(
            "--stuff-maps holds numbers; --stuff-labels has to name them: COCO-Stuff's labels.txt"
        )
    if not file.is_file():
        raise SourceError(f"--stuff-labels {file}: no such file")
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    found = []
    for line in lines:
        match = re.fullmatch(r"(\d+)\s*:\s*(.+)", line)
        if match is None or int(match[1]) > MOST_CLASSES:
            raise SourceError(f'{file}: a line is "1: person", this one is {line!r}')
        if int(match[1]) > 0:  # 0 is "unlabeled", 255 in the maps
            found.append({"id": int(match[1]) - 1, "name": match[2], "source_id": int(match[1])})
    if not found:
        raise SourceError(f"{file} names no class")
    return found
