"""Pictures with label maps in a second folder: ADE20K, VOC, Cityscapes, and anything of that shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataload.pack.geometry import MapFile
from dataload.pack.kinds import kind_of
from dataload.pack.source import Picture, Source, SourceError, check_folder, read_json


def read_masks(
    images: Path,
    maps: Path,
    classes: Path,
    *,
    split: str = "train",
    ignore: Sequence[int] = (),
    reduce_zero: bool = False,
    image_end: str = "",
    map_end: str = "",
) -> Source:
    """Pairs images/A/NAME<image_end>.jpg with maps/A/NAME<map_end>.png, whose pixels are class numbers.

    classes: a text file with one name per line, the first is class 0, or JSON: a list of names, or {"0": name}. ignore:
    values in the maps that are no class, beside 255. reduce_zero: 0 is no class, and the others move down by one, so that
    1 is class 0 (ADE20K). Cityscapes: image_end="_leftImg8bit", map_end="_gtFine_labelTrainIds". Pictures without a map are
    packed without one, maps without a picture are listed. Raises SourceError where nothing fits.
    """
    check_folder(images)
    if not maps.is_dir():
        raise SourceError(f"--maps {maps}: " + ("not a folder" if maps.exists() else "no such folder"))
    source = Source("masks", [], classes={"segmentation": _classes(classes)})
    pictures = _by_name(images, image_end, lambda path: kind_of(path) == "image")
    found = _by_name(maps, map_end, lambda path: path.suffix.lower() == ".png")
    common = pictures.keys() & found.keys()
    if not common:
        first = next(iter(pictures), "none"), next(iter(found), "none")
        raise SourceError(
            f"none of the {len(pictures):,} pictures of {images} has a map among the {len(found):,} of {maps} (the first are "
            f"called {first[0]!r} and {first[1]!r}): --image-end and --map-end say what stands behind the common name"
        )
    for name, path in pictures.items():
        label_map = MapFile(found[name], tuple(ignore), reduce_zero) if name in found else None
        shown = path.relative_to(images).as_posix()
        source.pictures.append(Picture(path, shown, split, (), {"file_name": shown}, label_map=label_map))
    if without := len(pictures) - len(common):
        source.notes.append(
            f"{without:,} of {len(pictures):,} pictures have no map; they are packed without one"
        )
    if orphans := sorted(found.keys() - common):
        source.problems["label maps without a picture"] = orphans
    return source


def _by_name(folder: Path, end: str, wanted: Any) -> dict[str, Path]:
    result: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and wanted(path) and path.stem.endswith(end):
            name = path.relative_to(folder).with_suffix("").as_posix()
            name = name[: len(name) - len(end)]
            if name in result:
                raise SourceError(f"{path} and {result[name]} have the same name")
            result[name] = path
    return result


def _classes(file: Path) -> list[dict[str, Any]]:
    if file.suffix.lower() == ".json":
        data = read_json(file)
        try:
            names = (
                dict(enumerate(data))
                if isinstance(data, list)
                else {int(key): name for key, name in data.items()}
            )
        except (ValueError, AttributeError, TypeError):
            raise SourceError(f'{file}: classes are a list of names, or {{"0": name}}') from None
    elif file.is_file():
        names = dict(
            enumerate(
                line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()
            )
        )
    else:
        raise SourceError(f"--classes {file}: no such file")
    if (
        not names
        or not all(isinstance(name, str) for name in names.values())
        or not 0 <= min(names) <= max(names) < 255
    ):
        raise SourceError(f"{file}: classes are names numbered 0 to 254")
    return [{"id": number, "name": name} for number, name in sorted(names.items())]
