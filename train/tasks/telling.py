"""`python -m train.generate` for fine-tuned checkpoints: captions, and answers to `--question`."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from dataload.broken import BrokenSample
from dataload.images import normalize
from dataload.views import squashed_view
from train.checkpoint import LoadedModel
from train.config import ConfigError
from train.generate import one_line
from train.machine import choose_device
from train.tasks.captioning import caption
from train.tasks.config import FinetuneConfig
from train.tasks.vqa import prompt_tokens, write


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
    if args.method == "sample":
        raise ConfigError("--method sample: a fine-tuned model writes by greedy or beam search")
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
            _answer(loaded, config, images, args.question)
            if args.question
            else _caption(loaded, config, images)
        )
        if args.json:
            said = {"question": args.question, "answer": text} if args.question else {"captions": [text]}
            print(json.dumps({"image": str(path), **said}), flush=True)
        else:
            print(f"{path}: {one_line(text)}", flush=True)
    return 1 if failed else 0


def _caption(loaded: LoadedModel, config: FinetuneConfig, images: torch.Tensor) -> str:
    return caption(loaded.model.base, images, config, loaded.tokenizer)[0]


def _answer(loaded: LoadedModel, config: FinetuneConfig, images: torch.Tensor, question: str) -> str:
    tokens = prompt_tokens(question, config, loaded.tokenizer).to(images.device)
    if config.task.head == "chosen":
        return config.task.classes[int(loaded.model.answers(images, tokens).argmax())]
    base = loaded.model.base
    return write(base, base.memory(base.encode_image(images)), tokens, config, loaded.tokenizer)[0]
