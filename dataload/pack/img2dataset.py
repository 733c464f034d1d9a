"""What img2dataset downloaded (LAION-5B and its like): 00000.tar, 00000.parquet, 00000_stats.json, 00001.tar ...

Its tars are shards already: training, `dataload.index` and `dataload.verify` read them as they are. This looks whether the
download is whole, by what img2dataset says of itself, and writes them as shards of another size where that is wanted
(dataload.reshard: every file of a sample byte for byte).
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataload import shards
from dataload.pack.source import SourceError
from dataload.shards import BrokenShard, ShardIndex, ShardWarning

_SHOWN = 10


@dataclass
class Downloaded:
    """What a folder of img2dataset's holds."""

    index: ShardIndex
    asked: int = 0
    """addresses that were tried, as far as statistics or tables say it"""
    succeeded: int = 0
    """... and gave a picture"""
    failed: dict[str, int] = field(default_factory=dict)
    """addresses that gave no picture, by reason; img2dataset keeps the most frequent reasons alone"""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        captioned = int(self.index.captioned.sum())
        lines = [
            f"{len(self.index.shards):,} shards: {len(self.index):,} samples, {captioned:,} with captions"
        ]
        if self.asked:
            lines.append(
                f"{self.asked:,} addresses were tried, {self.asked - self.succeeded:,} gave no picture"
            )
            reasons = sorted(self.failed.items(), key=lambda pair: -pair[1])
            lines += [f"    {count:,}: {reason[:100]}" for reason, count in reasons[:_SHOWN]]
        lines += self.notes
        if self.problems:
            lines.append(f"{len(self.problems):,} problems:")
            lines += [f"    {one}" for one in self.problems[:_SHOWN]]
            if len(self.problems) > _SHOWN:
                lines.append(f"    and {len(self.problems) - _SHOWN:,} more")
        return "\n".join(lines)


def examine(folder: Path) -> Downloaded:
    """Indexes the tars of a folder and compares them with the statistics and tables beside them.

    Raises SourceError where the folder has no tars, or a tar holds nothing that can be used.
    """
    if not folder.is_dir():
        raise SourceError(f"--shards {folder}: " + ("not a folder" if folder.exists() else "no such folder"))
    tars = sorted(folder.glob("*.tar"))
    tables = sorted(folder.glob("*.parquet"))
    if not tars:
        hint = ""
        if tables:
            hint = f"; its {len(tables):,} tables are lists of addresses, or img2dataset's output_format was not webdataset"
        raise SourceError(f"{folder} holds no .tar{hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ShardWarning)  # listed below
            index = shards.index([*tars])
    except BrokenShard as error:
        raise SourceError(f"{error}; remove this shard, or download it again") from error
    found = Downloaded(index)
    found.problems += [f"{Path(shard).name}: {key}: {reason}" for shard, key, reason in index.problems]
    names = {path.stem for path in tars}
    for path in tables:
        if path.stem not in names:
            found.problems.append(
                f"{path.name} has no {path.stem}.tar: its download was not finished, or the tar is lost"
            )
    start = 0
    reader = _parquet()
    for shard in index.shards:
        keys = {index.where(start + place)[1].rsplit("/", 1)[-1] for place in range(len(shard))}
        start += len(shard)
        _compare(folder, Path(shard.path.name).stem, keys, found, reader)
    if tables and reader is None:
        found.notes.append(
            f"{len(tables):,} .parquet files were not read: that needs pyarrow (pip install pyarrow)"
        )
    return found


def _compare(
    folder: Path, name: str, keys: set[str], found: Downloaded, reader: Callable[[Path], Any] | None
) -> None:
    """One shard with its statistics and its table."""
    stats, table = folder / f"{name}_stats.json", folder / f"{name}.parquet"
    reasons: Counter[str] = Counter()
    asked = succeeded = 0
    if stats.is_file():
        try:
            said = json.loads(stats.read_text(encoding="utf-8"))
            asked, succeeded = int(said["count"]), int(said["successes"])
            reasons.update({k: int(n) for k, n in said.get("status_dict", {}).items() if k != "success"})
        except (ValueError, KeyError, TypeError) as error:
            found.problems.append(f"{stats.name} is not img2dataset's: {type(error).__name__}: {error}")
        else:
            if succeeded != len(keys):
                found.problems.append(
                    f"{name}.tar has {len(keys):,} samples, {stats.name} counted {succeeded:,}"
                )
    else:
        found.problems.append(f"{name}.tar has no {stats.name}: its download was not finished")
    if table.is_file() and reader is not None:
        try:
            rows = reader(table)
        except Exception as error:  # pyarrow's own, of many kinds
            found.problems.append(f"{table.name} cannot be read: {type(error).__name__}: {error}")
        else:
            good = {str(key) for key, status, _ in rows if status == "success"}
            if not asked:
                asked, succeeded = len(rows), len(good)
                reasons.update(str(why or status) for _, status, why in rows if status != "success")
            if lost := good - keys:
                found.problems.append(
                    f"{name}.tar lacks {len(lost):,} of the {len(good):,} pictures of {table.name}, the first is {min(lost)}"
                )
            if extra := keys - good:
                found.problems.append(
                    f"{name}.tar has {len(extra):,} samples that {table.name} does not list, {min(extra)} ..."
                )
    found.asked += asked
    found.succeeded += succeeded
    for reason, count in reasons.items():
        found.failed[reason] = found.failed.get(reason, 0) + count


def _parquet() -> Callable[[Path], Any] | None:
    """A function from a table to its (key, status, error message), or None without pyarrow."""
    try:
        from pyarrow import parquet
    except ImportError:
        return None

    def rows(path: Path) -> list[tuple[Any, Any, Any]]:
        columns = parquet.read_table(path, columns=["key", "status", "error_message"]).to_pydict()
        return list(zip(columns["key"], columns["status"], columns["error_message"], strict=True))

    return rows
