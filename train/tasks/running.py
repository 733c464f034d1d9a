"""What a fine-tuning run does where a pre-training run does something else: its first lines, evaluations, and its end."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dataload.annotated import TaskSet
from dataload.broken import Broken
from dataload.tokenizer import Tokenizer
from train.engine import Ranks
from train.machine import Precision, device_name, peak_memory, versions
from train.optimizers import in_words
from train.scores.gather import gather_samples
from train.signals import Stop
from train.tasks.base import Prediction, Task, TaskResult
from train.tasks.config import FinetuneConfig
from train.tasks.data import TaskData
from train.tasks.registry import task_of

if TYPE_CHECKING:
    from train.run import Run

ALONE = Ranks(0, 0, 1)

SCORERS = ("pycocoevalcap", "pycocotools", "faster-coco-eval")  # packages that scores of tasks depend on


def greet_task(
    config: FinetuneConfig, device: torch.device, precision: Precision, ranks: Ranks, data: TaskData, out: Any
) -> list[str]:
    """Lines for rank 0 to say."""
    counts, task = data.loader.counts, config.task
    held = f"{len(data.heldout):,} held out" if data.heldout else "none held out: nothing will be scored"
    processes = f", {ranks.size} processes" if ranks.size > 1 else ""
    tuned = f"LoRA of rank {config.tune.lora_rank}" if config.tune.lora_rank else "all weights"
    if config.tune.freeze:
        tuned += f" but {', '.join(config.tune.freeze)}"
    shown = ", ".join(task.classes[:6]) + (" ..." if len(task.classes) > 6 else "")
    lines = [
        f"device      {device_name(device)}{processes}; {precision.name}: {precision.why}",
        f"task        {task.kind}" + (f", {len(task.classes):,} classes: {shown}" if task.classes else ""),
        f"learns      {tuned}",
        f"optimizer   {in_words(config.optim, device)}",
        f"data        {counts['items']:,} items of {counts['samples']:,} samples in {counts['shards']} shards; {held}",
        f"steps       {config.steps:,} of {config.batch_size:,} items",
        f"output      {out}",
    ]
    items = data.loader.items
    if items.lacking:
        lines.insert(
            5, f"data        {items.lacking:,} training samples lack what the task needs, and are left out"
        )
    if items.unusable:
        lines.insert(
            5, f"data        {items.unusable:,} questions of the others have no answer, and are left out"
        )
    if items.broken:
        lines.insert(
            5, f"data        {len(items.broken):,} have annotations that cannot be read: {items.broken[0]}"
        )
    if samples := config.objectives.self_critical:
        lines.insert(
            2, f"loss        self-critical: CIDEr-D of {samples} captions that are sampled of each picture"
        )
    return lines


@torch.no_grad()
def score_task(
    model: Any,
    heldout: TaskSet,
    config: FinetuneConfig,
    tokenizer: Tokenizer,
    *,
    device: torch.device,
    autocast: torch.dtype | None = None,
    most: int | None = None,
    ranks: Ranks = ALONE,
    task: Task | None = None,
) -> TaskResult | None:
    """Score `model` on the items of the first `most` samples. Every rank takes its own batches; what they found is gathered
    once, and rank 0 alone scores it, once (the others get None). The figures do not depend on the number of ranks."""
    task = task or task_of(config.task.kind)
    was_training = model.training
    model.eval()
    predictions: list[Prediction] = []
    try:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            for batch in heldout.batches(ranks.rank, ranks.size, heldout.items.first(most)):
                predictions += task.predict(model, batch.to(device), heldout.items, config, tokenizer)
        mine: dict[int | str, Any] = {one.item: one.value for one in predictions}
        gathered = gather_samples(mine) if ranks.size > 1 else mine
        heldout.broken = all_broken(heldout.broken, ranks)
        if gathered is None:
            return None
        ordered = [Prediction(int(item), value) for item, value in gathered.items()]
        # still in eval mode: retrieval asks the model again when it orders the first ones anew
        result = task.score(ordered, heldout.items, config, tokenizer)
    finally:
        model.train(was_training)
    if heldout.broken:
        result.counts["broken_left_out"] = len(heldout.broken)
    return result


def all_broken(mine: list[Broken], ranks: Ranks) -> list[Broken]:
    """On rank 0, what any rank could not read, each once; on the others their own. All ranks call this."""
    if ranks.size == 1:
        return mine
    found = gather_samples({f"{one.shard}/{one.key}": one for one in mine})
    return mine if found is None else list(found.values())


def evaluate_task(run: Run, stop: Stop, model: Any, most: int | None) -> TaskResult:
    """Score what `engine.scored_weights` gives, on rank 0 alone."""
    started = time.monotonic()
    assert isinstance(run.config, FinetuneConfig)
    with stop.interruptible():
        result = score_task(
            model,
            run.data.heldout,
            run.config,
            run.data.tokenizer,
            device=run.engine.device,
            autocast=run.engine.precision.autocast,
            most=most,
        )
    run.evaluation_seconds.append(time.monotonic() - started)
    assert result is not None
    return result


def say_task(run: Run, result: TaskResult) -> None:
    """An evaluation during the run in one line."""
    scores = ", ".join(f"{name} {value:.4f}" for name, value in result.scalars().items())
    run.say(f"step {run.step}: {scores} of {', '.join(f'{n:,} {what}' for what, n in result.counts.items())}")


def finish_task(run: Run, stop: Stop) -> None:
    """Score all that is held out, and write summary.json, submissions and report.html. All ranks call this."""
    from train.report.tasks import write_task_page

    config = run.config
    assert isinstance(config, FinetuneConfig)
    result = None
    if run.data.heldout is not None:
        run.say(f"scoring all {len(run.data.heldout):,} held-out items ...")
        with run.watchdog.patient("the last evaluation"), run.engine.scored_weights() as model:
            if run.ranks.first:
                result = evaluate_task(run, stop, model, None)
    if not run.ranks.first:
        return
    if result is not None:
        run.record_scores(result)
        run.say(f"held out, after step {run.step}:")
        for line in result.lines():
            run.say(f"  {line}")
    record = describe(run, result)
    (run.out / "summary.json").write_text(json.dumps(record, indent=2) + "\n")
    run.say(f"checkpoint  {run.saved}")
    run.say(f"scores      {run.out / 'summary.json'}")
    if result is not None and run.data.heldout is not None:
        for path in write_files(run.out, result):
            run.say(f"            {path}")
        items = run.data.heldout.items
        page = write_task_page(run.out / "report.html", result, items, record, run.out)
        run.say(f"report      {page} (open it in a browser)")


def write_files(folder: Path, result: TaskResult, front: str = "") -> list[Path]:
    """The further files of a result: submissions in the official format. `front` stands before their names, so that one
    evaluation leaves another's alone."""
    paths = []
    for name, content in result.files.items():
        path = folder / (front + name)
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def describe(run: Run, result: TaskResult | None) -> dict[str, Any]:
    """summary.json."""
    config, data = run.config, run.data
    assert isinstance(config, FinetuneConfig)
    return {
        "name": config.name,
        "task": config.task.kind,
        "classes": len(config.task.classes),
        "prompt": config.task.prompt,
        "started_from": config.checkpoint,
        "model": {
            "family": config.family,
            "parameters": sum(p.numel() for p in run.engine.model.parameters()),
            "learning": sum(p.numel() for p in run.engine.model.parameters() if p.requires_grad),
            "image_size": config.model.image_size,
        },
        "data": {
            "train": list(data.sources.train),
            "heldout": list(data.sources.heldout),
            **data.loader.counts,
            "broken": data.loader.broken.count,
            "builtin": data.sources.builtin,
        },
        "steps": run.step,
        "total_steps": config.steps,
        "skipped_steps": run.skipped,
        "items": run.step * config.batch_size,
        "seconds": run.seconds,
        "device": device_name(run.engine.device),
        "precision": run.engine.precision.name,
        "peak_memory": peak_memory(run.engine.device),
        "world_size": run.ranks.size,
        "seed": config.seed,
        "command": run.command,
        "checkpoint": str(run.saved.relative_to(run.out)) if run.saved else None,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(*SCORERS),
        "evaluation": result.to_json() if result else None,
    }
