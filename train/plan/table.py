"""A plan as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from train.plan.budget import Plan, to_json
from train.plan.engines import traffic


def lines(plan: Plan) -> Iterator[str]:
    """What a reader wants to know before money is spent."""
    found, setup = to_json(plan), plan.setup
    peak = setup.device.peak.bf16
    yield f"plan        {plan.preset} on {setup.gpus} x {setup.device.name}, engine {setup.engine}"
    parts = ", ".join(
        f"{name.replace('_', ' ')} {n / 1e6:,.1f}M" for name, n in plan.parameters.items() if name != "total"
    )
    yield f"parameters  {plan.parameters['total'] / 1e6:,.1f}M ({parts})"
    yield from _flops(plan, found)
    yield from _memory(plan)
    yield from _batch(plan, found)
    yield (
        f"time        {plan.step_seconds:,.2f} s per step at {100 * setup.mfu:.0f}% of {peak / 1e12:,.0f} TFLOP/s (--mfu); "
        f"{_floor(plan)}"
    )
    run = found["time"]
    yield (
        f"            {plan.steps:,} steps of {plan.batch_size:,}: {duration(plan.run_seconds)}, "
        f"{run['gpu_hours']:,.0f} GPU-hours, {run['samples_per_second']:,.0f} samples/s, {plan.run_flops:.2e} FLOP = "
        f"{plan.run_flops / 8.64e19:,.0f} PetaFLOP/s-days"
    )
    if plan.checkpointing and plan.hardware_share > setup.mfu:
        yield f"            with what is recomputed the GPUs work at {100 * plan.hardware_share:.0f}% of their peak"
    yield f"            anchors: {setup.device.anchor}"
    yield from _communication(plan, found)
    data = found["data"]
    yield (
        f"data        {size(data['bytes_per_second'])}/s read, {size(data['bytes_per_sample'])} per sample (assumed), "
        f"{size(data['bytes'])} in all; {run['samples_per_second'] / setup.gpus:,.1f} samples/s to decode per GPU"
    )
    kept = found["checkpoint"]
    yield (
        f"checkpoint  {size(kept['bytes'])}, {size(kept['per_rank'])} per rank; copied aside in {kept['stall']:.1f} s "
        f"({100 * kept['stall_share']:.2g}% of the {duration(kept['between'])} between two), written in {kept['write']:.0f} s "
        f"at {size(setup.disk)}/s a machine"
    )
    for problem in plan.problems:
        yield f"problem     {problem}"


def _flops(plan: Plan, found: dict[str, Any]) -> Iterator[str]:
    flops = found["flops_per_sample"]
    yield (
        f"FLOPs       {tera(flops['model'])} per sample: forward {tera(flops['forward'])}, backward {tera(flops['backward'])}; "
        f"recomputed {tera(flops['recompute'])}"
        + ("" if plan.checkpointing else f" ({tera(plan.recompute)} with checkpointing)")
    )
    by_part = sorted(flops["by_part"].items(), key=lambda part: -part[1])
    yield "            " + ", ".join(f"{name} {100 * n / flops['model']:.1f}%" for name, n in by_part)
    kinds = ", ".join(f"{kind} {tera(n)}" for kind, n in flops["by_kind"].items())
    mixture = " : ".join(f"{share:.3g}" for share in plan.shares.values())
    yield f"            {kinds}; mixed {mixture}"


def _memory(plan: Plan) -> Iterator[str]:
    room = plan.setup.device.memory
    for on, found in plan.memory.items():
        static = ", ".join(f"{name} {size(n)}" for name, n in found.static.items())
        if not on:
            yield f"memory      {size(sum(found.static.values()))} per GPU before a batch ({static}), of {size(room)}"
        words = "with activation checkpointing   " if on else "without activation checkpointing"
        yield (
            f"            {words} {size(found.per_sample)} per sample and {size(found.fixed)} besides (logits "
            f"{size(found.logits)} at a time): micro-batches up to {found.largest}"
        )
    if plan.setup.engine.shards:
        fits = "" if plan.scoring <= room else ", which does not fit: evaluate checkpoints elsewhere"
        yield (
            "            scoring held-out data in the run gathers a whole fp32 copy of "
            f"{size(4 * plan.parameters['total'])} on rank 0: {size(plan.scoring)} there{fits}"
        )


def _batch(plan: Plan, found: dict[str, Any]) -> Iterator[str]:
    batch = found["batch"]
    whose = "as the preset says" if plan.as_asked else "the fewest micro-steps that fit"
    yield (
        f"batch       {plan.batch_size:,} = {plan.setup.gpus} GPUs x {plan.micro_batch} samples x {plan.accumulation} "
        f"micro-steps ({whose}, {'with' if plan.checkpointing else 'without'} checkpointing): {size(batch['memory'])} per GPU; "
        f"contrast with {plan.negatives:,} texts"
    )


def _floor(plan: Plan) -> str:
    if plan.floor_seconds is None:
        return "no floor was traced"
    at = plan.compute_seconds * plan.setup.mfu / plan.floor_seconds
    return f"{plan.floor_seconds:.2f} s if every operation ran at its limit ({100 * at:.0f}%)"


def _communication(plan: Plan, found: dict[str, Any]) -> Iterator[str]:
    if plan.setup.gpus == 1:
        yield "network     one GPU: nothing is sent"
        return
    sent = traffic(plan.parameters["total"], plan.setup.gpus, plan.setup.engine)
    rate, times = found["setup"]["bus"], found["communication"]
    said = f"network     at {size(rate)}/s: "
    if sent.per_micro_step:
        hidden = (
            "hidden behind it"
            if times["micro_step_seconds"] <= times["backward_seconds"]
            else "longer: communication is the limit"
        )
        said += (
            f"{size(sent.per_micro_step)} per micro-step in {times['micro_step_seconds']:.2f} s beside "
            f"{times['backward_seconds']:.2f} s of backward pass ({hidden}), "
        )
    yield said + f"{size(sent.per_step)} per step in {times['step_seconds']:.2f} s"


def size(count: float) -> str:
    """Bytes in words."""
    for unit, factor in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def tera(flops: float) -> str:
    """FLOPs in words."""
    for unit, factor in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flops >= factor:
            return f"{flops / factor:,.2f} {unit}"
    return f"{flops / 1e6:,.1f} MFLOP"


def duration(seconds: float) -> str:
    """Seconds in words: weeks and days, hours, minutes."""
    if seconds >= 14 * 86400:
        return f"{seconds / (7 * 86400):.1f} weeks"
    for unit, factor in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= factor:
            return f"{seconds / factor:.1f} {unit}"
    return f"{seconds:.0f} s"
