"""After the last step: scores on all held-out pictures, summary.json, report.html, and what to look at."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from models import AURORA_SIZES
from models.parameters import count_aurora, count_perceiver
from models.perceiver import PERCEIVER_SIZES
from train.evaluate.measure import unigram_counts
from train.evaluate.pairs import NAMES
from train.evaluate.result import EvalResult
from train.families import family_of
from train.greeting import negatives
from train.machine import device_name, peak_memory, versions
from train.multimodal.config import PerceiverPretrainConfig
from train.report import write_report, write_samples
from train.run import Run
from train.signals import Stop
from train.tasks.config import FinetuneConfig
from train.tasks.running import finish_task

GENERATED = 500  # held-out pictures captioned, at most
RECONSTRUCTED = 64  # held-out pictures with hidden parts restored for the report
UNIGRAM_CAPTIONS = (
    1_000_000  # above this many captioned pictures their words are not counted: it would take hours
)


def finish(run: Run, stop: Stop) -> None:
    """Score, write and say. Raises signals.Interrupted when a signal comes during the scoring. All ranks call this."""
    if isinstance(run.config, FinetuneConfig):
        return finish_task(run, stop)
    result = None
    if run.data.heldout is not None:
        several = isinstance(run.config, PerceiverPretrainConfig)
        with run.watchdog.patient("the last evaluation"), run.engine.scored_weights() as model:
            if run.ranks.first:
                result = (final_pair_scores if several else final_scores)(run, stop, model)
    if not run.ranks.first:
        return
    summary = run.out / "summary.json"
    summary.write_text(json.dumps(describe(run, result), indent=2) + "\n")
    if result:
        write_samples(result, run.out)
    report = write_report(run.out)
    run.say()
    run.say(f"checkpoint  {run.saved}")
    run.say(f"scores      {summary}")
    run.say(f"curves      {run.out / 'metrics.jsonl'}, or: tensorboard --logdir {run.out / 'tensorboard'}")
    run.say(f"report      {report} (open it in a browser)")


def final_scores(run: Run, stop: Stop, model: Any) -> EvalResult:
    """Everything at once, on all held-out pictures."""
    sources, counts = run.data.sources, run.data.loader.counts
    heldout = len(run.data.heldout or ())
    run.say(f"scoring all {heldout:,} held-out pictures ...")
    unigram = None
    if counts["captioned"] <= UNIGRAM_CAPTIONS:
        unigram = unigram_counts([str(path) for path in sources.train], run.data.tokenizer)
    else:
        run.say(
            f"the unigram baseline is left out: {counts['captioned']:,} captioned pictures are "
            f"more than {UNIGRAM_CAPTIONS:,}"
        )
    result = run.score(
        stop,
        model,
        generate=GENERATED,
        reconstruct=RECONSTRUCTED,
        keep_images=True,
        unigram=unigram,
        scenes=sources.builtin_heldout,
        views=run.config.eval_views,
    )
    run.record_scores(result, _views(run, result))
    run.say(f"held out, all {result.counts['images']:,} pictures, after step {run.step}:")
    for line in result.lines():
        run.say(f"  {line}")
    return result


def final_pair_scores(run: Run, stop: Stop, model: Any) -> EvalResult:
    """Everything at once, on all held-out pairs of every kind."""
    run.say("scoring all held-out pairs ...")
    sources, counters = run.data.sources, run.data.loader.counters
    unigram = {
        kind: unigram_counts([str(path) for path in paths], run.data.tokenizer)
        for kind, paths in sources.train.items()
        if counters[kind]["samples"] <= UNIGRAM_CAPTIONS and run.config.objectives.mlm
    }
    result = run.score_pairs(
        stop, model, generate=GENERATED, keep_images=True, unigram=unigram, scenes=sources.builtin,
        views=run.config.eval_views,
    )  # fmt: skip
    run.record_scores(result, _views(run, result))
    said = ", ".join(f"{result.counts[many]:,} {many}" for _, many in NAMES.values() if many in result.counts)
    run.say(f"held out, all of {said or 'nothing'}, after step {run.step}:")
    for line in result.lines():
        run.say(f"  {line}")
    for kind, pairs in run.data.heldout.items():
        if pairs.broken:
            run.say(f"  {kind}: {len(pairs.broken)} held-out samples could not be read: {pairs.broken[0]}")
    return result


def describe(run: Run, result: EvalResult | None) -> dict[str, Any]:
    """summary.json: what ran on what, and the final scores beside what chance, the unigram model and shuffled
    images give.
    """
    config = run.config
    parts = _pairs(run, result) if isinstance(config, PerceiverPretrainConfig) else _pictures(run, result)
    return {
        "name": config.name,
        **parts,
        "objectives": config.objectives.weights(),
        "steps": run.step,
        "total_steps": config.steps,
        "skipped_steps": run.skipped,
        "images": run.step * config.batch_size,
        "seconds": run.seconds,
        "device": device_name(run.engine.device),
        "precision": run.engine.precision.name,
        "peak_memory": peak_memory(run.engine.device),
        "world_size": run.ranks.size,
        "seed": config.seed,
        "command": run.command,
        "family": family_of(run.config).name,
        "checkpoint": str(run.saved.relative_to(run.out)) if run.saved else None,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "interrupted": False,
        "evaluation": result.to_json() if result else None,
    }


def _views(run: Run, result: EvalResult | None) -> int:
    """Views of each picture that retrieval has taken; 1 where no pictures were retrieved."""
    scored = result.scores.get("retrieval", {}) if result else {}
    return run.config.eval_views if "text_to_image/R@1" in scored else 1


def _pictures(run: Run, result: EvalResult | None) -> dict[str, Any]:
    """What is Aurora's own."""
    config, data = run.config, run.data
    sizes = [name for name, size in AURORA_SIZES.items() if size == config.model]
    return {
        "model": {
            "family": "Aurora",
            "size": sizes[0] if sizes else "custom",
            "parameters": count_aurora(config.model)["total"],
            "image_size": config.model.image_size,
        },
        "data": {
            "train": [str(path) for path in data.sources.train],
            "train_pairs": data.loader.counts["captioned"],
            "train_uncaptioned": data.loader.counts["uncaptioned"],
            "evaluation": [str(path) for path in data.sources.heldout],
            "evaluation_images": result.counts["images"] if result else 0,
            "evaluation_views": _views(run, result),
            "evaluation_captions": result.counts["captions"] if result else 0,
            "broken": data.loader.broken.count,
            "vocab_size": data.tokenizer.vocab_size,
            "builtin": data.sources.builtin,
        },
        "itc_negatives": negatives(config, data.pairs, run.ranks.size),
    }


def _pairs(run: Run, result: EvalResult | None) -> dict[str, Any]:
    """What is PerceiverIO's own."""
    config, data = run.config, run.data
    assert isinstance(config, PerceiverPretrainConfig)
    sizes = [name for name, size in PERCEIVER_SIZES.items() if size == config.model]
    counters = data.loader.counters
    return {
        "model": {
            "family": "PerceiverIO",
            "size": sizes[0] if sizes else "custom",
            "parameters": count_perceiver(config.model)["total"],
            "image_size": config.model.image_size,
        },
        "data": {
            "train": {kind: [str(path) for path in paths] for kind, paths in data.sources.train.items()},
            "mixture": {kind: counter["share"] for kind, counter in counters.items()},
            "train_samples": {kind: counter["samples"] for kind, counter in counters.items()},
            "consumed": {kind: counter["consumed"] for kind, counter in counters.items()},
            "evaluation": {
                kind: [str(path) for path in paths] for kind, paths in data.sources.heldout.items()
            },
            "evaluation_samples": dict(result.counts) if result else {},
            "evaluation_views": _views(run, result),
            "broken": data.loader.broken.count,
            "vocab_size": data.tokenizer.vocab_size,
            "builtin": data.sources.builtin,
        },
    }
