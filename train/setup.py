"""Before the first step: who we are, what we go on from, and the objects that the loop uses."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from train import checkpoint
from train.checkpoint import CheckpointError, Snapshot
from train.commands import begun_by, command_line, command_that_began, command_to_resume, keep
from train.config import ConfigError, PretrainConfig, differences, problems
from train.data import Data, find_sources, open_data
from train.directory import LAUNCH, Lock, find_run, give_up, launch
from train.engine import Ranks, join, leave, load_rng, share
from train.engines.choice import build_engine, engine_problems
from train.engines.watchdog import Watchdog
from train.families import family_of
from train.greeting import greeting
from train.machine import Precision, choose_precision, free_disk, gigabytes, keep_freed_memory
from train.multimodal.config import PerceiverPretrainConfig
from train.multimodal.data import MultimodalData, find_pairs, open_pairs
from train.plan.engines import room_for_checkpoints
from train.run import Run
from train.saving import Saver
from train.tasks.config import FinetuneConfig
from train.tasks.data import TaskData, find_task_sources, open_task
from train.tasks.family import TaskFamily
from train.telemetry.log import Metrics, Progress, TensorBoard
from train.telemetry.observe import Observer


def set_up(config: PretrainConfig, command: Sequence[str]) -> Run:
    """Everything up to the first step. Raises ConfigError or CheckpointError where the run cannot start as
    asked.
    """
    ranks = Ranks.from_environment()
    if found := problems(config, ranks.size) + engine_problems(config, ranks.size):
        raise ConfigError("\n  ".join(["this run cannot start:", *found]))
    device = join(ranks, config.device, alone=config.engine in ("fsdp2", "deepspeed"))
    if device.type == "cpu":
        keep_freed_memory()
    again = (
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    )  # torchrun starts the same command after a fault
    progress = Progress(config.steps, config.batch_size, config.log_every, on=ranks.first)
    out, start, lock = _resolve(config, ranks, progress, again)
    try:
        return _ready(config, command, ranks, device, progress, out, start, lock)
    except BaseException as error:
        if lock:
            give_up(lock)
        if isinstance(error, OSError):
            raise ConfigError(f"this run cannot start: {error}") from error
        raise


def _ready(
    config: PretrainConfig,
    command: Sequence[str],
    ranks: Ranks,
    device: torch.device,
    progress: Progress,
    out: Path,
    start: Path | None,
    lock: Lock | None,
) -> Run:
    """The same, of a run whose directory is known."""
    snapshot, former = checkpoint.read(start, verified=True) if start else (None, None)
    if former:
        compare(former, config, progress, begun_by(start))
    if snapshot and start:
        refuse_fewer_steps(start, snapshot.step, config)
    config = replace(config, out=str(out))

    precision = _precision(config, snapshot, device, ranks)
    torch.manual_seed(config.seed)  # the same weights on every rank
    family = family_of(config)
    model = family.model(config)
    begun = [] if snapshot else family.begin(model, config)
    short = None if snapshot else _short_of_disk(config, model, out)
    torch.manual_seed(config.seed + 1 + ranks.rank)  # other dropout on every rank

    data = _open(config, ranks, device, progress)
    program = "train.finetune" if isinstance(config, FinetuneConfig) else "train.pretrain"
    engine = build_engine(model, config, device, precision, ranks)
    if isinstance(data, TaskData) and isinstance(engine.family, TaskFamily):
        engine.family.attach(data.loader.items, data.tokenizer)
    run = Run(
        config,
        out,
        command_that_began(command, out, start, ranks, program),
        command_to_resume(command, out, ranks, program),
        ranks,
        engine,
        data,
        progress,
        None,
        None,
        Saver(out / "checkpoints", config, data.sources.tokenizer, ranks, device, progress.say),
        Watchdog(ranks, config.hang_timeout),
        lock=lock,
    )
    if snapshot:
        _go_on_from(run, snapshot, start)
    if ranks.first:
        keep(out, run.command, command_line(command, ranks, program))
        checkpoint.remove_unfinished(out / "checkpoints")
        for left in checkpoint.set_aside(out / "checkpoints", run.step):
            progress.say(
                f"resume      {left.name}: a later step, which this run leaves behind; remove it when you like"
            )
        checkpoint.write_config(out / "config.json", config)
        run.metrics = Metrics(out / "metrics.jsonl", keep_up_to=run.step, last=config.steps)
        run.board = TensorBoard(out / "tensorboard", start=run.step)
    run.observer = Observer(run)
    for line in [*greeting(config, device, precision, ranks, data, out), *begun]:
        progress.say(line)
    if short:
        progress.say(short)
    if snapshot and start:
        progress.say(f"resume      {start}: going on after step {run.step} of {config.steps}")
    run.watchdog.start()
    run.started = time.monotonic()
    return run


def _open(
    config: PretrainConfig, ranks: Ranks, device: torch.device, progress: Progress
) -> Data | MultimodalData | TaskData:
    """Rank 0 draws the built-in corpus and indexes the shards; then the others find both done."""
    if not ranks.first and (failed := share(None, ranks)):
        leave(ranks)
        raise failed
    try:
        data: Data | MultimodalData | TaskData
        if isinstance(config, FinetuneConfig):
            data = open_task(config, find_task_sources(config, progress.say), ranks.rank, ranks.size)
        elif isinstance(config, PerceiverPretrainConfig):
            pairs = find_pairs(config.data, config.model.image_size, progress.say)
            data = open_pairs(config, pairs, ranks.rank, ranks.size)
        else:
            sources = find_sources(config.data, config.model.image_size, progress.say)
            where = str(device) if device.type == "cuda" else "cpu"
            data = open_data(config, sources, ranks.rank, ranks.size, where)
    except (OSError, ValueError, ImportError) as error:
        refused = ConfigError(str(error))
        if ranks.first:
            share(refused, ranks)  # the others must not wait for a rank that gave up
            leave(ranks)
        raise refused from error
    if ranks.first:
        share(None, ranks)
    return data


def _short_of_disk(config: PretrainConfig, model: nn.Module, out: Path) -> str | None:
    """A line to say where the disk has no room for a run's checkpoints."""
    learn, all_ = (
        sum(w.numel() for w in model.parameters() if w.requires_grad or every) for every in (False, True)
    )
    (each, needed), free = room_for_checkpoints(config, learn, all_ - learn), free_disk(out)
    if needed <= free:
        return None
    return (
        f"note        {gigabytes(needed)} for {config.keep_checkpoints} checkpoints of {gigabytes(each)} and one in the "
        f"making, but {gigabytes(free)} are free at {out}: fewer --keep-checkpoints or another --out help"
    )


def _resolve(
    config: PretrainConfig, ranks: Ranks, progress: Progress, again: bool
) -> tuple[Path, Path | None, Lock | None]:
    """Rank 0's choice of the run's directory and of the step directory to go on from, told to all ranks; and on rank 0 the
    lock of that directory."""
    choice: tuple[Path, Path | None] | Exception
    lock = None
    try:
        choice = (Path(), None)
        if ranks.first:
            out, start, lock = find_run(config, progress, Lock, again)
            choice = (out, start)
            if "TORCHELASTIC_RUN_ID" in os.environ:
                (out / LAUNCH).write_text(launch())
    except (ConfigError, CheckpointError) as error:
        choice = error  # the others must not wait for a rank that gave up
    except OSError as error:
        choice = ConfigError(f"this run cannot start: {error}")
    choice = share(choice, ranks)
    if isinstance(choice, Exception):
        if lock:
            give_up(lock)
        leave(ranks)  # in good order: all of them come here
        raise choice
    if lock and not lock.known:
        progress.say(f"note        {choice[0]} knows no locks: keep other runs out of it yourself")
    return *choice, lock


def refuse_fewer_steps(start: Path, done: int, config: PretrainConfig) -> None:
    """Raises ConfigError where the run that goes on from `start` has no step left to make, but some to take back."""
    if done > config.steps:
        raise ConfigError(
            f"{start} has done {done} steps, and --steps asks for {config.steps}: a run goes on to more, or is scored "
            "again with as many"
        )


def compare(former: PretrainConfig, config: PretrainConfig, progress: Progress, begun: str | None) -> None:
    """Refuse another model; say every other change, and what `begun` the run: who goes on with it may have left out what was
    typed then."""
    if family_of(former).name != family_of(config).name:
        raise ConfigError(
            f"the checkpoint is of {family_of(former).name}, this run trains {family_of(config).name}"
        )
    changed = differences(former, config)
    model = [f"{name} was {a}, now {b}" for name, (a, b) in changed.items() if name.startswith("model.")]
    if model:
        more = f" and {len(model) - 4} more fields" if len(model) > 4 else ""
        raise ConfigError("the checkpoint is of another model: " + "; ".join(model[:4]) + more)
    told = {name: values for name, values in changed.items() if name not in ("out", "resume", "dry_run")}
    for name, (a, b) in told.items():
        progress.say(f"resume      {name} was {a!r} in the checkpoint; from now on {b!r}")
    if told and begun:
        progress.say(f"resume      that one was begun by {begun}")


def _precision(
    config: PretrainConfig, snapshot: Snapshot | None, device: torch.device, ranks: Ranks
) -> Precision:
    if (
        snapshot
        and config.precision == "auto"
        and not (device.type == "cuda" and snapshot.precision == "fp32")
    ):
        return Precision(snapshot.precision, "as before the resume")
    return share(choose_precision(config.precision, device) if ranks.first else None, ranks)


def _go_on_from(run: Run, snapshot: Snapshot, start: Path | None) -> None:
    try:
        run.engine.load(snapshot.engine)
        run.data.loader.load_state_dict(snapshot.loader)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{start} does not fit this run: {error}") from error
    known = load_rng(snapshot.rng, run.ranks.rank, run.engine.device)
    if run.ranks.size > snapshot.world_size:  # rank 0, which says it, is never a new one
        run.say(f"resume      written by {snapshot.world_size} ranks: dropout of the new ones is seeded anew")
    elif not known:
        run.say("resume      written on another kind of device: dropout is seeded anew")
    run.step, run.seconds_before, run.skipped = snapshot.step, snapshot.seconds, snapshot.skipped
    run.saver.saved = start if start and start.parent == run.out / "checkpoints" else None
