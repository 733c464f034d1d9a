"""`python -m train.evaluate` for PerceiverIO: the held-out pairs of each kind, pictures, videos or sounds with captions."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dataload import shards
from dataload.multimodal import PairSet
from train.checkpoint import LoadedModel
from train.evaluate.measure import unigram_counts
from train.evaluate.pairs import NAMES, score_pairs
from train.evaluate.request import choose_split, views_of
from train.evaluate.result import EvalResult, output_for
from train.machine import choose_device, choose_precision, versions
from train.multimodal.config import CONTRASTS, PerceiverPretrainConfig
from train.multimodal.data import PairSources, evaluation_sets, find_pairs

Addresses = Mapping[str, Sequence[shards.Address]]


def evaluate_pairs(
    args: argparse.Namespace, loaded: LoadedModel, output: Path, command: Sequence[str]
) -> int:
    """Score, write and say. Raises OSError or ValueError where something is missing or does not fit."""
    config = config_of(loaded)
    heldout = heldout_pairs(args, loaded)
    for kind in heldout:
        if args.task == "retrieval" and not config.objectives.weights()[CONTRASTS[kind]]:
            raise ValueError(
                f"{loaded.path} was trained without the contrast of {kind} (objectives.{CONTRASTS[kind]} is 0), so its "
                "retrieval says nothing"
            )
    if (args.task == "retrieval" and args.views or 1) > 1 and "image-text" not in heldout:
        raise ValueError(f"--views {args.views} is for pictures; scored are {' and '.join(heldout)}")
    sets = evaluation_sets(config, heldout, loaded.tokenizer, args.batch_size)
    training = training_pairs(args, loaded, list(heldout)) if args.task == "perplexity" else {}
    device = choose_device(args.device)
    result = score_pairs(
        loaded.model.to(device),
        sets,
        loaded.tokenizer,
        device=device,
        autocast=choose_precision(args.precision, device).autocast,
        most=args.max_images,
        tasks=(args.task,),
        unigram={
            kind: unigram_counts(list(paths), loaded.tokenizer) for kind, paths in training.items() if paths
        },
        captions=args.captions,
        views=views_of(args, loaded),
        blind_mlm=config.objectives.blind_mlm,
        seed=args.seed,
    )
    for pairs in sets.values():
        for broken in pairs.broken:
            print(f"left out, cannot be read: {broken}", file=sys.stderr)
    record = describe(args, loaded, sets, result)
    record["data"]["shards"] = {kind: [str(path) for path in paths] for kind, paths in heldout.items()}
    output = args.output or output_for(loaded.path, args.task, record["data"])
    record["unigram_from"] = {kind: [str(path) for path in paths] for kind, paths in training.items()}
    record["command"] = shlex.join(["python", "-m", "train.evaluate", *command])
    said = [
        f"{result.counts[many]:,} {many} with {result.counts[f'captions_of_{many}']:,} captions"
        for kind, (_, many) in NAMES.items()
        if kind in sets
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    step = f"step {loaded.step}{', averaged weights' if loaded.averaged else ''}"
    print(f"{args.task} of {loaded.path} ({step}) on {', '.join(said)}")
    print("\n".join(result.lines()))
    print(f"written to {output}")
    return 0


def config_of(loaded: LoadedModel) -> PerceiverPretrainConfig:
    """What the checkpoint's run was."""
    assert isinstance(loaded.config, PerceiverPretrainConfig)
    return loaded.config


def heldout_pairs(args: argparse.Namespace, loaded: LoadedModel) -> dict[str, Sequence[shards.Address]]:
    """The shards to score on, by the kind of pair: those named, of the kind that --pairs says; or the run's own."""
    data = config_of(loaded).data
    if args.data:
        paths = shards.expand(args.data)
        folder = any(Path(d).expanduser().is_dir() for d in args.data)
        kind = args.pairs or _kind_of(paths)
        return {kind: choose_split(paths, args.split, folder)}
    if any(pair.train for pair in data.pairs().values()):
        found: dict[str, Sequence[shards.Address]] = {
            kind: shards.expand(pair.heldout) for kind, pair in data.pairs().items() if pair.heldout
        }
        if not found:
            raise ValueError(f"{loaded.path} was trained without held-out shards; name some with --data")
    else:
        found = dict(_builtin(loaded).heldout)
    if args.pairs:
        if args.pairs not in found:
            raise ValueError(f"{loaded.path} has no held-out shards of {args.pairs}; name some with --data")
        found = {args.pairs: found[args.pairs]}
    return {kind: choose_split(list(paths), args.split, False) for kind, paths in found.items()}


def _kind_of(paths: Sequence[shards.Address]) -> str:
    """What the shards hold. Raises ValueError where that is not one modality."""
    index = shards.index(paths)
    has = [kind for kind, (modality, _) in NAMES.items() if index.has(modality).any()]
    if len(has) != 1:
        raise ValueError(
            f"these shards hold samples for {' and '.join(has) or 'no kind of pair'}; say which with "
            f"--pairs {{{','.join(NAMES)}}}"
        )
    return has[0]


def training_pairs(args: argparse.Namespace, loaded: LoadedModel, kinds: Sequence[str]) -> Addresses:
    """The shards that give the word frequencies of each kind; none, and a line that says so, where the run's are gone."""
    data = config_of(loaded).data
    if args.unigram_from:
        return dict.fromkeys(kinds, shards.expand(args.unigram_from))
    if not any(pair.train for pair in data.pairs().values()):
        return {kind: _builtin(loaded).train[kind] for kind in kinds}
    found = {}
    for kind in kinds:
        try:
            found[kind] = shards.expand(data.pairs()[kind].train)
        except (FileNotFoundError, ValueError) as error:
            print(f"no word-frequency baseline of {kind} ({error}); give --unigram-from", file=sys.stderr)
    return found


def _builtin(loaded: LoadedModel) -> PairSources:
    config = config_of(loaded)
    return find_pairs(config.data, config.model.image_size, lambda line: print(line, file=sys.stderr))


def describe(
    args: argparse.Namespace, loaded: LoadedModel, sets: Mapping[str, PairSet], result: EvalResult
) -> dict[str, Any]:
    """The JSON record: scores with their baselines, and what is needed to measure them again."""
    config = config_of(loaded)
    model = config.model
    return {
        "task": args.task,
        **result.to_json(),
        "captions_per_sample": args.captions,
        "checkpoint": {"path": str(loaded.path), "step": loaded.step, "averaged_weights": loaded.averaged},
        "data": {
            "split": args.split or None,
            "max_images": args.max_images,
            **(
                {"views": views_of(args, loaded)} if args.task == "retrieval" and "image-text" in sets else {}
            ),
            "manifest": {kind: pairs.manifest for kind, pairs in sets.items()},
            "image_size": model.image_size,
            "audio_seconds": model.audio_seconds,
            "video_frames": model.video_frames,
            "video_seconds": config.data.video_seconds,
            "text_length": model.text_length,
            "broken_left_out": {kind: len(pairs.broken) for kind, pairs in sets.items()},
        },
        "tokenizer": {"sha256": loaded.tokenizer.sha, "pieces": loaded.tokenizer.vocab_size},
        "precision": args.precision,
        "device": args.device,
        "seed": args.seed,
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
