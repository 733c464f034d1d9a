"""Measure real training steps beside what the plan says of them: `python -m train.plan.measure --out FOLDER`.

Each case is a preset, a micro-batch of random values, and activation checkpointing or not; the engine's own step is run.
Memory: what one step allocates at its highest above weights and optimizer (torch's profiler on a CPU, the caching allocator
on a GPU). Time: the median of some steps; on a CPU one thread's CPU time, so that a busy machine counts less, and the rates
of products and copies by the same clock before each case.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataload.packed import Packed
from models import AURORA_SIZES
from models.aurora.encoder import SwinEncoder
from train.config import PretrainConfig
from train.contrast import MicroBatch
from train.engine import Ranks, TorchEngine
from train.families import family_of
from train.machine import Precision, device_name, keep_freed_memory
from train.plan.batches import batch_of, kinds, split
from train.plan.calibration import Row, summary, table
from train.plan.meter import Meter
from train.plan.standins import in_place_of_kernels
from train.plan.trace import Traced, trace
from train.presets import preset
from train.telemetry.peak import peak_memory

CASES = {
    "cpu": ("aurora-tiny:16", "aurora-tiny:40", "aurora-tiny:40:checkpointing", "aurora-photos:16", "aurora-small:2",
            "perceiver-tiny:18", "perceiver-tiny:36:checkpointing", "perceiver-small:2"),
    "cuda": ("aurora-tiny:128", "aurora-small:64", "aurora-small:64:checkpointing", "aurora-base:32:checkpointing",
             "aurora-large:4", "aurora-large:16:checkpointing", "perceiver-small:32", "perceiver-base:16:checkpointing"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m train.plan.measure", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for plan.json and plan.txt")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each case")
    parser.add_argument("--case", nargs="*", default=None, help="PRESET:SAMPLES[:checkpointing] ...")
    parser.add_argument(
        "--bench", nargs="*", type=Path, default=[], help="run.json of bench/results: its training steps too"
    )
    arguments = parser.parse_args(argv)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        torch.set_num_threads(1)
        keep_freed_memory()
    rows = []
    for case in arguments.case if arguments.case is not None else CASES[kind]:
        rows.append(measure(case, kind, arguments.steps))
        print(*list(table(rows[-1:]))[1:], sep="\n", flush=True)
    for path in arguments.bench:
        rows += from_bench(path)
    arguments.out.mkdir(parents=True, exist_ok=True)
    content = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python -m train.plan.measure " + " ".join(sys.argv[1:] if argv is None else argv),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": [asdict(row) for row in rows],
    }
    (arguments.out / "plan.json").write_text(json.dumps(content, indent=1) + "\n")
    text = "\n".join([*table(rows), "", *summary(rows)])
    (arguments.out / "plan.txt").write_text(text + "\n")
    print(text)
    return 0


def measure(case: str, kind: str, steps: int) -> Row:
    """One case: planned, then run."""
    name, samples, *more = case.split(":")
    config = replace(
        preset(name),
        activation_checkpointing="checkpointing" in more,
        accumulation=1,
        compile=False,
        ema_decay=0.0,
    )
    device, bf16 = torch.device(kind), kind == "cuda"
    flop_rate, byte_rate = rates(kind)
    counts = split(int(samples), kinds(config))
    planned = trace(config, counts, kind=kind, bf16=bf16, flop_rate=flop_rate, byte_rate=byte_rate)
    step = training_step(config, counts, device, bf16)
    step()  # the optimizer makes its moments
    peak = peak_memory(step, kind)
    taken = [timed(step, kind) for _ in range(steps)]
    mode = "with" if config.activation_checkpointing else "without"
    return _row(
        _device(device), f"{name}, {samples} samples, {mode} checkpointing", planned, peak, statistics.median(taken), flop_rate,
        "train.plan.measure",
    )  # fmt: skip


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, bf16"
    return f"{_cpu_name()}, {device_name(device).partition('(')[2].rstrip(')')}, fp32"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _row(
    device: str, case: str, planned: Traced, peak: float, seconds: float, flop_rate: float, source: str
) -> Row:
    return Row(
        device=device, case=case, planned_bytes=planned.with_gradients, measured_bytes=peak,
        floor_seconds=planned.counts.seconds, measured_seconds=seconds, flops=planned.model_flops,
        flop_rate=flop_rate, source=source,
    )  # fmt: skip


def training_step(
    config: PretrainConfig, counts: dict[str, int], device: torch.device, bf16: bool
) -> Callable[[], None]:
    """A call that makes one optimizer step of the engine."""
    torch.manual_seed(0)
    family = family_of(config)
    precision = Precision("bf16" if bf16 else "fp32", "measured")
    engine = TorchEngine(family.model(config), config, device, precision, Ranks(0, 0, 1))
    batch = filled(batch_of(config, counts)).to(device)

    def step() -> None:
        normalizers, _ = engine.agree([batch], False)
        with engine.micro_step(last=True):
            engine.backward(engine.losses(MicroBatch(batch), config.objectives, normalizers))
        engine.step(1e-4)

    return step


def filled(batch: Any) -> Any:
    """The batch with random values in place of those that only had shapes."""
    changed: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor) and value.is_meta:
            changed[field.name] = _random(value)
        elif isinstance(value, Packed) and value.values.is_meta:
            changed[field.name] = replace(value, values=_random(value.values))
    assert is_dataclass(batch) and not isinstance(batch, type)
    return replace(batch, **changed)


def _random(like: Tensor) -> Tensor:
    if like.dtype == torch.uint8:
        return torch.randint(256, like.shape, dtype=torch.uint8)
    return 0.1 * torch.randn(like.shape)


def timed(call: Callable[[], object], kind: str) -> float:
    """Seconds of one call."""
    if kind == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def rates(kind: str) -> tuple[float, float]:
    """FLOP/s of a large product and bytes/s of a large copy: the best of some."""
    side, dtype = (8192, torch.bfloat16) if kind == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=kind).to(dtype) for _ in range(2))
    source = torch.ones((1 << 30 if kind == "cuda" else 1 << 28) // 4, device=kind)
    target = torch.empty_like(source)
    product = min(timed(lambda: torch.mm(a, b), kind) for _ in range(6))
    copy = min(timed(lambda: target.copy_(source), kind) for _ in range(6))
    return 2 * side**3 / product, 2 * source.nbytes / copy


def from_bench(path: Path) -> list[Row]:
    """The training steps of Aurora's encoder in a run.json of bench/, planned now by the rates of that run."""
    content = json.loads(path.read_text())
    found = []
    for row in content["rows"]:
        if (row["subject"], row["peer"], row["status"]) != ("training_step", "aurora", "ok"):
            continue
        size, bf16 = row["case"].removeprefix("aurora-"), row["dtype"] == "bfloat16"
        rate = content["ceilings"]["matmul"][row["dtype"]]
        planned = encoder_step(size, row["items"], content["kind"], bf16, rate, content["ceilings"]["copy"])
        case = f"encoder of {row['case']}, {row['items']} images"
        device = f"{content['device']}, {'bf16' if bf16 else 'fp32'}"
        source = f"{path.parent.name}/{path.name}"
        found.append(
            _row(device, case, planned, row["peak_memory"], statistics.median(row["seconds"]), rate, source)
        )
    return found


def encoder_step(size: str, images: int, kind: str, bf16: bool, flop_rate: float, byte_rate: float) -> Traced:
    """What bench/test_training_step.py runs: SwinV2's own form of an encoder, a loss over its last map."""
    config = AURORA_SIZES[size]
    config = replace(
        config, mlp="gelu", windows=(max(config.windows),) * 4, window_padding="zero", extra_norm_every=0, drop_path=0.0
    )  # fmt: skip
    meter = Meter(flop_rate, byte_rate)
    with torch.device("meta"):
        model = SwinEncoder(config).train()
        pictures = torch.empty(images, 3, config.image_size, config.image_size)
    low = torch.bfloat16 if bf16 else None
    with in_place_of_kernels(meter, kind, low), meter, meter.watching(model):
        model(pictures)[3].square().mean().backward()
    return Traced(images, meter.counts, meter.peak, meter.peak_with_gradients, meter.gradients, meter.logits)


if __name__ == "__main__":
    sys.exit(main())
