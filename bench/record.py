"""What one run measured, as plain data: the JSON that the report, the comparison and the history read.

A run is one machine, one command, one date. Figures are never merged across runs. A row is one implementation doing
one case in one mode; a row without a time says why (`status` and `note`), so that nothing is missing in silence.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

SCHEMA = 1
RUN_FILE = "run.json"
Status = Literal["ok", "wrong", "absent", "failed"]


@dataclass(frozen=True)
class Accuracy:
    """Errors against the reference in fp64, for the output and for each gradient.

    `error` is max |x - exact|; `allowed` what the rule of numerics.py grants; `relative` RMSE(error) / RMS(exact).
    """

    name: str
    error: float
    allowed: float
    relative: float
    allowed_relative: float

    @property
    def good(self) -> bool:
        """Within both bounds. Not-a-number is never good."""
        return self.error <= self.allowed and self.relative <= self.allowed_relative


@dataclass(frozen=True)
class Paired:
    """Time of this row over time of another in the same rounds: the median ratio and its 95% interval."""

    peer: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One implementation (`peer`) on one case in one mode."""

    subject: str  # "window_attention"; one test file each
    case: str  # "tiny-64px-stage1"
    mode: str  # "forward", "training" (forward and backward), "step", "load"
    peer: str  # "sdpa", "timm"
    dtype: str  # "float32"
    shape: str  # "16 x 16x16 map, 1 head of 32, window 8, shift 4"
    ours: bool  # one of this project's own implementations
    status: Status
    note: str = ""  # why there is no time; or what a reader has to know about the one there is
    seconds: tuple[float, ...] = ()  # per call, one figure a round, in the order of the rounds
    clock: str = ""  # how they were taken: "wall", "events", "graph"
    items: float = 0.0  # what one call handles, in `unit`s
    unit: str = ""  # "tokens", "images"
    flops: float = 0.0  # assumed for one call, see work.py; 0 where nothing is assumed
    bytes: float = 0.0  # the fewest that have to cross the memory bus in one call
    peak_memory: int | None = None  # bytes above what the inputs take; None where it is not measured
    accuracy: tuple[Accuracy, ...] = ()
    paired: tuple[Paired, ...] = ()

    @property
    def key(self) -> str:
        """The same across runs: "window_attention/tiny-64px-stage1/forward/float32/sdpa"."""
        return "/".join((self.subject, self.case, self.mode, self.dtype, self.peer))

    @property
    def median(self) -> float:
        """Seconds per call; not-a-number where there is no time."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def rate(self) -> float:
        """`unit`s per second at the median."""
        return self.items / self.median


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in this very run: the roofs that rows are measured against."""

    copy: float  # bytes/s, read and written
    matmul: dict[str, float]  # dtype -> FLOP/s


@dataclass(frozen=True)
class Run:
    """One run of `pytest bench/`, whole."""

    date: str  # ISO 8601, with the zone
    command: str
    commit: str
    device: str  # "NVIDIA A100-SXM4-80GB", "AMD EPYC 7R13, 2 threads"
    kind: str  # "cpu" or "cuda"
    profile: str
    versions: dict[str, str]
    ceilings: Ceilings | None
    rehearsed: bool = False  # a GPU's program on a machine without one: nothing here is a GPU's figure
    absent: dict[str, str] = field(default_factory=dict)  # optional package -> what is missed without it
    rows: tuple[Row, ...] = ()


def bound(row: Row, ceilings: Ceilings) -> tuple[float, Literal["memory", "compute"]] | None:
    """The least seconds that the roofline grants a row's work, and which roof it is; None where none is assumed.

    A half type may be computed in fp32, which a CPU without its instructions does much faster: the higher roof counts.
    """
    if not row.flops or not row.bytes or not ceilings.matmul.get(row.dtype):
        return None
    peak = max(ceilings.matmul[row.dtype], ceilings.matmul.get("float32", 0.0))
    compute, memory = row.flops / peak, row.bytes / ceilings.copy
    return (compute, "compute") if compute > memory else (memory, "memory")


def fraction(row: Row, ceilings: Ceilings) -> float | None:
    """Share of its roofline that a row reached: least seconds over median seconds."""
    least = bound(row, ceilings)
    return least[0] / row.median if least and row.seconds else None


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and a confidence interval of at least 95% for it, from order statistics alone (no distribution is
    assumed): values k and n-1-k of the sorted n, with P(Binomial(n, 1/2) <= k) <= 2.5%. Fewer than 6 values are too
    few for that and give their range. Raises ValueError for none."""
    if not values:
        raise ValueError("no values, so no median")
    ordered, n = sorted(values), len(values)
    k, beyond = 0, 0.5**n + n * 0.5**n  # the next rank inwards is good while P(Binomial <= k + 1) <= 2.5%
    while beyond <= 0.025:
        k += 1
        beyond += math.comb(n, k + 1) * 0.5**n
    return statistics.median(ordered), ordered[k], ordered[n - 1 - k]


def save(run: Run, path: Path) -> None:
    """Write JSON, whole or not at all: a reader never sees half a file."""
    text = json.dumps({"schema": SCHEMA} | dataclasses.asdict(run), indent=1, allow_nan=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")  # two runs may write here
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def load(path: Path) -> Run:
    """Read what `save` wrote. Raises ValueError for another file, FileNotFoundError where there is none."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema = data.pop("schema")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no run of this benchmark: {error!r}") from error
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema}, this version reads {SCHEMA}")
    try:
        rows = tuple(_row(row) for row in data.pop("rows"))
        ceilings = data.pop("ceilings")
        run = Run(**data, ceilings=Ceilings(**ceilings) if ceilings else None, rows=rows)
        _check(run, Run, "run")
        return run
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no run of this benchmark: {error!r}") from error


def _check(value: object, kind: Any, where: str) -> None:
    """Raises TypeError where a value is not of the type that its field has."""
    form, inner = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        for name, of in get_type_hints(kind).items():
            _check(getattr(value, name), of, f"{where}.{name}")
    elif form is UnionType:
        if value is not None:
            _check(value, inner[0], where)
    elif form is tuple and isinstance(value, tuple):
        for i, one in enumerate(value):
            _check(one, inner[0], f"{where}[{i}]")
    elif form is dict and isinstance(value, dict):
        for name, one in value.items():
            _check(one, inner[1], f"{where}[{name!r}]")
    elif form is Literal:
        if value not in inner:
            raise TypeError(f"{where} is {value!r}, not one of {', '.join(inner)}")
    elif not isinstance(value, (int, float) if kind is float else form or kind):
        raise TypeError(f"{where} is {value!r}, not of type {kind.__name__}")


def _row(data: dict[str, Any]) -> Row:
    return Row(
        **data
        | {
            "seconds": tuple(data["seconds"]),
            "accuracy": tuple(Accuracy(**one) for one in data["accuracy"]),
            "paired": tuple(Paired(**one) for one in data["paired"]),
        }
    )
