"""The command line of `python -m train.pretrain`: [PRESET] [--field value ...]."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from train.config import PretrainConfig
from train.presets import DEFAULT, listing, preset

PROG = "python -m train.pretrain"
DESCRIPTION = f"""Pre-train Aurora on images and captions, or PerceiverIO on images, videos and sounds with captions.

{PROG} [PRESET] [--field value ...]

PRESET comes first (default: {DEFAULT}); the fields below show its values and override them:
{listing()}

Examples:
  {PROG}                       the built-in corpus, about two minutes on 2 CPU cores
  {PROG} aurora-small --data.train shards/train-*.tar --data.heldout shards/val-*.tar \\
      --data.tokenizer tokenizer.model
  {PROG} perceiver-tiny        the built-in corpus with sounds and clips, about three minutes
  {PROG} aurora-tiny --resume auto
  torchrun --nproc-per-node 8 -m train.pretrain aurora-base ..."""


def parse(argv: Sequence[str]) -> PretrainConfig | None:
    """The resolved configuration; None after --list-presets. --help and mistakes in options exit as argparse
    does.

    Raises ConfigError for an unknown preset.
    """
    args = [
        word for word in argv if not word.startswith(("--local_rank=", "--local-rank="))
    ]  # the deepspeed launcher's
    if "--list-presets" in args:
        print(listing())
        return None
    name = args.pop(0) if args and not args[0].startswith("-") else DEFAULT
    default = preset(name)
    return tyro.cli(
        type(default), default=default, args=args, prog=f"{PROG} [PRESET]", description=DESCRIPTION
    )
