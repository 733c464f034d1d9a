"""The results files that COCO's and VQA's servers take: a list of {"image_id": 139, "caption": "..."}, one for each id."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ResultsFile:
    """One kind of them."""

    name: str
    """as errors call it: "results file of COCO captions\""""
    key: str
    """"image_id\""""
    value: str
    """"caption\""""
    example: str
    several: str
    """what is wrong with two values: "images have more than one caption\""""

    def write(self, path: Path, found: Mapping[Any, str]) -> None:
        """Values by id, sorted by id."""
        entries = [{self.key: number, self.value: found[number]} for number in ordered(found)]
        path.write_text(json.dumps(entries, ensure_ascii=False) + "\n", encoding="utf-8")

    def read(self, path: Path) -> dict[Any, str]:
        """Values by id, of a file that may be gzipped. ValueError for another layout, and for an id with two values."""
        try:
            entries = load_json(path)
            found = {entry[self.key]: str(entry[self.value]) for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no {self.name}, {self.example}: {type(error).__name__}: {error}"
            ) from None
        if len(found) != len(entries):
            raise ValueError(f"{path}: {len(entries) - len(found):,} {self.several}")
        return found


def ordered(ids: Iterable[Any]) -> list[Any]:
    """Ids sorted, numbers before texts: nothing depends on who gathered them."""
    return sorted(ids, key=lambda one: (isinstance(one, str), one))


def load_json(path: Path) -> Any:
    """JSON, gzipped or not. Raises OSError, and ValueError for what is no JSON."""
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
