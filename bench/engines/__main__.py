"""Engines that shard, measured on CPUs: `python -m bench.engines --out FOLDER [steps] [stall] [resume]`.

    steps     two ranks, the same model under ddp, FSDP2 and DeepSpeed in turn: time of a step, each over FSDP2's
    stall     one process and aurora-tiny: what asynchronous checkpoints cost, spread over the default interval between them
    resume    four ranks of FSDP2 and a model of 100 million parameters: the same cost; then two ranks go on from the
              checkpoint, write it again, and every number is compared

Each part runs under torchrun. Processes share cores, and machines do other work: steps take turns in rounds, and beside seconds
there is the CPU time of all ranks together. FOLDER gets engines.json and report.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.engines.ranks import rank
from bench.options import end_with, folder_path
from train import checkpoint
from train.machine import device_name

RANKS = {"steps": 2, "stall": 1, "resume": 4, "resumed": 2}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.engines", description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", default=[], metavar="steps|stall|resume")
    parser.add_argument("--out", type=folder_path, help="folder for engines.json and report.md")
    parser.add_argument("--part", choices=RANKS, help=argparse.SUPPRESS)  # in a rank
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        return rank(args.part, args.work)
    if args.out is None or not set(args.parts) <= {"steps", "stall", "resume"}:
        parser.error("say --out FOLDER, and which of steps, stall and resume (all, if none is named)")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error}")
    found: dict[str, Any] = {
        "command": machine.command(), "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "device": device_name(torch.device("cpu")), "cores": os.cpu_count(), "python": platform.python_version(),
        "torch": torch.__version__, "threads": int(os.environ.get("OMP_NUM_THREADS", 1)),
    }  # fmt: skip
    for part in args.parts or ["steps", "stall", "resume"]:
        with tempfile.TemporaryDirectory() as work:
            found[part] = launch(part, Path(work))
            if part == "resume":
                found["resume"] |= launch("resumed", Path(work)) | compared(Path(work))
        print(json.dumps({part: found[part]}, indent=1), flush=True)
        (args.out / "engines.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.out / "report.md").write_text(report(found))
    return 0


def launch(part: str, work: Path) -> dict[str, Any]:
    """A part on its ranks, by torchrun."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(RANKS[part]),
    ]
    subprocess.run(
        [*torchrun, "-m", "bench.engines", "--part", part, "--work", str(work)], env=environment, check=True
    )
    found: dict[str, Any] = json.loads((work / f"{part}.json").read_text())
    return found


def compared(work: Path) -> dict[str, Any]:
    """What four ranks wrote and what two ranks wrote of it, number by number."""
    first = checkpoint.step_directories(work / "checkpoints-4")[-1]
    again = checkpoint.step_directories(work / "checkpoints-2")[-1]
    states, numbers, other = [checkpoint.verify(path) for path in (first, again)], 0, 0
    for kind in ("model", "optimizer", "ema"):
        a, b = (
            checkpoint.stored(path, kind, state) for path, state in zip((first, again), states, strict=True)
        )
        assert set(a) == set(b)
        for name in a:
            numbers += a[name].numel()
            other += int((a[name] != b[name]).sum())
    return {"numbers compared": numbers, "numbers that differ": other}


def report(found: dict[str, Any]) -> str:
    """The tables."""
    said = [
        "# Engines that shard, on CPUs\n",
        f"{found['date']}, {found['device']}, {found['cores']} cores shared with other work, {found['threads']} thread a "
        f"process, torch {found['torch']}. `{found['command']}`\n",
    ]
    for name, row in found.get("steps", {}).items():
        said += [
            f"## A step of two ranks: {name}, {row['parameters'] / 1e6:.1f}M parameters\n",
            "| engine | ms | over fsdp2 (98%) | CPU ms of both ranks | over fsdp2 (98%) |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for engine in ("ddp", "fsdp2", "deepspeed"):
            cells = []
            for clock in ("seconds", "cpu_seconds"):
                low, middle, high = row[f"{engine} / fsdp2 {clock}"]
                cells += [f"{1e3 * row[f'{engine} {clock}']:.0f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]
            said.append(f"| {engine} | " + " | ".join(cells) + " |")
        said.append("")
    for part in ("stall", "resume"):
        if row := found.get(part):
            many = f"{row['ranks']} ranks" if row["ranks"] > 1 else "one process"
            said += [
                f"## Asynchronous checkpoints: {row['parameters'] / 1e6:.1f}M parameters, {many}\n",
                f"{row['bytes'] / 1e6:,.0f} MB each. A step takes {row['step seconds']:.2f} s, "
                f"{row['step cpu_seconds']:.2f} CPU seconds. One checkpoint every {row['interval']} steps costs\n",
                "| | seconds | of training |", "|---|---|---|",
            ]  # fmt: skip
            for name, label in (
                ("stall", "steps that wait"), ("slower steps", "steps that are slower beside it"),
                ("CPU", "CPU time of all of it"),
            ):  # fmt: skip
                each = ", ".join(f"{x:.2f}" for x in row[f"{name} of each checkpoint, seconds"])
                said.append(f"| {label} | {each} | {100 * row[f'{name}, share of training']:.2f}% |")
            said.append("")
    if row := found.get("resume"):
        said += [
            "## Four ranks' checkpoint on two ranks\n",
            f"{row['numbers that differ']} of {row['numbers compared']:,} numbers differ after two ranks read and wrote it. "
            f"Loss of the step after it: {row['loss after the first']!r} on four ranks, {row['loss on two ranks']!r} on two.",
        ]  # fmt: skip
    return "\n".join(said) + "\n"


if __name__ == "__main__":
    end_with(main)
