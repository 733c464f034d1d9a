"""What `train.plan` says of the rows, by its own parts; needs no GPU, so that it runs beside the measuring."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.steps.cases import STEP, Case
from bench.steps.plain import NAMES
from train.devices import DEVICES, Device, peak_of
from train.plan.budget import COPY_SHARE, MATMUL_SHARE, count, largest_block
from train.plan.calibration import Row
from train.plan.engines import EngineChoice, static_memory
from train.plan.trace import empty_model, trace

DEFAULT = "h200"  # what is planned for where there is no GPU of the table


def device_of(name: str) -> Device:
    """The plan's entry for a GPU as torch calls it."""
    peak = peak_of(name)
    return next((device for device in DEVICES.values() if device.peak == peak), DEVICES[DEFAULT])


def plan_rows(cases: Sequence[Case], path: Path) -> int:
    """Write what is planned for every training step, by the row's name."""
    torch.set_num_threads(1)
    device = device_of(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    found: dict[str, Any] = {}
    for case in cases:
        if case.kind == STEP:
            found[case.name] = planned(case, device)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(found, indent=1) + "\n")
            part.replace(path)
    return 0


def planned(case: Case, device: Device) -> dict[str, Any]:
    """One step: bytes that an engine keeps and that a micro-step needs, the floor of its time, and the time at the plan's own
    share of the peak."""
    config = case.config
    model = empty_model(config)
    parameters, largest = count(config, model)["total"], largest_block(model)
    engine = EngineChoice("deepspeed", 2) if case.ranks > 1 else EngineChoice("single")
    static = static_memory(config, parameters, largest, case.ranks, engine)
    traced = trace(
        config, case.counts, kind="cuda", bf16=True, weights=torch.bfloat16 if engine.keeps_bf16 else torch.float32,
        flop_rate=MATMUL_SHARE * device.peak.bf16, byte_rate=COPY_SHARE * device.peak.bandwidth, model=model,
    )  # fmt: skip
    flops = traced.model_flops * case.accumulation
    # Gradients of earlier micro-steps are there while the last one runs.
    gradients = static["gradients"] if case.ranks > 1 or case.accumulation > 1 else None
    above = (
        traced.with_gradients if gradients is None else traced.activations + min(gradients, 4.0 * parameters)
    )
    return {
        "device": device.name, "static": static, "activations": traced.activations, "above": above,
        "without_buckets": sum(static.values()) - static.get("buckets", 0.0) + traced.activations, "flops": flops,
        "recomputed": traced.counts.flops["recompute"] / traced.model_flops, "floor": traced.counts.seconds * case.accumulation,
        "mfu": device.mfu, "seconds": flops / (device.mfu * device.peak.bf16), "samples": case.samples,
    }  # fmt: skip


def calibration(rows: Sequence[dict[str, Any]], plans: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for `train.plan`'s own record of measured steps (plan.json)."""
    found = []
    for row in rows:
        ours, plan = row["variants"].get(NAMES[0], {}), plans.get(row["name"])
        if row.get("kind") != STEP or not plan or plan["samples"] != row["samples"]:
            continue
        if not {"peak", "seconds"} <= set(ours):
            continue
        found.append(
            Row(
                device=f"{row['device']}, {row['precision']}", case=row["title"], planned_bytes=plan["above"],
                measured_bytes=ours["peak"] - ours["before"], floor_seconds=plan["floor"],
                measured_seconds=ours["seconds"], flops=ours["flops"], flop_rate=row["matmul"], source="bench.steps",
            )
        )  # fmt: skip
    return [asdict(row) for row in found]
