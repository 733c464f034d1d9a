"""A table of pictures, sounds or videos with captions or labels: CSV or TSV with a header."""

from __future__ import annotations

import csv
from pathlib import Path

from dataload.pack.source import Picture, Source, SourceError, check_folder, inside, tidy


def read_csv(
    file: Path,
    images: Path,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    label_column: str | None = None,
    split_column: str | None = None,
    split: str = "train",
    delimiter: str | None = None,
) -> Source:
    """Reads a table with one caption per row; rows of the same picture are its several captions.

    `image_column` names any media: a picture, a sound or a video. With `label_column` the caption column may
    be missing; all rows of a file have the same label, and a blank one is none. `delimiter` is a comma, or a
    tab for files named .tsv, unless given. Without `split_column` all pictures belong to `split`. Raises
    SourceError for missing columns, uneven rows, names that lead out of `images`, and a picture in two splits
    or with two labels.
    """
    check_folder(images)
    if not file.is_file():
        raise SourceError(f"{file}: no such file")
    delimiter = delimiter or ("\t" if file.suffix.lower() == ".tsv" else ",")
    wanted = [image_column, caption_column, *filter(None, (split_column, label_column))]
    rows: dict[str, tuple[str, str, list[str]]] = {}  # file -> split, label, captions; in the table's order
    blank = 0
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            header = next(reader, [])
            if label_column and caption_column not in header:
                wanted.remove(caption_column)
            missing = [column for column in wanted if column not in header]
            if missing:
                raise SourceError(
                    f"{file} has no column {', '.join(map(repr, missing))}; its columns are {header} "
                    f"(delimiter {delimiter!r}). Name them: --media-column, --caption-column, --split-column, --label-column"
                )
            place = {column: header.index(column) for column in wanted}
            for row in reader:
                where = f"{file}, line {reader.line_num}"
                if not row:
                    continue  # an empty line
                if len(row) != len(header):
                    raise SourceError(f"{where}: {len(row)} fields, but the header has {len(header)}: {row}")
                name = row[place[image_column]]
                part = row[place[split_column]] if split_column else split
                label = row[place[label_column]].strip() if label_column else ""
                known = rows.setdefault(name, (part, label, []))
                if known[0] != part:
                    raise SourceError(f"{where}: {name} is in split {part!r} here and in {known[0]!r} above")
                if known[1] != label:
                    raise SourceError(f"{where}: {name} has the label {label!r} here and {known[1]!r} above")
                inside(images, name, where)
                if caption_column in place:
                    kept = tidy([row[place[caption_column]]], where)
                    blank += not kept
                    known[2].extend(kept)
    except (csv.Error, UnicodeDecodeError) as error:
        raise SourceError(
            f"{file} cannot be read as UTF-8 CSV with delimiter {delimiter!r}: {error}"
        ) from error

    source = Source("csv", [])
    for name, (part, label, captions) in rows.items():
        facts = {"file_name": name, **({"label": label} if label else {})}
        source.pictures.append(Picture(inside(images, name, str(file)), name, part, tuple(captions), facts))
    if blank:
        source.notes.append(
            f"{blank:,} rows have no caption; a picture with no other row is packed as uncaptioned"
        )
    unused = [column for column in header if column not in wanted]
    if unused:
        source.notes.append(f"columns not used: {', '.join(unused)}")
    return source
