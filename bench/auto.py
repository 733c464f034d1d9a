"""The table by which `auto` chooses for latent attention on GPUs, kernels/latent_attention/auto.json: `python -m bench.auto`.

From runs that are in bench/results/, their run.json and others.txt, it takes every call that both `triton` and cuDNN's
attention (`sdpa`) were timed on. cuDNN has a program for 128 queries of a head and splits no keys, so its time goes with one
over the share of its waves that the programs fill; `triton` fills the GPU. So each call tells from which share on cuDNN
is faster: its own share x cuDNN's time / triton's. For each width of heads the table has the median over forward passes, and
that over forward and backward passes.

    python -m bench.auto                                   # from the runs that are named below
    python -m bench.auto --runs 2027-01-01-a100-latent ... # from others
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import record
from bench.options import end_with, file_path
from bench.peaks import peak_of
from bench.record import RUN_FILE
from bench.subject import FORWARD, TRAINING
from kernels.latent_attention.auto import FILE, busy

RESULTS = Path(__file__).resolve().parent / "results"
RUNS = ("2026-11-27-h200-latent", "2026-11-27-h200-auto")
CAPABILITIES = {
    "A100": "8.0",
    "H100": "9.0",
    "H200": "9.0",
}  # one entry each; see kernels/latent_attention/auto.py
WIDTHS = (32, 64, 96, 128, 256)
PEERS = ("eager", "sdpa", "triton")  # of which float32 takes the fastest
CUDNN = ("sdpa", "torch-cudnn")  # what it is called in a run; sdpa takes it on these GPUs
SHAPE = re.compile(
    r"(?P<batch>[\d,]+) x (?P<queries>[\d,]+) latents over (?P<keys>[\d,-]+) keys, (?P<heads>\d+) heads? of (?P<dim>\d+)"
    r"(, values (?P<values>\d+))?"
)
OTHER = re.compile(r"== [^/]+/(?P<mode>\w+)/torch\.(?P<dtype>\w+) (?P<shape>.+)")
TIME = re.compile(r"  (?P<peer>[\w-]+) +ok (?P<ms>[\d.]+) ms")


@dataclass(frozen=True)
class Timed:
    """One call, by everybody who ran it: peer -> seconds."""

    run: str
    shape: str
    mode: str
    dtype: str
    seconds: dict[str, float]


def timed(name: str) -> tuple[str, list[Timed]]:
    """The device, and the calls of latent attention in one of the folders of bench/results/."""
    run = record.load(RESULTS / name / RUN_FILE)
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in run.rows:
        if row.subject == "latent_attention" and row.status == "ok":
            found.setdefault((row.shape, row.mode, row.dtype), {})[row.peer] = row.median
    others, key = RESULTS / name / "others.txt", None
    for line in others.read_text(encoding="utf-8").splitlines() if others.exists() else ():
        if head := OTHER.fullmatch(line):
            key = (head["shape"], head["mode"], head["dtype"])
        elif time := TIME.match(line):
            if key is None:
                raise ValueError(f"{others}: {line!r} stands in front of the first shape")
            if SHAPE.fullmatch(key[0]):
                found.setdefault(key, {})[time["peer"]] = float(time["ms"]) / 1e3
    return run.device, [Timed(name, *key, seconds) for key, seconds in found.items()]


def row_of(call: Timed, processors: int) -> dict[str, Any] | None:
    """A line of the table; None where one of the two was not timed."""
    match = SHAPE.fullmatch(call.shape)
    cudnn = next((call.seconds[name] for name in CUDNN if name in call.seconds), None)
    if match is None or cudnn is None or "triton" not in call.seconds:
        return None
    batch, queries, heads = (int(match[name].replace(",", "")) for name in ("batch", "queries", "heads"))
    ratio = cudnn / call.seconds["triton"]
    return {
        "run": call.run,
        "shape": call.shape,
        "mode": call.mode,
        "head_dim": max(int(match["dim"]), int(match["values"] or 0)),
        "lengths": "-" in match["keys"],
        "busy": round(busy(batch, queries, heads, processors), 3),
        "sdpa / triton": round(ratio, 3),
    }


def entry(device: str, calls: Iterable[Timed]) -> dict[str, Any]:
    """One kind of GPU. Raises ValueError where the measurements say something that `auto` has no choice for."""
    peak = peak_of(device)
    if peak is None:
        raise ValueError(f"{device}: bench/peaks.py does not know how many multiprocessors it has")
    calls = list(calls)
    rows = [row for call in calls if call.dtype == "bfloat16" and (row := row_of(call, peak.sms))]
    limits, training = (limits_of(rows, mode) for mode in (FORWARD, TRAINING))
    ragged = [row["sdpa / triton"] for row in rows if row["lengths"]]
    if not limits or not training or not ragged or min(ragged) < 1:
        raise ValueError(
            f"{device}: auto gives calls with key lengths to triton, and these say {ragged or 'nothing'}"
        )
    whole = [call.seconds for call in calls if call.dtype == "float32" and call.seconds.keys() >= {*PEERS}]
    if not whole:
        raise ValueError(f"{device}: no call in float32 has the times of all of {', '.join(PEERS)}")
    single = {peer: statistics.geometric_mean(seconds[peer] for seconds in whole) for peer in PEERS}
    return {
        "device": device,
        "float32": min(single, key=lambda peer: single[peer]),
        "sdpa_from": limits,
        "sdpa_from_training": training,
        "rows": rows,
    }


def limits_of(rows: Sequence[dict[str, Any]], mode: str) -> list[list[float]]:
    """[width, share] for each width of heads that was measured."""
    limits: list[list[float]] = []
    for least, widest in zip((0, *WIDTHS), WIDTHS, strict=False):
        shares = [
            row["busy"] * row["sdpa / triton"]
            for row in rows
            if row["mode"] == mode and not row["lengths"] and least < row["head_dim"] <= widest
        ]
        if shares:
            limits.append([widest, round(statistics.median(shares), 2)])
    return limits


def table(runs: Iterable[str]) -> str:
    """The text of auto.json."""
    devices: dict[str, list[Timed]] = {}
    for name in runs:
        device, calls = timed(name)
        devices.setdefault(device, []).extend(calls)
    entries: dict[str, Any] = {}
    for device, calls in devices.items():
        kind = next((kind for name, kind in CAPABILITIES.items() if name in device), None)
        if kind is None or kind in entries:
            raise ValueError(f"{device}: of unknown kind, or the second of its kind; known: {CAPABILITIES}")
        entries[kind] = entry(device, calls)
    lines = []
    for kind, found in entries.items():
        head = json.dumps({name: value for name, value in found.items() if name != "rows"})[1:-1]
        rows = ",\n".join(f"  {json.dumps(row)}" for row in found["rows"])
        lines.append(f'"{kind}": {{{head}, "rows": [\n{rows}\n]}}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def entries_of(path: Path) -> dict[str, Any]:
    """An earlier table. Raises ValueError for another file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no table of this command: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no table of this command")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the table, or says what is wrong with the runs."""
    parser = argparse.ArgumentParser(prog="python -m bench.auto", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--runs", nargs="+", default=RUNS, help=f"folders of bench/results/ (default {' '.join(RUNS)})"
    )
    parser.add_argument("--out", type=file_path, default=FILE)
    options = parser.parse_args(arguments)
    try:
        text = table(options.runs)
        there = entries_of(options.out) if options.out.is_file() else {}
        if gone := sorted(there.keys() - json.loads(text).keys()):
            raise ValueError(
                f"{options.out} has entries of compute capability {', '.join(gone)}, which none of these runs is of: "
                "name their runs too, or another --out"
            )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{options.out}: {text.count('sdpa / triton')} calls")
    return 0


if __name__ == "__main__":
    end_with(main)
