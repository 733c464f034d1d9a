"""`python -m train.generate` for fine-tuned checkpoints: captions, and answers to `--question`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace

import torch

from dataload.broken import BrokenSample
from dataload.images import normalize
from dataload.views import squashed_view
from train.checkpoint import LoadedModel
from train.config import ConfigError
from train.generate.writing import SAMPLING, one_line, typed
from train.machine import choose_device
from train.tasks.captioning import caption
from train.tasks.config import FinetuneConfig
from train.tasks.vqa import longest_answer, prompt_tokens, write

BEAMS = 4  # of --method beam where neither the command nor the task says how many


@torch.no_grad()
def tell(loaded: LoadedModel, args: argparse.Namespace) -> int:
    """A caption of each picture, or the answer to the question about it. Returns 0; 1 when one could not be read. Raises
    ConfigError where the checkpoint was fine-tuned for something else."""
    config = loaded.config
    kind = config.task.kind if isinstance(config, FinetuneConfig) else "pre-training"
    wanted = "vqa" if args.question else "captioning"
    if not isinstance(config, FinetuneConfig) or kind != wanted:
        raise ConfigError(
            f"{loaded.path} is of {kind}; "
            + (
                "--question needs one of python -m train.finetune vqa"
                if args.question
                else "it answers a --question"
                if kind == "vqa"
                else "captions need a pre-trained one, or one of python -m train.finetune captioning"
            )
        )
    config = as_asked(config, args, loaded)
    longest = None if args.max_length is None else args.max_length - 1
    device = choose_device(args.device)
    failed = False
    for path in args.images:
        try:
            view = squashed_view(path.read_bytes(), config.model.image_size, config.data.interpolation)
        except (OSError, BrokenSample) as error:
            failed = True
            reason = (
                f"not a picture that can be read ({error})"
                if isinstance(error, BrokenSample)
                else error.strerror
            )
            print(f"{path}: {reason}", file=sys.stderr, flush=True)
            if args.json:
                print(json.dumps({"image": str(path), "error": str(reason)}), flush=True)
            continue
        images = normalize(torch.from_numpy(view.pixels)[None].to(device))
        text = (
            _answer(loaded, config, images, args.question, longest)
            if args.question
            else _caption(loaded, config, images, longest)
        )
        if args.json:
            said = {"question": args.question, "answer": text} if args.question else {"captions": [text]}
            print(json.dumps({"image": str(path), **said}), flush=True)
        else:
            print(f"{path}: {one_line(text)}", flush=True)
    return 1 if failed else 0


def as_asked(config: FinetuneConfig, args: argparse.Namespace, loaded: LoadedModel) -> FinetuneConfig:
    """The task as the options want it to write; what they leave open is as it was scored. Raises ConfigError for an option
    that would change nothing."""
    task = config.task
    given = {
        name: getattr(args, name) for name in ("method", "beams", "length_penalty", "max_length", *SAMPLING)
    }
    given["num"] = args.num if args.num > 1 else None
    chosen = task.kind == "vqa" and task.head == "chosen"
    for name, value in given.items():
        if value is not None and (chosen or name in (*SAMPLING, "num") or value == "sample"):
            why = (
                f"{loaded.path} chooses its answer among {len(task.classes)}, it writes none"
                if chosen
                else "a fine-tuned model writes by greedy or beam search"
            )
            raise ConfigError(f"{typed(args, name)}: {why}")
    if chosen:
        return config
    beams = task.beams if args.beams is None else args.beams
    if args.method == "greedy":
        if args.beams not in (None, 1):
            raise ConfigError(f"--beams {args.beams} needs --method beam; --method greedy keeps one")
        beams = 1
    elif args.method == "beam" and args.beams is None and beams == 1:
        beams = BEAMS
    if args.length_penalty is not None and beams == 1:
        raise ConfigError("--length-penalty is of the beam search, and one beam is greedy; add --method beam")
    most = (
        config.model.text_length
        if task.kind == "captioning"
        else longest_answer(config.model.text_length) + 1
    )
    if args.max_length is not None and not 3 <= args.max_length <= most:
        raise ConfigError(
            f"--max-length must be from 3 to {most}, what the model was made for; got {args.max_length}"
        )
    penalty = task.length_penalty if args.length_penalty is None else args.length_penalty
    return replace(config, task=replace(task, beams=beams, length_penalty=penalty))


def _caption(loaded: LoadedModel, config: FinetuneConfig, images: torch.Tensor, longest: int | None) -> str:
    return caption(loaded.model.base, images, config, loaded.tokenizer, longest)[0]


def _answer(
    loaded: LoadedModel, config: FinetuneConfig, images: torch.Tensor, question: str, longest: int | None
) -> str:
    tokens = prompt_tokens(question, config, loaded.tokenizer).to(images.device)
    if config.task.head == "chosen":
        return config.task.classes[int(loaded.model.answers(images, tokens).argmax())]
    base = loaded.model.base
    return write(base, base.image_memory(images), tokens, config, loaded.tokenizer, longest)[0]
