"""A trained model for use elsewhere: `python -m train.export RUN --output DIR`.

    python -m train.export runs/NAME --output exported                    the newest checkpoint's weights, averaged where kept
    python -m train.export runs/NAME --output exported --program torch onnx       and its encoder as programs
    python -m train.export runs/NAME/checkpoints/step-000100 --output exported --dtype bf16 --raw

writes into DIR

    model.safetensors   every tensor whole, however many ranks wrote the checkpoint and under which engine; LoRA merged
    config.json         the configuration
    tokenizer.model
    README.md           a model card: what it is, what it was trained on, the scores that stand beside the checkpoint
    state.json          checksums
    encoder.pt2         --program torch: the encoder of pictures as torch.export's program, which torch.export.load reads
    encoder.onnx        --program onnx: the same for ONNX (pip install 'auroraio[onnx]')

models.load_pretrained, train.evaluate, train.generate and train.finetune --checkpoint read DIR as they read a run. A program
takes normalised images [B, 3, S, S], any number of them, and gives embedding [B, E] and what lies under it (Aurora: map4 to
map32; PerceiverIO: latents); it is run beside the model and must give the same numbers. Checksums of the checkpoint are
compared first; nothing is unpickled. DIR gets all of it or nothing, and must hold no run and no other export.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dataload.tokenizer import Tokenizer
from train import checkpoint
from train.checkpoint import CheckpointError, LoadedModel
from train.config import PretrainConfig
from train.directory import LOCK
from train.engines.pieces import Piece, write_pieces
from train.export.card import model_card, scores_of
from train.export.program import FORMATS, Program, check_program, export_encoder
from train.families import family_of
from train.tasks.config import FinetuneConfig

OF_A_RUN = ("checkpoints", "metrics.jsonl", LOCK)
WRITTEN = (
    "model.safetensors",
    "config.json",
    "tokenizer.model",
    "README.md",
    "state.json",
    *FORMATS.values(),
)
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
    """Write `output`/model.safetensors of the step directory `step`, with config.json, tokenizer.model and state.json: fp32
    master weights, or the moving average where there is one and `averaged` holds; floating numbers as `dtype`. Names are those
    of the model's state dict, every tensor once; LoRA's changes are added to the weights beside which they stand.

    Raises CheckpointError for a damaged checkpoint, OSError where the disk refuses.
    """
    state, config = checkpoint.verify(step), checkpoint.read_config(step)
    weights = checkpoint.stored(step, "model", state)
    ema = checkpoint.stored(step, "ema", state) if averaged else {}
    was_averaged = len(ema) > 0 or bool(state.get("averaged"))
    pieces = {}
    for name in weights:
        if ".lora_" not in name:
            tensor = _merged(name, weights, ema, config)
            plain = name.replace(".base_layer.", ".")
            pieces[plain] = Piece.of(tensor.to(dtype) if tensor.is_floating_point() else tensor)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "model.safetensors"
    digest = write_pieces(file, pieces)
    if isinstance(config, FinetuneConfig):
        config = replace(config, tune=replace(config.tune, lora_rank=0))
    checkpoint.write_config(output / "config.json", config)
    shutil.copyfile(step / "tokenizer.model", output / "tokenizer.model")
    sums = {name: checkpoint.sha256(output / name) for name in ("config.json", "tokenizer.model")}
    checkpoint.write_state(
        output,
        {
            "format": checkpoint.FORMAT,
            "exported": True,
            "step": state["step"],
            "averaged": was_averaged,
            "torch": torch.__version__,
            "sha256": {"model.safetensors": digest, **sums},
        },
    )
    numbers = sum(piece.values.numel() for piece in pieces.values())
    return Exported(file, state["step"], was_averaged, len(pieces), numbers, digest)


def refuse_to_mix(output: Path) -> None:
    """Raises CheckpointError where `output` holds a run, a checkpoint with an optimizer's state, or an export or a part of one:
    programs and scores of the former would stand beside the new weights, and a run would be taken for an export."""
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} is a file; --output is a directory")
    if (output / "state.json").is_file():
        try:
            exported = json.loads((output / "state.json").read_text()).get("exported")
        except (ValueError, AttributeError):
            exported = False
        if not exported:
            raise CheckpointError(f"{output} is a checkpoint of a run; choose another --output")
    for folder in output.resolve().parents:
        if (folder / "state.json").is_file():
            raise CheckpointError(
                f"{output} lies in {folder}, a checkpoint or an export; choose another --output"
            )
    if any((output / name).exists() for name in OF_A_RUN) or checkpoint.step_directories(output):
        raise CheckpointError(f"{output} is a run's directory; choose another --output")
    if found := [name for name in WRITTEN if (output / name).exists()]:
        raise CheckpointError(
            f"{output} holds an export already, or other files of its names ({', '.join(found)}): remove them, or choose "
            "another --output"
        )


@contextmanager
def at_once(output: Path) -> Iterator[Path]:
    """A folder of its own to write into, whose files go to `output` when all is done, state.json last. Of what fails, or is
    stopped, nothing stays. Raises CheckpointError where `output` has got an export meanwhile."""
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    output.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=output))
    moved: list[Path] = []
    try:
        yield work
        refuse_to_mix(output)
        for path in sorted(work.iterdir(), key=lambda path: path.name == "state.json"):
            moved.append(output / path.name)
            path.replace(moved[-1])
        made = []
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # something is in it by now
                folder.rmdir()


def _merged(
    name: str, weights: Mapping[str, Tensor], ema: Mapping[str, Tensor], config: PretrainConfig
) -> Tensor:
    """A tensor, its average where there is one; W + (alpha / rank) B A of a layer with LoRA (models/lora.py)."""

    def of(name: str) -> Tensor:
        return (ema if name in ema else weights)[name]

    layer = re.fullmatch(r"(.+)\.base_layer\.weight", name)
    if layer is None:
        return of(name)
    assert isinstance(config, FinetuneConfig)
    up, down = (of(f"{layer[1]}.lora_{side}.default.weight") for side in "BA")
    return of(name) + (config.tune.lora_alpha / config.tune.lora_rank) * (up @ down)


def described(output: Path) -> LoadedModel:
    """An exported model without its weights, for the card."""
    state, config = checkpoint.verify(output), checkpoint.read_config(output)
    with torch.device("meta"):
        model = family_of(config).model(config)
    tokenizer = Tokenizer.load(output / "tokenizer.model")
    return LoadedModel(model, tokenizer, config, state["step"], output, state["averaged"])


def write_card(loaded: LoadedModel, step: Path, output: Path, programs: Sequence[Program] = ()) -> Path:
    """`output`/README.md, with the scores that lie beside the checkpoint `step`. Raises OSError."""
    lines = [
        f"`{one.path.name}` is the encoder of pictures as a program; its outputs differ from the model's by "
        f"{one.difference:.1e} at most, in shares of the largest."
        for one in programs
    ]
    path = output / "README.md"
    path.write_text(model_card(loaded, scores_of(step), lines), encoding="utf-8")
    return path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    one = argparse.ArgumentParser(
        prog="python -m train.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument(
        "run", type=Path, nargs="?",
        help="a run (its newest intact checkpoint), one step directory, or an exported folder",
    )  # fmt: skip
    one.add_argument("--checkpoint", type=Path, help="the same by name, as the other commands take it")
    one.add_argument("--output", type=Path, required=True, help="directory to write into")
    one.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32)")
    one.add_argument(
        "--raw", action="store_true", help="the weights themselves where a moving average is kept too"
    )
    one.add_argument(
        "--program", nargs="+", choices=FORMATS, default=[],
        help="also write the encoder of pictures as a program, in fp32; onnx needs the extra of that name",
    )  # fmt: skip
    return one


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 2 there is nothing to export, it is damaged, or a program cannot be made of it."""
    options = parser()
    args = options.parse_args(argv)
    if (args.run is None) == (args.checkpoint is None):
        options.error("one run or checkpoint is needed: python -m train.export RUN --output DIR")
    try:
        run = args.run or args.checkpoint
        step = checkpoint.newest_intact(run, lambda said: print(said, file=sys.stderr))
        if step is None:
            raise FileNotFoundError(
                f"{run} has no finished checkpoint; give a run (runs/NAME) or one of its step directories"
            )
        check_program(args.program, checkpoint.read_config(step))
        refuse_to_mix(args.output)
        with at_once(args.output) as folder:
            done = consolidate(step, folder, averaged=not args.raw, dtype=DTYPES[args.dtype])
            loaded = checkpoint.load_model(folder) if args.program else described(folder)
            programs = export_encoder(loaded, folder, args.program) if args.program else []
            card = write_card(loaded, step, folder, programs)
    except (CheckpointError, ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    kind = "averaged weights" if done.averaged else "weights"
    what = f"{kind} of step {done.step}, {done.tensors:,} tensors, {done.numbers:,} numbers, {args.dtype}"
    print(f"{args.output / done.file.name}: {what}")
    print(f"sha256 {done.sha256}")
    for one in programs:
        print(f"{args.output / one.path.name}: the model's numbers within {one.difference:.1e}")
    print(f"{args.output / card.name}: the model card; load_pretrained({str(args.output)!r}) uses the model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
