"""`python -m train.plan PRESET`: what a run needs, before money is spent on it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.config import ConfigError, PretrainConfig
from train.devices import DEVICES
from train.plan.budget import Plan, Setup, make_plan, to_json
from train.plan.calibration import RESULTS, Row, reached_by, read, summary, table
from train.plan.calibration import as_json as rows_as_json
from train.plan.engines import ENGINES, engine_of
from train.plan.local import local_cpu
from train.plan.stated import RECIPES, Finding, findings
from train.plan.stated import as_json as stated_as_json
from train.plan.stated import lines as stated_lines
from train.plan.table import lines
from train.presets import ALL, preset

EXAMPLES = """examples:
  python -m train.plan aurora-xl                              as it was specified: 64 x a100-80gb
  python -m train.plan aurora-xl --gpus 64 --device h200 --no-checkpointing --mfu 0.45
  python -m train.plan perceiver-xl --batch-size 4096 --accumulation 2 --json plan.json
  python -m train.plan --calibration                          measured steps beside what was planned for them"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m train.plan", description="What a run needs, before money is spent on it.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = made.add_argument
    add("preset", nargs="?", help=f"one of {', '.join(ALL)}")
    add("--gpus", type=int, help="how many; default: what the preset was specified for, else 1")
    add("--device", choices=[*DEVICES, "cpu"], help="what they are (cpu: this machine's, measured)")
    add("--engine", choices=["auto", *ENGINES], default="", help="default: the configuration's")
    add(
        "--zero-stage",
        type=int,
        choices=(1, 2, 3),
        default=0,
        help="of fsdp2 and deepspeed; default: the configuration's",
    )
    add("--offload", action="store_true", help="deepspeed: the optimizer in main memory")
    add(
        "--mfu",
        type=float,
        help="share of the data sheet's peak that model FLOPs reach; default: what measured steps of the preset reached on the "
        "device, else the device's anchor",
    )
    add("--batch-size", type=int, help="samples per optimizer step; default: the preset's")
    add("--accumulation", type=int, help="micro-steps; default: the preset's, or the fewest that fit")
    add("--samples", type=float, help="of the whole run; default: the preset's steps")
    add(
        "--checkpointing", action=argparse.BooleanOptionalAction, help="of activations; default: the preset's"
    )
    add(
        "--network",
        type=float,
        help="GB/s out of a machine, all adapters together; default: the device's usual machine",
    )
    add("--disk", type=float, default=2.0, help="GB/s that a machine writes to shared storage")
    add("--json", metavar="FILE", help="the plan as JSON too; - prints it alone")
    add("--calibration", action="store_true", help="every measured step beside its plan")
    add("--results", type=Path, default=RESULTS, help="folder of measured steps")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 the run fits, 1 it does not, 2 it cannot be planned as asked."""
    arguments = parser().parse_args(argv)
    try:
        rows = read(arguments.results)
        if arguments.calibration:
            print(*table(rows), "", *summary(rows), sep="\n")
            return 0
        if arguments.preset is None:
            raise ConfigError(f"which preset? There are: {', '.join(ALL)}")
        config = changed(preset(arguments.preset), arguments)
        plan = make_plan(config, setup_of(config, arguments, rows), checkpointing=arguments.checkpointing)
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    said = stated(plan)
    content = report(plan, said, rows)
    if arguments.json == "-":
        print(json.dumps(content, indent=2))
    else:
        print(*text(plan, said, rows), sep="\n")
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n")
    return 1 if any("needs" in problem or "divide" in problem for problem in plan.problems) else 0


def changed(config: PretrainConfig, arguments: argparse.Namespace) -> PretrainConfig:
    """The preset with what the command line says of batch and length."""
    batch = arguments.batch_size or config.batch_size
    samples = arguments.samples or config.steps * config.batch_size
    if batch < 1 or samples < 1:
        raise ConfigError(f"batch size {batch} and samples {samples:g} must be positive")
    return replace(
        config, batch_size=batch, accumulation=arguments.accumulation or config.accumulation, steps=-(-int(samples) // batch)
    )  # fmt: skip


def setup_of(config: PretrainConfig, arguments: argparse.Namespace, rows: Sequence[Row] = ()) -> Setup:
    """The machines of a plan. rows: measured steps, whose share of the peak counts where --mfu is not given."""
    recipe = RECIPES.get(config.name)
    gpus = arguments.gpus if arguments.gpus is not None else recipe.gpus if recipe else 1
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus}; it must be at least 1")
    name = arguments.device or (recipe.device if recipe else "a100-80gb")
    device = local_cpu() if name == "cpu" else DEVICES[name]
    ask = config.activation_checkpointing if arguments.checkpointing is None else arguments.checkpointing
    micro_batch = config.batch_size / gpus / (config.accumulation or 1)
    measured, samples = reached_by(rows, config.name, device.peak, ask, micro_batch)
    if samples:
        said = (
            f"measured here: {100 * measured:.1f}% in steps of {samples} samples at a time, without exchange"
        )
        most, larger = reached_by(rows, config.name, device.peak, ask, math.inf)
        if most > 1.5 * measured:
            said += f" ({100 * most:.1f}% with {larger}: with few, the GPU waits for its host; see --accumulation)"
        device = replace(device, mfu=measured, anchor=f"{said}; {device.anchor}")
    mfu = device.mfu if arguments.mfu is None else arguments.mfu
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu:g}; it is a share, above 0 and at most 1")
    engine = engine_of(
        config, gpus, default_engine(config, gpus, arguments.engine), arguments.zero_stage, arguments.offload
    )
    network = device.network if arguments.network is None else arguments.network * 1e9
    return Setup(gpus, device, engine, mfu, network, arguments.disk * 1e9)


def default_engine(config: PretrainConfig, gpus: int, asked: str) -> str:
    """What was asked for; else the configuration's; for the specified set-ups that is DeepSpeed."""
    if asked:
        return asked
    named = str(getattr(config, "engine", "auto"))
    if named == "auto" and config.name in RECIPES and gpus > 1:
        return "deepspeed"
    return "" if gpus > 1 else "single"


def stated(plan: Plan) -> list[Finding]:
    """What was said of the preset's set-up, judged."""
    recipe = RECIPES.get(plan.preset)
    return findings(recipe, plan.parameters["total"]) if recipe else []


def text(plan: Plan, said: list[Finding], rows: list[Row]) -> Iterator[str]:
    """The table."""
    yield from lines(plan)
    yield from summary(rows)
    if said:
        yield from stated_lines(RECIPES[plan.preset], said)


def report(plan: Plan, said: list[Finding], rows: list[Row]) -> dict[str, Any]:
    """The same as plain data."""
    return {**to_json(plan), "stated": stated_as_json(said), "calibration": rows_as_json(rows)}


def plan_for(config: PretrainConfig) -> Iterator[str]:
    """The plan of a preset that was specified for many GPUs, for `--dry-run`."""
    arguments = parser().parse_args([config.name])
    rows = read()
    plan = make_plan(config, setup_of(config, arguments, rows))
    yield from text(plan, stated(plan), rows)


if __name__ == "__main__":
    sys.exit(main())
