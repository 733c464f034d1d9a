"""A table of pictures and captions: CSV or TSV with a header."""

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
    split_column: str | None = None,
    split: str = "train",
    delimiter: str | None = None,
) -> Source:
    """Reads a table with one caption per row; rows of the same picture are its several captions.

    `delimiter` is a comma, or a tab for files named .tsv, unless given. Without `split_column` all pictures
    belong to `split`. Raises SourceError for missing columns, uneven rows, names that lead out of `images`,
    and a picture in two splits.
    """
    check_folder(images)
    if not file.is_file():
        raise SourceError(f"{file}: no such file")
    delimiter = delimiter or ("\t" if file.suffix.lower() == ".tsv" else ",")
    wanted = [image_column, caption_column, *([split_column] if split_column else [])]
    rows: dict[str, tuple[str, list[str]]] = {}  # picture -> split, captions; in the order of the file
    blank = 0
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            header = next(reader, [])
            missing = [column for column in wanted if column not in header]
            if missing:
                raise SourceError(
                    f"{file} has no column {', '.join(map(repr, missing))}; its columns are {header} "
                    f"(delimiter {delimiter!r}). Name them: --image-column, --caption-column, --split-column"
                )
            columns = [header.index(column) for column in wanted]
            for row in reader:
                where = f"{file}, line {reader.line_num}"
                if not row:
                    continue  # an empty line
                if len(row) != len(header):
                    raise SourceError(f"{where}: {len(row)} fields, but the header has {len(header)}: {row}")
                name, caption, *rest = (row[column] for column in columns)
                part = rest[0] if rest else split
                known, captions = rows.setdefault(name, (part, []))
                if known != part:
                    raise SourceError(f"{where}: {name} is in split {part!r} here and in {known!r} above")
                inside(images, name, where)
                kept = tidy([caption], where)
                blank += not kept
                captions.extend(kept)
    except (csv.Error, UnicodeDecodeError) as error:
        raise SourceError(
            f"{file} cannot be read as UTF-8 CSV with delimiter {delimiter!r}: {error}"
        ) from error

    source = Source("csv", [])
    for name, (part, captions) in rows.items():
        source.pictures.append(
            Picture(inside(images, name, str(file)), name, part, tuple(captions), {"file_name": name})
        )
    if blank:
        source.notes.append(
            f"{blank:,} rows have no caption; a picture with no other row is packed as uncaptioned"
        )
    unused = [column for column in header if column not in wanted]
    if unused:
        source.notes.append(f"columns not used: {', '.join(unused)}")
    return source
