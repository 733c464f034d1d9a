"""Captions for pictures: `python -m train.generate --checkpoint C a.jpg ...` prints "a.jpg: caption". A PerceiverIO checkpoint
describes sounds and videos too.

A picture that cannot be read is named on stderr, the others are still done, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dataload.images import BrokenImage, decode, normalize, resize_center_crop
from train.checkpoint import LoadedModel, load_model
from train.generate.media import caption_media
from train.generate.writing import BEAM_SEARCH, SAMPLING, one_line, typed, write
from train.machine import choose_device
from train.multimodal.config import PerceiverPretrainConfig
from train.tasks.config import FinetuneConfig
from train.tasks.telling import tell

BATCH = 16


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="python -m train.generate", description="Print a caption for each picture."
    )
    p.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        help="a run (its newest checkpoint) or one checkpoint directory",
    )
    p.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="picture files; for PerceiverIO sounds and videos too",
    )
    p.add_argument("--question", help="ask this of each picture; the checkpoint is one of train.finetune vqa")
    p.add_argument(
        "--method",
        choices=("greedy", "beam", "sample"),
        help="default: greedy; of a fine-tuned checkpoint what it was scored with",
    )
    p.add_argument("--beams", type=int, help="beam: hypotheses kept (default: 4, or as it was scored)")
    p.add_argument(
        "--length-penalty",
        type=float,
        help="beam: above 1 favours longer captions (default: 1, or as it was scored)",
    )
    p.add_argument("--temperature", type=float, help="sample: above 1 is wilder (default: 1)")
    p.add_argument("--top-k", type=int, help="sample: among the K likeliest tokens (default: 0, all)")
    p.add_argument(
        "--top-p",
        type=float,
        help="sample: among the likeliest tokens that hold this share (default: 1)",
    )
    p.add_argument("--seed", type=int, help="sample: the same seed gives the same captions (default: 0)")
    p.add_argument("--num", type=int, default=1, help="sample: captions per picture (default: 1)")
    p.add_argument(
        "--max-length",
        type=int,
        help="most tokens of a caption or an answer, begin and end included (default: the model's)",
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    p.add_argument(
        "--json",
        action="store_true",
        help='print one JSON object a line: {"image", "captions"}, or {"image", "error"}',
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 when a picture could not be read; 2 when the checkpoint or an option does not fit."""
    args = parser().parse_args(arguments)
    failed = False
    try:
        _check(args)
        device = choose_device(args.device)
        loaded = load_model(args.checkpoint, device)
        if args.question or isinstance(loaded.config, FinetuneConfig):
            return tell(loaded, args)
        _settle(args)
        _check_objective(loaded)
        _check_length(args, loaded)
        generator = torch.Generator(device).manual_seed(args.seed)
        read = caption_files
        if isinstance(loaded.config, PerceiverPretrainConfig):
            read = caption_media
        for group in (args.images[i : i + BATCH] for i in range(0, len(args.images), BATCH)):
            for path, captions, error in read(loaded, group, args, generator):
                failed |= bool(error)
                _print(path, captions, error, args.json)
    except (OSError, ValueError) as error:  # CheckpointError and ConfigError are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


def _check(args: argparse.Namespace) -> None:
    for name, value in (("num", args.num), ("beams", args.beams)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1; got {value}")


def _refuse(args: argparse.Namespace, names: Iterable[str], method: str) -> None:
    """Options that would change nothing. Raises ValueError."""
    for name in names:
        if getattr(args, name) is not None:
            raise ValueError(f"{typed(args, name)} needs --method {method}, not {args.method or 'greedy'}")


def _settle(args: argparse.Namespace) -> None:
    """What a pre-trained model writes by where the options say nothing. Raises ValueError for one that would change nothing."""
    if args.num > 1 and args.method != "sample":
        raise ValueError(
            f"--num {args.num} needs --method sample: {args.method or 'greedy'} always gives the same caption"
        )
    if args.method != "sample":
        _refuse(args, SAMPLING, "sample")
    if args.method != "beam":
        _refuse(args, BEAM_SEARCH, "beam")
    for name, value in ({"method": "greedy"} | BEAM_SEARCH | SAMPLING).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _check_objective(loaded: LoadedModel) -> None:
    if not loaded.config.objectives.caption:
        raise ValueError(
            f"{loaded.path} was trained without captioning (objectives.caption is 0), so it has no captions to give: "
            "python -m train.finetune captioning teaches it some, python -m train.evaluate retrieval scores what it can"
        )


def _check_length(args: argparse.Namespace, loaded: LoadedModel) -> None:
    longest = loaded.config.model.text_length
    if args.max_length is not None and not 3 <= args.max_length <= longest:
        raise ValueError(
            f"--max-length must be from 3 to {longest}, what the model was made for; got {args.max_length}"
        )


def caption_files(
    loaded: LoadedModel, paths: Sequence[Path], args: argparse.Namespace, generator: torch.Generator
) -> Iterator[tuple[Path, list[str], str]]:
    """(path, captions, error) for each path, in order; one of the latter two is empty."""
    pixels: list[Tensor] = []
    errors: dict[int, str] = {}
    for i, path in enumerate(paths):
        try:
            image = decode(path.read_bytes())
        except OSError as error:
            errors[i] = error.strerror or str(error)
        except BrokenImage as error:
            errors[i] = f"not a picture that can be read ({error})"
        else:
            pixels.append(torch.tensor(resize_center_crop(image, loaded.config.model.image_size)))
    captions = iter(caption_images(loaded, torch.stack(pixels), args, generator) if pixels else [])
    for i, path in enumerate(paths):
        yield (path, [], errors[i]) if i in errors else (path, next(captions), "")


@torch.no_grad()
def caption_images(
    loaded: LoadedModel, images: Tensor, args: argparse.Namespace, generator: torch.Generator
) -> list[list[str]]:
    """`num` captions for each of images, uint8 [B, H, W, 3]."""
    memory = loaded.model.image_memory(normalize(images.to(generator.device)))
    return write(loaded, memory, args, generator)


def _print(path: Path, captions: list[str], error: str, as_json: bool) -> None:
    if error:
        print(f"{path}: {error}", file=sys.stderr, flush=True)
    if as_json:
        print(
            json.dumps(
                {"image": str(path), "error": error} if error else {"image": str(path), "captions": captions}
            ),
            flush=True,
        )
        return
    for caption in captions:
        print(f"{path}: {one_line(caption)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
