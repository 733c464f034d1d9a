"""`python -m train.evaluate TASK` for tasks: scores of a fine-tuned checkpoint, or of a pre-trained one that can do the task.

Under torchrun every rank takes its own batches; what they found is gathered and scored once, and the figures are those of one
process.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from dataload import shards
from dataload.annotated import Items, TaskSet
from train.checkpoint import LoadedModel, find, load_model, read_config
from train.config import ConfigError, PretrainConfig
from train.engine import Ranks, join, leave
from train.evaluate.request import check_request, choose_split
from train.evaluate.result import output_for
from train.machine import choose_precision, versions
from train.multimodal.config import PerceiverPretrainConfig
from train.report.tasks import write_task_page
from train.tasks.base import Task, TaskResult
from train.tasks.config import FinetuneConfig
from train.tasks.data import find_items, find_task_sources
from train.tasks.presets import task_preset
from train.tasks.registry import TASKS, task_of
from train.tasks.running import SCORERS, score_task, write_files
from train.tasks.zeroshot import TEMPLATES, ZeroShot

CLASSIFY = "classify"
WITHOUT_HEAD = ("captioning",)
"""Tasks that a pre-trained model can do as it is."""


def add_parsers(tasks: Any, shared: argparse.ArgumentParser) -> None:
    """The tasks' subcommands of `python -m train.evaluate`; `shared` has the options of all."""
    for name, text in TASKS.items():
        if name == "retrieval":
            continue  # evaluate.py has it
        parser = tasks.add_parser(name, parents=[shared], help=text, description=f"{name}: {text}")
        if name in ("captioning", "vqa"):
            parser.add_argument("--beams", type=int, help="of the beam search; 1 is greedy")
            parser.add_argument("--length-penalty", type=float, help="log-probability / length ** this")
            parser.add_argument("--prompt", help="what the text stack reads first (vqa: with {question})")
        if name == "captioning":
            parser.add_argument("--spice-jars", type=Path, help="directory of the jars that SPICE needs")
    text = "zero-shot classes of pictures, by prompts: top-1 and top-5 accuracy"
    parser = tasks.add_parser(CLASSIFY, parents=[shared], help=text, description=f"{CLASSIFY}: {text}")
    parser.add_argument(
        "--templates",
        nargs="+",
        default=list(TEMPLATES),
        help="prompts with {} for the class (default: four)",
    )
    parser.add_argument(
        "--classes", nargs="+", default=[], help="names of the classes (default: those of the data)"
    )


def evaluate_checkpoint(args: argparse.Namespace, given: Sequence[str]) -> int:
    """Run one task; what it raises is for `train.evaluate.main`."""
    task = choose_task(args)
    check_options(args)
    ranks = Ranks.from_environment()
    if ranks.first and (plan := getattr(task, "plan", None)) and (said := plan()):  # before any compute
        print(said, file=sys.stderr)
    loaded = load_model(args.checkpoint)
    config = config_for(args, loaded)
    output = args.output or loaded.path / f"{args.task}.json"
    check_request(args, output)
    if output.suffix == ".html":
        raise ConfigError(
            f"--output {output}: the scores are JSON, and their page stands beside them under that name"
        )
    check_writing(args, config)
    patterns = shards_for(args, config)

    def find() -> Items:
        return find_items(task, patterns, config, training=False)

    items = task.items(find) if isinstance(task, ZeroShot) else find()
    if isinstance(task, ZeroShot):
        config = replace(config, task=task.complete(config.task, items))
    most = args.max_images
    device = join(ranks, args.device)
    try:
        heldout = TaskSet(
            items, task.maker(config, loaded.tokenizer), ragged=task.ragged, batch_size=args.batch_size
        )
        result = score_task(
            model_for(task, loaded, config).to(device), heldout, config, loaded.tokenizer, device=device,
            autocast=choose_precision(args.precision, device).autocast, most=most, ranks=ranks, task=task,
        )  # fmt: skip
    except BaseException:
        abandon()  # the others may wait for this rank: torchrun ends them once it is gone
        raise
    leave(ranks)
    if result is None:  # another rank than the first
        return 0
    for broken in heldout.broken:
        print(f"left out, cannot be read: {broken}", file=sys.stderr)
    record = describe(args, loaded, config, heldout, result, given)
    output = args.output or output_for(loaded.path, args.task, record["data"])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    page = write_task_page(output.with_suffix(".html"), result, items, record)
    # The plain names are for the scores that stand beside the checkpoint by default.
    plain = args.output is None and output.stem == args.task
    further = write_files(output.parent, result, "" if plain else f"{output.stem}-")
    print(
        f"{args.task} of {loaded.path} (step {loaded.step}{', averaged weights' if loaded.averaged else ''})"
    )
    print("\n".join(result.lines()))
    print(f"written to {output}, {page}" + "".join(f", {path}" for path in further))
    return 0


def abandon() -> None:
    """Leave without the others, after an error."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_matcher(args: argparse.Namespace) -> bool:
    """Whether `retrieval` is asked of a checkpoint that was fine-tuned for it, whose decoder re-ranks."""
    found = find(args.checkpoint)
    config = read_config(found[0]) if found and args.task == "retrieval" else None
    return isinstance(config, FinetuneConfig) and config.task.kind == "retrieval"


def choose_task(args: argparse.Namespace) -> Task:
    """The task with what the options say of it."""
    if args.task == "captioning":
        from train.tasks.captioning import Captioning

        return Captioning(args.spice_jars)
    if args.task == CLASSIFY:
        return ZeroShot(args.templates, args.classes)
    if args.task == "retrieval":
        from train.tasks.retrieval import Retrieval

        return Retrieval(args.captions)
    return task_of(args.task)


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that would change nothing. Raises ConfigError."""
    if args.captions != "all" and args.task != "retrieval":
        raise ConfigError(f"--captions {args.captions} is for retrieval; {args.task} has no pool of captions")
    if getattr(args, "views", None) not in (None, 1):
        raise ConfigError(
            f"--views {args.views} is for pre-trained models; the matcher that re-ranks takes 1"
        )
    if args.pairs is not None:
        raise ConfigError(
            f"--pairs {args.pairs} is for pre-trained models of several modalities; {args.task} has one kind of input"
        )


def check_writing(args: argparse.Namespace, config: FinetuneConfig) -> None:
    """The options of what writes. Raises ConfigError."""
    chosen = args.task == "vqa" and config.task.head == "chosen"
    for name in ("beams", "length_penalty"):
        if chosen and getattr(args, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')}: {args.checkpoint} chooses its answers among {len(config.task.classes)}, it "
                "writes none"
            )
    if args.task not in ("captioning", "vqa"):
        return
    unread = config.unread()  # of the training: an earlier version may have passed over it
    if found := [one for one in config.part_problems(1) if one.startswith("task.") and one not in unread]:
        raise ConfigError("; ".join(found))


def config_for(args: argparse.Namespace, loaded: LoadedModel) -> FinetuneConfig:
    """The configuration that the checkpoint is scored with. Raises ConfigError where it cannot do the task."""
    config = loaded.config
    if args.task == CLASSIFY:
        if not (isinstance(config, FinetuneConfig) or config.objectives.itc):
            raise ConfigError(f"{loaded.path} was trained without contrast (objectives.itc is 0)")
        if not knows_pictures(config):
            raise ConfigError(f"{loaded.path} was trained without pictures, which classify is about")
        found = (
            config
            if isinstance(config, FinetuneConfig)
            else own_data(task_preset("retrieval", config), config)
        )
        return replace(found, checkpoint=str(loaded.path))
    if isinstance(config, FinetuneConfig) and config.task.kind == args.task:
        found = config
    elif isinstance(config, FinetuneConfig) or args.task not in WITHOUT_HEAD:
        was = f"fine-tuned for {config.task.kind}" if isinstance(config, FinetuneConfig) else "pre-trained"
        raise ConfigError(
            f"{loaded.path} is {was}; {args.task} needs python -m train.finetune {args.task} --checkpoint {loaded.path}"
        )
    else:
        if not config.objectives.caption:
            raise ConfigError(f"{loaded.path} was trained without captioning (objectives.caption is 0)")
        found = own_data(task_preset(args.task, config), config)
    changes = {
        name: value
        for name in ("beams", "length_penalty", "prompt")
        if (value := getattr(args, name, None)) is not None
    }
    seed = found.seed if args.seed is None else args.seed
    return replace(found, task=replace(found.task, **changes), checkpoint=str(loaded.path), seed=seed)


def knows_pictures(config: PretrainConfig) -> bool:
    """Whether the run had pictures with captions. (A fine-tuned model of sounds counts as one that had none.)"""
    if isinstance(config, FinetuneConfig):
        return config.task.kind != "audio"
    if not isinstance(config, PerceiverPretrainConfig):
        return True
    pairs = config.data.pairs()
    return bool(pairs["image-text"].train) or not any(pair.train for pair in pairs.values())


def own_data(found: FinetuneConfig, start: PretrainConfig) -> FinetuneConfig:
    """The configuration with the shards that the pre-training run held out: PerceiverIO's, of its pictures."""
    if isinstance(start, PerceiverPretrainConfig):
        pairs = start.data.pairs()
        train = tuple(pattern for pair in pairs.values() for pattern in pair.train)
        heldout = pairs["image-text"].heldout
    else:
        train, heldout = start.data.train, start.data.heldout
    return replace(found, data=replace(found.data, train=train, heldout=heldout, cache=start.data.cache))


def model_for(task: Task, loaded: LoadedModel, config: FinetuneConfig) -> nn.Module:
    """The checkpoint's model; a pre-trained one is put into the task's."""
    if isinstance(loaded.config, FinetuneConfig) or task.name == CLASSIFY:
        model: nn.Module = loaded.model
        return model
    model = task.model(config)
    model.base = loaded.model
    return model.eval()


def shards_for(args: argparse.Namespace, config: FinetuneConfig) -> tuple[str, ...]:
    """The shards that are scored. Raises ConfigError where none are known, ValueError for several splits."""
    if args.data or config.data.heldout:
        paths = shards.expand(args.data or config.data.heldout)
    elif config.data.train:
        raise ConfigError(f"{args.checkpoint} was trained without held-out shards; name some with --data")
    else:
        paths = shards.expand(find_task_sources(config, lambda line: print(line, file=sys.stderr)).heldout)
    chosen = choose_split(paths, args.split, any(Path(d).expanduser().is_dir() for d in args.data))
    return tuple(map(str, chosen))


def describe(
    args: argparse.Namespace, loaded: LoadedModel, config: FinetuneConfig, heldout: TaskSet, result: TaskResult,
    given: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """The JSON record: scores with their baselines, and what is needed to measure them again."""
    return {
        "task": args.task,
        "name": config.name,
        **result.to_json(),
        "prompt": config.task.prompt,
        "checkpoint": {"path": str(loaded.path), "step": loaded.step, "averaged_weights": loaded.averaged},
        "data": {
            "split": args.split or None,
            "shards": [str(shard.path) for shard in heldout.items.index.shards],
            "manifest": heldout.items.index.manifest["hash"],
            "items": heldout.items.first(args.max_images),
            "max_images": args.max_images,
            "lacking_left_out": heldout.items.lacking,
            "broken_left_out": len(heldout.broken),
            "image_size": config.model.image_size,
        },
        "tokenizer": {"sha256": loaded.tokenizer.sha, "pieces": loaded.tokenizer.vocab_size},
        "precision": args.precision,
        "device": args.device,
        "seed": config.seed,
        "versions": versions(*SCORERS),
        "command": shlex.join(["python", "-m", "train.evaluate", *given]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
