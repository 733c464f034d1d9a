"""AudioSet: its segment CSVs, class_labels_indices.csv, ontology.json, and a folder of clips.

Clips are named by YouTube id, with the start where somebody wrote it down: YTID_30.000, YTID_30, YTID_30000 (milliseconds),
each also with the end behind it, or YTID alone, all also with a Y in front; as any sound or video file, also in folders below.
Clips that YouTube no longer has are missing from every copy; they are counted before the work begins.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataload.pack.kinds import kind_of
from dataload.pack.source import Picture, Source, SourceError, check_folder, need, read_json

_ID = re.compile(r"[A-Za-z0-9_-]{11}")


@dataclass(frozen=True)
class Segment:
    """A row of the CSV."""

    ytid: str
    start: float
    end: float
    labels: tuple[str, ...]


def read_audioset(
    segments: Path,
    clips: Path,
    *,
    class_labels: Path | None = None,
    ontology: Path | None = None,
    split: str = "train",
) -> Source:
    """Reads the segments of a CSV; the labels of a clip are its display names, "label_ids" the machine ids.

    class_labels (class_labels_indices.csv) gives the classes and their order; without it the ontology does. Raises
    SourceError for other files than these, for neither, and for a label that neither knows.
    """
    check_folder(clips)
    rows, promised = read_segments(segments)
    names, classes = _classes(class_labels, ontology)
    unknown = sorted({label for row in rows for label in row.labels if label not in names})
    if unknown:
        raise SourceError(
            f"{segments} has {len(unknown):,} labels that {class_labels or ontology} does not have, the first is {unknown[0]}"
        )
    source = Source("audioset", [], classes={"labels": classes})
    if promised is not None and promised != len(rows):
        source.notes.append(f"{segments.name} says that it has {promised:,} segments, and has {len(rows):,}")
    there = _clips(clips)
    taken: dict[Path, str] = {}
    for row in rows:
        name = f"{row.ytid}_{row.start:.3f}"
        path = next((there[one] for one in _stems(row) if one in there), None)
        if path is not None and path in taken:
            raise SourceError(
                f"{path.name} is the only file for {taken[path]} and for {name}; names need the segment's start"
            )
        if path is not None:
            taken[path] = name
        facts: dict[str, Any] = {
            "labels": [names[label] for label in row.labels], "label_ids": list(row.labels), "ytid": row.ytid,
            "start_seconds": row.start, "end_seconds": row.end,
        }  # fmt: skip
        if path is not None:
            facts["file_name"] = path.relative_to(clips).as_posix()
        source.pictures.append(Picture(path or clips / f"{name}.wav", name, split, (), facts))
    others = len(set(there.values()) - taken.keys())
    if others:
        source.notes.append(f"{others:,} other clips in {clips} are of no segment in {segments.name}")
    return source


def read_segments(file: Path) -> tuple[list[Segment], int | None]:
    """Rows of a segments CSV, and how many it says that it has. SourceError for another file."""
    rows: list[Segment] = []
    promised = None
    for number, line in _lines(file):
        if line.startswith("#"):
            if match := re.search(r"num_segs=(\d+)", line):
                promised = int(match[1])
            continue
        fields = next(csv.reader([line], skipinitialspace=True))
        if len(fields) != 4:
            raise SourceError(
                f"{file}, line {number}: a segment is YTID, start_seconds, end_seconds, positive_labels, this is {line[:120]!r}"
            )
        try:
            start, end = float(fields[1]), float(fields[2])
        except ValueError:
            raise SourceError(f"{file}, line {number}: {fields[1:3]} are no seconds") from None
        labels = tuple(label for label in fields[3].split(",") if label)
        if not _ID.fullmatch(fields[0]) or not labels:
            raise SourceError(f"{file}, line {number}: no YouTube id, or no label: {line[:120]!r}")
        rows.append(Segment(fields[0], start, end, labels))
    if not rows:
        raise SourceError(f"{file} has no segments")
    return rows, promised


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    if not file.is_file():
        raise SourceError(f"{file}: no such file")
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line.strip()
    except UnicodeDecodeError as error:
        raise SourceError(f"{file} is not UTF-8 text: {error}") from error


def _classes(class_labels: Path | None, ontology: Path | None) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """(machine id -> display name, classes.json's list)."""
    if class_labels is None and ontology is None:
        raise SourceError(
            "labels are machine ids: --class-labels class_labels_indices.csv or --ontology ontology.json names them"
        )
    tree = _ontology(ontology) if ontology is not None else {}
    if class_labels is None:
        names = {number: str(entry["name"]) for number, entry in tree.items()}
        plain = {
            number: name
            for number, name in names.items()
            if "abstract" not in tree[number].get("restrictions", ())
        }
        return names, [{"id": number, "name": name} for number, name in plain.items()]
    rows = list(csv.reader([line for _, line in _lines(class_labels)], skipinitialspace=True))
    if rows[:1] != [["index", "mid", "display_name"]] or any(len(row) != 3 for row in rows):
        raise SourceError(
            f"{class_labels} is no class_labels_indices.csv: its columns are index, mid, display_name"
        )
    names = {mid: name for _, mid, name in rows[1:]}
    if tree and (strange := sorted(names.keys() - tree.keys())):
        raise SourceError(
            f"{len(strange):,} of {len(names):,} classes of {class_labels} are not in {ontology}, the first is {strange[0]}"
        )
    return names, [{"id": mid, "name": name} for mid, name in names.items()]


def _ontology(file: Path) -> dict[str, dict[str, Any]]:
    data = read_json(file)
    if not isinstance(data, list):
        raise SourceError(f'{file} is no ontology of AudioSet, [{{"id": "/m/...", "name": ...}}]')
    return {need(entry, "id", file): entry for entry in data if need(entry, "name", file)}


def _clips(folder: Path) -> dict[str, Path]:
    """Sounds and videos by their names without suffix; of two with the same, the first by path."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if kind_of(path) in ("audio", "video") and path.is_file():
            found.setdefault(path.name[: -len(path.suffix)], path)
    return found


def _stems(row: Segment) -> Iterator[str]:
    """The names that a clip may have, the most exact first."""

    def spelled(seconds: float) -> tuple[str, str, str]:
        return f"{seconds:.3f}", f"{seconds:g}", f"{round(1000 * seconds)}"

    starts, ends = spelled(row.start), spelled(row.end)
    both = [f"_{start}_{end}" for start, end in zip(starts, ends, strict=True)]
    suffixes = [*both, *(f"_{start}" for start in starts), ""]
    for stem in (row.ytid, f"Y{row.ytid}"):
        for suffix in suffixes:
            yield stem + suffix
