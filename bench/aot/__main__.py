"""`python -m bench.aot [--arch 80 90] [--kernel NAME ...] [--json [FILE]]`: every Triton kernel, in every form that its
launcher can ask for, compiled for sm_80 and sm_90 without a GPU, and held to what kernels/aot.py says it promises.

Prints a table, and why a row fails; --json writes the same with versions and date, to a file or instead of the table.
Exit code: 0 all pass, 1 a row fails, 2 it cannot run (no Triton, no such kernel).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.aot.occupancy import CHIPS, KB
from bench.aot.verdict import Row
from bench.options import end_with, file_path
from kernels import aot

SCHEMA = 1
COLUMNS = (
    *("kernel", "configuration", "sm", "regs", "stack B", "LDL+STL", "shared KB", "blocks/SM"),
    *("tensor core", "async (16 B)", "16 B access", "instr", "result"),
)
LEFT = 2  # so many columns are text, aligned to the left


class CannotRun(Exception):
    """Why nothing was examined."""


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    options = _parser().parse_args(arguments)
    start = time.perf_counter()
    try:
        examine = _examiner()
        found = versions()
        pairs = [(case, arch) for arch in options.arch for case in aot.cases(arch)]
        chosen = [pair for pair in pairs if not options.kernel or pair[0].name in options.kernel]
        missing = set(options.kernel or ()) - {case.name for case, _ in pairs}
        if missing or not chosen:
            known = ", ".join(sorted({case.name for case, _ in pairs}))
            raise CannotRun(f"no kernel named {', '.join(sorted(missing))}; there are: {known}")
    except CannotRun as error:
        print(f"python -m bench.aot: {error}", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compilers work outside Python
        rows = list(pool.map(lambda pair: examine.examine(*pair), chosen))
    passed = all(not row.failures for row in rows)
    if options.json is not None:
        record = {
            "schema": SCHEMA,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": found,
            "passed": passed,
            "rows": [dataclasses.asdict(row) | {"passed": not row.failures} for row in rows],
        }
        text = json.dumps(record, indent=1)
        if options.json == Path("-"):
            print(text)
            return 0 if passed else 1
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")
    print(", ".join(f"{name} {version}" for name, version in found.items()))
    print(table(rows))
    failed = sum(bool(row.failures) for row in rows)
    print(
        f"{len(rows) - failed} of {len(rows)} pass, {time.perf_counter() - start:.0f} s; nothing ran on a GPU"
    )
    return 0 if passed else 1


def table(rows: list[Row]) -> str:
    """Rows as aligned text, then every failure with its reasons."""
    cells = [COLUMNS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place < LEFT or place == len(widths) - 1 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    for row in rows:
        for reason in row.failures:
            lines.append(
                f"FAIL {row.kernel} ({row.config}) on sm_{row.arch}: {reason}. It is: {row.expects.why}"
            )
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of what decides about the machine code."""
    triton: Any = importlib.import_module("triton")
    try:
        ptxas = triton.knobs.nvidia.ptxas.path
        said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
        _ = triton.knobs.nvidia.cuobjdump.path
    except (RuntimeError, AttributeError, OSError) as error:
        raise CannotRun(f"this Triton comes without NVIDIA's ptxas or cuobjdump: {error}") from error
    version = re.search(r"V([\d.]+)", said)
    return {
        "Triton": triton.__version__,
        "ptxas": version[1] if version else said.strip(),
        "Python": platform.python_version(),
    }


def _examiner() -> ModuleType:
    """The module that needs Triton."""
    try:
        triton: Any = importlib.import_module("triton")
    except ImportError as error:
        raise CannotRun(f"needs Triton, which is for Linux: pip install 'triton>=3.6' ({error})") from error
    if triton.knobs.runtime.interpret:
        raise CannotRun(
            "TRITON_INTERPRET is set, so Triton interprets kernels instead of compiling them: unset it"
        )
    return importlib.import_module("bench.aot.examine")


def _cells(row: Row) -> tuple[str, ...]:
    found, result = row.figures, "FAIL" if row.failures else "pass"
    if found is None:
        return (row.kernel, row.config, str(row.arch), *["-"] * (len(COLUMNS) - 4), result)
    return (
        row.kernel,
        row.config,
        str(row.arch),
        str(found.registers),
        str(found.stack),
        str(found.local_accesses),
        f"{found.shared / KB:.1f}",
        f"{found.blocks_per_sm} ({found.limited_by})",
        ", ".join(f"{n} {name}" for name, n in found.tensor_core.items()) or "none",
        f"{found.async_copies} ({found.async_copies_16})",
        str(found.wide_accesses),
        str(found.instructions),
        result,
    )


def _parser() -> argparse.ArgumentParser:
    about, _, more = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser("python -m bench.aot", description=about.partition(": ")[2], epilog=more)
    parser.add_argument("--arch", nargs="+", type=int, choices=sorted(CHIPS), default=sorted(CHIPS))
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="only these")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        type=file_path,
        metavar="FILE",
        help="without FILE: to standard output",
    )
    return parser


if __name__ == "__main__":
    end_with(main)
