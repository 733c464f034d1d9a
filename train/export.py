"""Weights for use elsewhere: `python -m train.export RUN --output DIR`.

    python -m train.export runs/NAME --output exported/                 the newest checkpoint's weights, averaged where kept
    python -m train.export runs/NAME/checkpoints/step-000100 --output exported/ --dtype bf16 --raw

Writes DIR/model.safetensors (every tensor whole, however many ranks wrote the checkpoint and under which engine) and
DIR/tokenizer.model. Checksums are compared first; nothing is unpickled.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from train import checkpoint
from train.checkpoint import CheckpointError
from train.pieces import Piece, write_pieces

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What `consolidate` wrote."""

    file: Path
    step: int
    averaged: bool
    tensors: int
    numbers: int
    sha256: str


def consolidate(
    step: Path, output: Path, *, averaged: bool = True, dtype: torch.dtype = torch.float32
) -> Exported:
    """Write `output`/model.safetensors of the step directory `step`: fp32 master weights, or the moving average where there is
    one and `averaged` holds; floating numbers as `dtype`. Names are those of the model's state dict, every tensor once.

    Raises CheckpointError for a damaged checkpoint, OSError where the disk refuses.
    """
    state = checkpoint.verify(step)
    weights = checkpoint.stored(step, "model", state)
    ema = checkpoint.stored(step, "ema", state) if averaged else {}
    pieces = {}
    for name in weights:
        tensor = (ema if name in ema else weights)[name]
        pieces[name] = Piece.of(tensor.to(dtype) if tensor.is_floating_point() else tensor)
    output.mkdir(parents=True, exist_ok=True)
    file, unfinished = output / "model.safetensors", output / ".model.safetensors.unfinished"
    try:
        digest = write_pieces(unfinished, pieces)
        unfinished.replace(file)
        shutil.copyfile(step / "tokenizer.model", output / "tokenizer.model")
    finally:
        unfinished.unlink(missing_ok=True)
    numbers = sum(piece.values.numel() for piece in pieces.values())
    return Exported(file, state["step"], len(ema) > 0, len(pieces), numbers, digest)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    one = argparse.ArgumentParser(
        prog="python -m train.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("run", type=Path, help="a run (its newest intact checkpoint) or one step directory")
    one.add_argument("--output", type=Path, required=True, help="directory to write into")
    one.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32)")
    one.add_argument(
        "--raw", action="store_true", help="the weights themselves where a moving average is kept too"
    )
    return one


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 2 there is nothing to export, or it is damaged."""
    args = parser().parse_args(argv)
    try:
        step = checkpoint.newest_intact(args.run, lambda said: print(said, file=sys.stderr))
        if step is None:
            raise FileNotFoundError(
                f"{args.run} has no finished checkpoint; give a run (runs/NAME) or one of its step directories"
            )
        done = consolidate(step, args.output, averaged=not args.raw, dtype=DTYPES[args.dtype])
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    kind = "averaged weights" if done.averaged else "weights"
    print(
        f"{done.file}: {kind} of step {done.step}, {done.tensors:,} tensors, {done.numbers:,} numbers, {args.dtype}"
    )
    print(f"sha256 {done.sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
