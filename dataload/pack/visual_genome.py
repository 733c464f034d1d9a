"""Visual Genome: region_descriptions.json, objects.json, question_answers.json, image_data.json, and its pictures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataload.pack.source import Picture, Source, SourceError, check_folder, need, read_json, tidy

FOLDERS = ("", "VG_100K", "VG_100K_2", "images", "images2")
"""in which <id>.jpg is looked for"""


@dataclass(frozen=True)
class GenomeFiles:
    """Which files there are."""

    regions: Path | None = None
    objects: Path | None = None
    questions: Path | None = None
    image_data: Path | None = None
    """sizes of the pictures; with it, boxes of a picture of another size are noticed"""


def read_visual_genome(
    files: GenomeFiles, images: Path, *, split: str = "train", regions_as_captions: bool = False
) -> Source:
    """Reads regions, objects and questions; all pictures belong to `split`, as Visual Genome has none.

    An object's category is its first name; ids are ranks by frequency, 1 = the most frequent. `regions_as_captions`: the
    phrases are the picture's captions, too. Raises SourceError for other files, and where two have no picture in common.
    """
    check_folder(images)
    parts = {
        name: _by_image(getattr(files, name), name)
        for name in ("regions", "objects", "questions")
        if getattr(files, name)
    }
    if not parts:
        raise SourceError("visual-genome needs --regions, --objects or --questions")
    source = Source("visual-genome", [])
    listed = _listed(files, parts, source)
    order = list(dict.fromkeys(number for part in parts.values() for number in part))
    categories = _categories(parts.get("objects", {}), source)
    paths = _paths(images)
    blank = 0
    for number in order:
        facts: dict[str, Any] = {"image_id": number, "file_name": f"{number}.jpg"}
        captions: tuple[str, ...] = ()
        if "regions" in parts:
            regions = [_region(one, files.regions) for one in parts["regions"].get(number, ())]
            facts["regions"] = [one for one in regions if one["phrase"]]
            blank += len(regions) - len(facts["regions"])
            if regions_as_captions:
                captions = tuple(one["phrase"] for one in facts["regions"])
        if "objects" in parts:
            facts["objects"] = [
                _object(one, categories, files.objects) for one in parts["objects"].get(number, ())
            ]
        if "questions" in parts:
            facts["questions"] = [
                _question(one, files.questions) for one in parts["questions"].get(number, ())
            ]
        path = paths.get(str(number), images / f"{number}.jpg")
        source.pictures.append(
            Picture(path, f"{number}.jpg", split, captions, facts, size=listed.get(number))
        )
    if blank:
        source.notes.append(f"{blank:,} regions without a phrase were left out")
    return source


def _by_image(file: Path, name: str) -> dict[Any, list[dict[str, Any]]]:
    """The entries of a file by picture."""
    member = "qas" if name == "questions" else name
    data = read_json(file)
    if not isinstance(data, list) or not data or not isinstance(data[0], dict) or member not in data[0]:
        raise SourceError(
            f'{file} is not Visual Genome\'s {name}, [{{"image_id" or "id": 1, "{member}": [...]}}]'
        )
    found: dict[Any, list[dict[str, Any]]] = {}
    for entry in data:
        number = entry["image_id"] if "image_id" in entry else need(entry, "id", file)
        if number in found:
            raise SourceError(f"{file}: image {number} comes twice")
        found[number] = need(entry, member, file)
    return found


def _listed(
    files: GenomeFiles, parts: dict[str, dict[Any, list[dict[str, Any]]]], source: Source
) -> dict[Any, tuple[int, int]]:
    """Sizes of the pictures, after looking whether the files speak of the same ones."""
    sizes: dict[Any, tuple[int, int]] = {}
    known = {name: set(part) for name, part in parts.items()}
    if (file := files.image_data) is not None:
        data = read_json(file)
        if not isinstance(data, list):
            raise SourceError(
                f'{file} is not Visual Genome\'s image_data, [{{"image_id", "width", "height"}}]'
            )
        for entry in data:
            number = (
                entry["image_id"]
                if isinstance(entry, dict) and "image_id" in entry
                else need(entry, "id", file)
            )
            sizes[number] = (int(need(entry, "width", file)), int(need(entry, "height", file)))
        known["image data"] = set(sizes)
    everything = set().union(*known.values())
    for name, numbers in known.items():
        others = [other for title, other in known.items() if title != name]
        if others and not numbers & set().union(*others):
            raise SourceError(
                f"the file of {name} has no picture in common with the others: are they of the same data set?"
            )
        if len(numbers) < len(everything):
            source.notes.append(
                f"{len(everything) - len(numbers):,} of {len(everything):,} pictures are not in the file of {name}"
            )
    return sizes


def _categories(objects: dict[Any, list[dict[str, Any]]], source: Source) -> dict[str, int]:
    counts = Counter(_name(one) for several in objects.values() for one in several)
    order = sorted(counts, key=lambda name: (-counts[name], name))
    if order:
        source.classes["objects"] = [{"id": place, "name": name} for place, name in enumerate(order, 1)]
    return {name: place for place, name in enumerate(order, 1)}


def _name(one: dict[str, Any]) -> str:
    names = one.get("names") or [one.get("name", "")]
    return " ".join(str(names[0]).split()) or "(no name)"


def _box(one: dict[str, Any], wide: str, high: str, file: Path | None) -> list[float]:
    where = file or Path()
    return [float(need(one, key, where)) for key in ("x", "y", wide, high)]


def _region(one: dict[str, Any], file: Path | None) -> dict[str, Any]:
    where = file or Path()
    phrase = tidy([need(one, "phrase", where)], f"{where}, region {one.get('region_id')}")
    return {
        "region_id": int(need(one, "region_id", where)), "bbox": _box(one, "width", "height", file),
        "phrase": phrase[0] if phrase else "",
    }  # fmt: skip


def _object(one: dict[str, Any], categories: dict[str, int], file: Path | None) -> dict[str, Any]:
    box = _box(one, "w", "h", file)
    number = need(one, "object_id" if "object_id" in one else "id", file or Path())
    return {
        "id": int(number), "bbox": box, "category_id": categories[_name(one)], "category": _name(one), "iscrowd": 0,
        "area": box[2] * box[3],
    }  # fmt: skip


def _question(one: dict[str, Any], file: Path | None) -> dict[str, Any]:
    where = file or Path()
    number = need(one, "qa_id", where)
    return {
        "question_id": number,
        "question": need(one, "question", where),
        "answers": [need(one, "answer", where)],
    }


def _paths(images: Path) -> dict[str, Path]:
    """<id>.jpg in the folder or in one of those that the downloads make."""
    found: dict[str, Path] = {}
    for name in FOLDERS:
        folder = images / name
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
                    found.setdefault(path.stem, path)
    return found
