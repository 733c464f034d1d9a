"""Fine-tune a checkpoint on a task: `python -m train.finetune TASK --checkpoint C [--field value ...]` (--help explains all).

    python -m train.finetune detection --checkpoint runs/aurora-tiny                  # the built-in corpus
    python -m train.finetune captioning --checkpoint runs/aurora-tiny --data.train "shards/train-*.tar" \\
        --data.heldout "shards/val-*.tar"
    python -m train.finetune vqa --checkpoint runs/aurora-tiny --tune.lora-rank 8     # LoRA; of PerceiverIO too
    python -m train.finetune audio                          # the built-in sounds; without --checkpoint a new model
    torchrun --nproc-per-node 8 -m train.finetune ...                                 # several GPUs, or CPU processes

The loop, engines, checkpoints and `--resume auto` are those of train/pretrain.py; tasks are in train/tasks/.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import torch
import tyro

from dataload.pipeline import TooManyBroken, WorkerStuck
from dataload.sandbox import SandboxError
from train.checkpoint import CheckpointError, read_config
from train.config import ConfigError, PretrainConfig, problems, to_dict
from train.dryrun import say_where
from train.engine import Ranks
from train.engines.choice import engine_problems
from train.machine import choose_device, choose_precision
from train.multimodal.presets import perceiver_sounds
from train.pretrain import TrainingError, pretrain
from train.tasks.config import FinetuneConfig
from train.tasks.data import find_items, find_task_sources, find_tokenizer, open_task
from train.tasks.presets import at_size, task_preset
from train.tasks.registry import TASKS, task_of
from train.tasks.running import greet_task
from train.tasks.tuning import prepare

PROG = "python -m train.finetune"


def parse(argv: Sequence[str]) -> FinetuneConfig:
    """The resolved configuration, but for the data's classes. --help and mistakes in options exit as argparse does. Raises
    ConfigError or CheckpointError."""
    args = list(argv)
    names = "\n".join(f"  {name:14}{text}" for name, text in TASKS.items())
    if not args or args[0] not in TASKS:
        if args and args[0] in ("-h", "--help"):
            print(f"usage: {PROG} TASK --checkpoint C [--field value ...]\n\n{__doc__}\ntasks:\n{names}")
            raise SystemExit(0)
        given = f"no task is called {args[0]!r}" if args else "no task was given"
        raise ConfigError(f"{given}; {PROG} TASK --checkpoint C, with one of these tasks:\n{names}")
    kind = args.pop(0)
    start = _start(kind, args)
    default = task_preset(kind, start)
    config = tyro.cli(type(default), default=default, args=args, prog=f"{PROG} {kind}", description=__doc__)
    if config.model.image_size != start.model.image_size and config.family == "Aurora":
        sized = at_size(replace(config.model, image_size=start.model.image_size), config.model.image_size)
        config = replace(config, model=sized)
    return config


def _start(kind: str, args: Sequence[str]) -> PretrainConfig:
    """The configuration of the checkpoint that the arguments name; of a new model where sounds are learned without one."""
    path = ""
    for word, after in zip(args, [*args[1:], ""], strict=True):
        if word == "--checkpoint":
            path = after
        elif word.startswith("--checkpoint="):
            path = word.split("=", 1)[1]
    if not path and kind == "audio":
        return perceiver_sounds()
    if not path and ("--help" in args or "-h" in args):
        return PretrainConfig()
    return read_config(find_tokenizer(path).parent)


def completed(config: FinetuneConfig) -> FinetuneConfig:
    """The configuration with the classes of its training data, and without a tokenizer that is the checkpoint's own: its words
    need no new embeddings. Raises what reading the data raises."""
    task = task_of(config.task.kind)
    sources = find_task_sources(config, lambda line: None)
    if sources.heldout and (plan := getattr(task, "plan", None)):
        plan()  # an ImportError here, before any compute, not at the first evaluation
    if config.data.tokenizer and config.checkpoint:
        own = find_tokenizer(config.checkpoint)
        if own.read_bytes() == sources.tokenizer.read_bytes():
            config = replace(config, data=replace(config.data, tokenizer=""))
    items = find_items(task, sources.train, config, training=True)
    return replace(config, task=task.complete(config.task, items))


def dry_run(config: FinetuneConfig) -> int:
    """Print the resolved run and the lines that it would begin with. Raises ConfigError and others as the run would."""
    ranks = Ranks.from_environment()
    if found := problems(config, ranks.size) + engine_problems(config, ranks.size):
        raise ConfigError("\n  ".join(["this run cannot start:", *found]))
    if not ranks.first:
        return 0
    print(json.dumps(to_dict(config), indent=2))
    out, device, task = say_where(config), choose_device(config.device), task_of(config.task.kind)
    with torch.device("meta"):
        prepare(task.model(config), config.tune, task.fresh)
    with tempfile.TemporaryDirectory() as nowhere:
        sources = find_task_sources(config, lambda line: None)
        data = open_task(replace(config, out=nowhere), sources, ranks.rank, ranks.size)
        try:
            lines = greet_task(config, device, choose_precision(config.precision, device), ranks, data, out)
        finally:
            data.loader.close()
    print(*lines, "dry run: no problem found, nothing was run", sep="\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes as train.pretrain's."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        config = completed(parse(args))
        if config.dry_run:
            return dry_run(config)
        return pretrain(config, args)
    except (ConfigError, CheckpointError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ValueError as error:  # data that lacks what the task needs
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingError, TooManyBroken, WorkerStuck, SandboxError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted before the first step; nothing to save", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
