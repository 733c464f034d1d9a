"""What the ranks of `python -m bench.engines` do."""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dataload.batch import Batch
from models import AURORA_SIZES, Aurora
from train import checkpoint
from train.config import OptimConfig, PretrainConfig
from train.engine import Ranks, TorchEngine, join, leave
from train.engines.choice import build_engine
from train.machine import Precision, keep_freed_memory
from train.optim import lr_at
from train.presets import preset
from train.saving import Saver

ROUNDS, WARM = 12, 2
INTERVAL = PretrainConfig().save_every


def rank(part: str, work: Path) -> int:
    """One rank of a part; the first one writes what was found."""
    ranks = Ranks.from_environment()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    keep_freed_memory()
    join(ranks, "cpu", alone=True)
    parts: dict[str, Callable[[Ranks, Path], dict[str, Any]]] = {
        "steps": steps, "stall": stall, "resume": resume, "resumed": resumed,
    }  # fmt: skip
    found = parts[part](ranks, work)
    if ranks.first:
        (work / f"{part}.json").write_text(json.dumps(found))
    leave(ranks)
    return 0


# --- one step after another -------------------------------------------------------------------------


def engine_of(config: PretrainConfig, ranks: Ranks) -> TorchEngine:
    torch.manual_seed(0)
    return build_engine(Aurora(config.model), config, torch.device("cpu"), Precision("fp32", ""), ranks)


def batch(config: PretrainConfig, ranks: Ranks, step: int) -> Batch:
    """This rank's part of a batch that depends on the step alone: half of it pairs, half masked pictures."""
    model, half = config.model, config.batch_size // 2
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(5, min(model.vocabulary, 300), (half, model.text_length), generator=g)
    targets = torch.where(torch.rand(tokens.shape, generator=g) < 0.25, tokens, -100)
    targets[:, 1] = tokens[:, 1]
    pixels = (half, model.image_size, model.image_size, 3)
    pictures, masked = (torch.randint(0, 256, pixels, dtype=torch.uint8, generator=g) for _ in range(2))
    side = model.image_size // 32
    hidden = torch.rand(half, side, side, generator=g) < 0.5
    hidden[:, 0, 0] = True
    mine = slice(ranks.rank * half // ranks.size, (ranks.rank + 1) * half // ranks.size)
    words = tokens.where(targets < 0, torch.tensor(4))
    return Batch(
        pictures[mine], tokens[mine], words[mine], targets[mine], masked[mine], hidden[mine], keys=()
    )


def train(one: TorchEngine, step: int) -> float:
    """One optimizer step; its loss."""
    batches = [batch(one.config, one.ranks, step)]
    normalizers, _ = one.agree(batches, False)
    for micro in one.micro_batches(batches):
        with one.micro_step(last=True):
            one.backward(one.losses(micro, one.config.objectives, normalizers))
    return one.step(lr_at(step, one.config.steps, one.config.optim)).loss


def clocked(one: TorchEngine, step: int) -> tuple[float, float]:
    """Seconds, and CPU seconds of all ranks together, of a step."""
    if one.ranks.size > 1:
        dist.barrier()
    wall, own = time.perf_counter(), time.process_time()
    train(one, step)
    spent = torch.tensor([time.process_time() - own], dtype=torch.float64)
    wall = time.perf_counter() - wall
    if one.ranks.size > 1:
        dist.all_reduce(spent)
    return wall, spent.item()


def steps(ranks: Ranks, work: Path) -> dict[str, Any]:
    """Engines in turn, in an order that is drawn in each round; rounds are compared, not times."""
    return {name: in_turns(config, ranks) for name, config in cases().items()}


def cases() -> dict[str, PretrainConfig]:
    """What trains: aurora-tiny as it is, and 39 million parameters on few samples, where engines have much to do."""
    larger = replace(
        AURORA_SIZES["small"], image_size=32, windows=(4, 4, 2, 1), width=64, text_length=16, vocabulary=8_000,
        drop_path=0.0,
    )  # fmt: skip
    return {
        "aurora-tiny": replace(preset("aurora-tiny"), batch_size=32, accumulation=1),
        "larger": PretrainConfig(model=larger, batch_size=16, steps=1000),
    }


def in_turns(config: PretrainConfig, ranks: Ranks) -> dict[str, Any]:
    built = {
        name: engine_of(replace(config, engine=name, zero_stage=2, ema_decay=0.0), ranks)
        for name in ("ddp", "fsdp2", "deepspeed")
    }
    order, rounds = random.Random(0), []
    for turn in range(ROUNDS):
        names = order.sample([*built], len(built))
        rounds.append({name: clocked(built[name], turn) for name in names})
    kept = rounds[WARM:]
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in Aurora(config.model).parameters())}
    for name in built:
        for i, clock in enumerate(("seconds", "cpu_seconds")):
            ratios = sorted(one[name][i] / one["fsdp2"][i] for one in kept)
            found[f"{name} {clock}"] = statistics.median(one[name][i] for one in kept)
            # Of 10 rounds the 2nd and the 9th hold the median with 98%.
            found[f"{name} / fsdp2 {clock}"] = [ratios[1], statistics.median(ratios), ratios[-2]]
    return found


# --- checkpoints ------------------------------------------------------------------------------------


def stall(ranks: Ranks, work: Path) -> dict[str, Any]:
    config = replace(preset("aurora-tiny"), batch_size=32, accumulation=1)
    one = engine_of(config, ranks)
    return costs(one, work, plain=20, checkpoints=5)


def costs(one: TorchEngine, work: Path, plain: int, checkpoints: int) -> dict[str, Any]:
    """Steps without checkpoints, then with one at a time beside them, until it is on the disk."""
    keeper = saver(one, work)
    step, usual = 0, []
    for _ in range(plain + 1):
        usual.append(clocked(one, step))
        step += 1
    seconds, cpu = (statistics.median(x[i] for x in usual[1:]) for i in (0, 1))
    stalls, slower, extra, losses = [], [], [], []
    for i in range(checkpoints):
        before, here = keeper.stalled, cpu_of_all(one)
        keeper.begin(lambda: snapshot(one, step), wait=False)  # noqa: B023  (called at once)
        beside = []
        while keeper._writing is not None:
            began = time.perf_counter()
            losses.append(train(one, step))
            step += 1
            beside.append(time.perf_counter() - began)
            keeper.poll()
        keeper.finish()
        stalls.append(keeper.stalled - before)
        slower.append(sum(beside) - len(beside) * seconds)
        extra.append(cpu_of_all(one) - here - len(beside) * cpu)
        if i == 0:
            after = losses[0]
    path = keeper.saved
    assert path is not None
    size = sum(file.stat().st_size for file in path.iterdir())
    every = {"stall": stalls, "slower steps": slower, "CPU": extra}
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in Aurora(one.config.model).parameters()), "ranks": one.ranks.size,
        "bytes": size, "step seconds": seconds, "step cpu_seconds": cpu, "interval": INTERVAL, "loss after the first": after,
    }  # fmt: skip
    for name, values in every.items():
        whole = INTERVAL * (cpu if name == "CPU" else seconds)
        found[f"{name} of each checkpoint, seconds"] = values
        found[f"{name}, share of training"] = statistics.median(values) / whole
    return found


def cpu_of_all(one: TorchEngine) -> float:
    """CPU seconds of all ranks so far, threads included."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = torch.tensor([used.ru_utime + used.ru_stime], dtype=torch.float64)
    if one.ranks.size > 1:
        dist.all_reduce(spent)
    return spent.item()


def saver(one: TorchEngine, work: Path) -> Saver:
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = work / "tokenizer.model"
    if one.ranks.first:
        tokenizer.write_bytes(b"none: this model reads numbers")
    return Saver(work / f"checkpoints-{one.ranks.size}", one.config, tokenizer, one.ranks, one.device, print)


def snapshot(one: TorchEngine, step: int) -> checkpoint.Snapshot:
    return checkpoint.Snapshot(step, one.state(), {}, {}, one.precision.name, one.ranks.size, 0.0, 0)


# --- another number of ranks ------------------------------------------------------------------------


def hundred() -> PretrainConfig:
    """100 million parameters, 16 of the smallest pictures a step."""
    model = replace(
        AURORA_SIZES["small"],
        image_size=32,
        windows=(4, 4, 2, 1),
        depths=(2, 2, 8, 2),
        text_length=16,
        drop_path=0.0,
    )
    return PretrainConfig(
        model=model,
        batch_size=16,
        steps=1000,
        engine="fsdp2",
        keep_checkpoints=9,
        optim=OptimConfig(warmup=10),
    )


def resume(ranks: Ranks, work: Path) -> dict[str, Any]:
    return costs(engine_of(hundred(), ranks), work, plain=4, checkpoints=2)


def resumed(ranks: Ranks, work: Path) -> dict[str, Any]:
    """Go on from the first checkpoint of the four ranks: write it again, then one step."""
    start = checkpoint.step_directories(work / "checkpoints-4")[-1]
    one = engine_of(hundred(), ranks)
    one.load(checkpoint.read(start)[0].engine)
    step = checkpoint.step_of(start)
    saver(one, work).begin(lambda: snapshot(one, step), wait=True)
    return {"loss on two ranks": train(one, step)}
