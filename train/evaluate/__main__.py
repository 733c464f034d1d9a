"""Scores of a checkpoint on held-out pictures: `python -m train.evaluate TASK --checkpoint C --data SHARDS`.

    python -m train.evaluate retrieval  --checkpoint runs/NAME --data shards/ --split test
    python -m train.evaluate perplexity --checkpoint runs/NAME --data "shards/val-*.tar"
    python -m train.evaluate captioning|vqa|detection|segmentation|audio --checkpoint runs/FINE-TUNED

Every score is printed beside what chance, word frequencies or shuffled pictures give, and written as JSON
together with what is needed to repeat it. The measuring itself is train/evaluate/measure.py.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dataload import shards
from dataload.multimodal import PAIRS
from dataload.pipeline import EvalSet
from dataload.squares import VIEWS
from train.checkpoint import LoadedModel, load_model
from train.data import Sources, find_sources
from train.engine import Ranks
from train.evaluate.measure import evaluate_model, unigram_counts
from train.evaluate.request import check_request, choose_split, views_of
from train.evaluate.result import EvalResult, Score, output_for
from train.machine import choose_device, choose_precision, versions
from train.multimodal.config import PerceiverPretrainConfig
from train.tasks.config import FinetuneConfig
from train.tasks.evaluating import add_parsers, evaluate_checkpoint, is_matcher

__all__ = ["EvalResult", "Score", "evaluate_model", "main", "unigram_counts"]

TASKS = {
    "retrieval": "recall at 1, 5, 10 and median rank, picture to caption and back",
    "perplexity": "masked-word perplexity of the captions",
}


def parser() -> argparse.ArgumentParser:
    """One subcommand per task; all share their options."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        help="a run (its newest checkpoint) or one checkpoint directory",
    )
    shared.add_argument(
        "--data", nargs="+", default=[], metavar="SHARDS",
        help="tar shards: files, a folder, globs, ranges (default: the run's own held-out shards)",
    )  # fmt: skip
    shared.add_argument(
        "--pairs", choices=tuple(PAIRS),
        help="of a model of several modalities: what to score (default: all that the run held out; of --data: what it holds)",
    )  # fmt: skip
    shared.add_argument("--split", default="", help="only the shards named SPLIT-*.tar")
    shared.add_argument(
        "--output",
        type=Path,
        help="JSON file to write (default: TASK.json in the checkpoint directory, TASK-2.json ... for other data)",
    )
    shared.add_argument(
        "--max-images", type=int, help="score the first N pictures (or sounds) only (default: all)"
    )
    shared.add_argument(
        "--captions",
        choices=("all", "first"),
        default="all",
        help="captions per picture in the pool (default: all)",
    )
    shared.add_argument("--batch-size", type=int, default=64, help="pictures per forward pass (default: 64)")
    shared.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    shared.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    shared.add_argument(
        "--seed", type=int, help="of masks and shuffles (default: 0; of a fine-tuned checkpoint its run's)"
    )
    main_parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description=(__doc__ or "").split("\n")[0]
    )
    tasks = main_parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, text in TASKS.items():
        task = tasks.add_parser(name, parents=[shared], help=text, description=f"{name}: {text}")
        if name == "retrieval":
            task.add_argument(
                "--views", type=int, choices=tuple(VIEWS),
                help="views of each picture whose embeddings are averaged (default: eval_views of the run)",
            )  # fmt: skip
        if name == "perplexity":
            task.add_argument(
                "--unigram-from", nargs="+", default=[], metavar="SHARDS",
                help="captions for the word-frequency baseline (default: the run's training shards)",
            )  # fmt: skip
    add_parsers(tasks, shared)
    return main_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one task. Returns 0, or 2 with one sentence on stderr when something is missing or does not fit."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = parser().parse_args(given)
    try:
        if args.task not in TASKS or is_matcher(args):
            return evaluate_checkpoint(args, given)
        if not Ranks.from_environment().first:
            return 0  # a pre-trained model is scored, and the file written, by rank 0 alone
        args.seed = args.seed or 0
        loaded = load_model(args.checkpoint)
        output = args.output or loaded.path / f"{args.task}.json"
        _check(args, loaded, output)
        if isinstance(loaded.config, PerceiverPretrainConfig):
            from train.evaluate.media import evaluate_pairs  # it is built on this module

            return evaluate_pairs(args, loaded, output, given)
        if args.pairs not in (None, "image-text"):
            raise ValueError(f"{loaded.path} is a model of pictures: --pairs {args.pairs} is not for it")
        model, paths = loaded.config.model, heldout_shards(args, loaded)
        names = [str(path) for path in paths]
        eval_set = EvalSet(
            names, loaded.tokenizer, model.image_size, model.text_length, batch_size=args.batch_size
        )
        training = training_shards(args, loaded) if args.task == "perplexity" else []
        result = score(args, loaded, eval_set, training)
    except (
        OSError,
        ValueError,
        ImportError,
    ) as error:  # CheckpointError, ConfigError and BrokenShard are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        return 2
    for broken in eval_set.broken:
        print(f"left out, cannot be read: {broken}", file=sys.stderr)
    record = describe(args, loaded, eval_set, result)
    output = args.output or output_for(loaded.path, args.task, record["data"])
    record["data"]["shards"], record["unigram_from"] = names, [str(path) for path in training]
    record["command"] = shlex.join(["python", "-m", "train.evaluate", *given])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    step = f"step {loaded.step}{', averaged weights' if loaded.averaged else ''}"
    counts = f"{result.counts['images']:,} pictures, {result.counts['captions']:,} captions"
    print(f"{args.task} of {loaded.path} ({step}) on {counts}")
    print("\n".join(result.lines()))
    print(f"written to {output}")
    return 0


def _check(args: argparse.Namespace, loaded: LoadedModel, output: Path) -> None:
    """Whatever can be refused before time is spent. Raises ValueError or OSError."""
    if isinstance(loaded.config, FinetuneConfig):
        start = loaded.config.checkpoint
        others = [f"that of {start}, which it started from"] if start else []
        if args.task == "retrieval":
            others.append(f"one of python -m train.finetune retrieval --checkpoint {loaded.path}")
        raise ValueError(
            f"{loaded.path} is fine-tuned for {loaded.config.task.kind}; {args.task} is scored of a pre-trained model"
            + (f": take {', or '.join(others)}" if others else "")
        )
    if loaded.tokenizer.vocab_size > loaded.config.model.vocabulary:
        raise ValueError(
            f"tokenizer mismatch: the tokenizer in {loaded.path} has {loaded.tokenizer.vocab_size} pieces, "
            f"the model only {loaded.config.model.vocabulary}"
        )
    if args.task == "perplexity" and not loaded.config.objectives.mlm:
        raise ValueError(
            f"{loaded.path} was trained without masked language modelling (objectives.mlm is 0), so its perplexity "
            "says nothing"
        )
    check_request(args, output)


def heldout_shards(args: argparse.Namespace, loaded: LoadedModel) -> list[shards.Address]:
    """The shards to score on. Raises OSError or ValueError for none, or for several splits."""
    data = loaded.config.data
    if args.data or data.heldout:
        paths = shards.expand(args.data or data.heldout)
    elif data.train:
        raise ValueError(f"{loaded.path} was trained without held-out shards; name some with --data")
    else:
        paths = list(_builtin(loaded, lambda line: print(line, file=sys.stderr)).heldout)
    return choose_split(paths, args.split, any(Path(d).expanduser().is_dir() for d in args.data))


def training_shards(args: argparse.Namespace, loaded: LoadedModel) -> list[shards.Address]:
    """The shards that give the word frequencies; none, and a line that says so, where the run's are gone."""
    data = loaded.config.data
    if args.unigram_from:
        return shards.expand(args.unigram_from)
    if not data.train:
        return list(_builtin(loaded, lambda line: None).train)
    try:
        return shards.expand(data.train)
    except FileNotFoundError as error:
        print(f"no word-frequency baseline ({error}); give --unigram-from", file=sys.stderr)
        return []


def _builtin(loaded: LoadedModel, say: Callable[[str], None]) -> Sources:
    config = loaded.config
    return find_sources(config.data, config.model.image_size, say)


def score(
    args: argparse.Namespace, loaded: LoadedModel, eval_set: EvalSet, training: list[shards.Address]
) -> EvalResult:
    """The measuring, with what the options ask for."""
    device = choose_device(args.device)
    return evaluate_model(
        loaded.model.to(device),
        eval_set,
        loaded.tokenizer,
        device=device,
        autocast=choose_precision(args.precision, device).autocast,
        max_images=args.max_images,
        tasks=(args.task,),
        unigram=unigram_counts(training, loaded.tokenizer) if training else None,
        captions=args.captions,
        views=views_of(args, loaded),
        seed=args.seed,
    )


def describe(
    args: argparse.Namespace, loaded: LoadedModel, eval_set: EvalSet, result: EvalResult
) -> dict[str, Any]:
    """The JSON record: scores with their baselines, and what is needed to measure them again."""
    return {
        "task": args.task,
        **result.to_json(),
        "captions_per_image": args.captions,
        "checkpoint": {"path": str(loaded.path), "step": loaded.step, "averaged_weights": loaded.averaged},
        "data": {
            "split": args.split or None,
            "max_images": args.max_images,
            **({"views": views_of(args, loaded)} if args.task == "retrieval" else {}),
            "manifest": eval_set.index.manifest["hash"],
            "image_size": loaded.config.model.image_size,
            "text_length": loaded.config.model.text_length,
            "uncaptioned_left_out": eval_set.uncaptioned,
            "broken_left_out": len(eval_set.broken),
        },
        "tokenizer": {"sha256": loaded.tokenizer.sha, "pieces": loaded.tokenizer.vocab_size},
        "precision": args.precision,
        "device": args.device,
        "seed": args.seed,
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    sys.exit(main())
