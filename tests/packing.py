"""What the tests of dataload.pack share: small sources, the command in this process, and what came of it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image

from dataload.annotations import Annotations, annotated
from dataload.pack.__main__ import main
from dataload.shards import ShardIndex, expand, index

COLOURS = ("red", "green", "blue", "gold", "gray")


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    """A picture of one colour at `path`, and its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path.read_bytes()


def five_pictures(folder: Path) -> Path:
    """pictures/red.jpg ... gray.jpg, five JPEGs of 40 x 30."""
    for colour in COLOURS:
        picture(folder / "pictures" / f"{colour}.jpg", colour)
    return folder / "pictures"


def coco(captions: dict[str, list[str]], first_id: int = 2**31 + 7) -> dict[str, Any]:
    """COCO's annotations of these pictures."""
    numbers = {name: first_id + number for number, name in enumerate(captions)}
    return {
        "images": [{"id": number, "file_name": name} for name, number in numbers.items()],
        "annotations": [
            {"id": 10 * number + place, "image_id": number, "caption": text}
            for name, number in numbers.items()
            for place, text in enumerate(captions[name])
        ],
    }


def write(path: Path, data: Any) -> str:
    """A text, or anything else as JSON, in a file; returns its path."""
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return str(path)


def read(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """All samples of a split, through the webdataset library."""
    shards = sorted(str(path) for path in folder.glob(f"{split}-*.tar"))
    return [dict(sample) for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)]


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def listing(folder: Path) -> dict[str, Any]:
    """dataset.json."""
    return json.loads((folder / "dataset.json").read_text(encoding="utf-8"))


def run(*words: object) -> tuple[int, str, str]:
    """Runs the command line in this process: (exit status, stdout, stderr)."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main([str(word) for word in words])
    return status, out.getvalue(), err.getvalue()


def opened(folder: Path, split: str = "train") -> ShardIndex:
    return index(expand([str(folder / f"{split}-*.tar")]))


def packed(folder: Path, *words: object, split: str = "train") -> tuple[list[Annotations], str]:
    """Runs a command into `folder` and reads everything back: (annotations in order, what it printed)."""
    status, out, error = run(*words, "--output", folder)
    assert status == 0, error
    return list(annotated(opened(folder, split))), out + error
