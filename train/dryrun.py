"""`--dry-run`: resolve and print everything, check data, disk and memory, run nothing."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from dataload import shards
from models import AuroraConfig
from models.parameters import count_aurora, count_perceiver
from models.perceiver import PerceiverConfig, PerceiverObjectives
from train.checkpoint import read_config, verify
from train.commands import begun_by
from train.config import ConfigError, PretrainConfig, micro_batch, problems, to_dict
from train.data import find_sources, load_tokenizer
from train.directory import find_run, look
from train.engine import Ranks
from train.engines.choice import engine_problems, optimizer_of, resolve
from train.engines.choice import in_words as engine_in_words
from train.greeting import pair_lines
from train.machine import choose_device, choose_precision, device_name, free_disk, gigabytes, total_memory
from train.multimodal.config import PerceiverPretrainConfig
from train.multimodal.data import find_pairs, open_pairs
from train.optimizers import in_words
from train.plan.__main__ import plan_for
from train.plan.budget import largest_block
from train.plan.engines import (
    EngineChoice,
    engine_of,
    room_for_checkpoints,
    scores,
    scoring_memory,
    scoring_problem,
    static_memory,
)
from train.plan.stated import RECIPES
from train.plan.trace import empty_model
from train.telemetry.log import Progress

# Values kept for the backward pass per token and channel of a block: 3.1 GB per 448 px image of XL in bf16.
KEPT_PER_TOKEN = 19

LOGITS = 512 * 2**20  # bytes of logits at a time: kernels/linear_cross_entropy/eager.py, on a GPU


def dry_run(config: PretrainConfig) -> int:
    """Print the resolved run and every problem found. Returns 0, or 2 when there is a problem."""
    ranks = Ranks.from_environment()
    print(json.dumps(to_dict(config), indent=2))
    say_where(config)
    if ranks.size == 1 and config.name in RECIPES:
        return _specified(config)
    found = problems(config, ranks.size) + engine_problems(config, ranks.size)
    if not found:
        several = isinstance(config, PerceiverPretrainConfig)
        found += _check_pairs(config) if several else _check_data(config)
        found += _check_machine(config, ranks)
    print("time        unknown until it runs: the first progress lines of the run say images/s and ETA")
    if found:
        print("this run cannot start:", *found, sep="\n  ")
        return 2
    print("dry run: no problem found, nothing was run")
    return 0


def say_where(config: PretrainConfig) -> Path:
    """Where the run would write, and what it would go on from. Raises ConfigError, CheckpointError or FileNotFoundError as the
    run would."""
    from train.setup import compare, refuse_fewer_steps  # it is built on what this module checks for

    progress = Progress(config.steps, config.batch_size, config.log_every)
    out, start, _ = find_run(config, progress, look)
    print(f"output      {out}")
    if start:
        print(f"resume      {start}")
        compare(read_config(start), config, progress, begun_by(start))
        refuse_fewer_steps(start, verify(start)["step"], config)
    return out


def _specified(config: PretrainConfig) -> int:
    """A preset that was specified for many GPUs, asked for in one process: its plan, and what is missing before it can start
    there. Data that is named is checked as ever; this machine's memory is not what counts."""
    print(*plan_for(config), sep="\n")
    several = isinstance(config, PerceiverPretrainConfig)
    if isinstance(config, PerceiverPretrainConfig):
        named = any(pair.train for pair in config.data.pairs().values())
    else:
        named = bool(config.data.train)
    missing = problems(config, RECIPES[config.name].gpus)
    found = (_check_pairs(config) if several else _check_data(config)) if named and not missing else []
    if not named and not several:
        missing.append("no training shards are named: --data.train, --data.heldout, --data.tokenizer")
    for line in missing:
        print(f"before it starts: {line}")
    if found:
        print("this run cannot start:", *found, sep="\n  ")
        return 2
    print(f"dry run: planned for {RECIPES[config.name].gpus} GPUs, nothing was run")
    return 0


def _check_data(config: PretrainConfig) -> list[str]:
    """Index the shards and load the tokenizer."""
    found = []
    try:
        sources = find_sources(config.data, config.model.image_size, print)
    except (OSError, ValueError) as error:
        return [str(error)]
    try:
        tokenizer = load_tokenizer(sources.tokenizer, config.model.vocabulary)
        print(
            f"tokenizer   {sources.tokenizer}: {tokenizer.vocab_size:,} pieces; "
            f"the model has rows for {config.model.vocabulary:,}"
        )
    except (OSError, ValueError) as error:
        found.append(str(error))
    for role, paths in (("train", sources.train), ("heldout", sources.heldout)):
        if not paths:
            print(f"data        {role}: none; nothing will be scored")
            continue
        try:
            index = shards.index(paths, exclude=config.data.exclude if role == "train" else ())
        except (OSError, ValueError) as error:
            found.append(f"data.{role}: {error}")
            continue
        captioned = int(index.captioned.sum())
        print(
            f"data        {role}: {len(paths)} shards, {captioned:,} captioned and "
            f"{len(index) - captioned:,} uncaptioned pictures"
        )
        for problem in index.problems[:5]:
            print("            " + " ".join(problem))
        if len(index.problems) > 5:
            print(f"            and {len(index.problems) - 5} more")
        found += _check_counts(config, role, captioned, len(index) - captioned)
    return found


def _check_pairs(config: PretrainConfig) -> list[str]:
    """Open what a run would open."""
    assert isinstance(config, PerceiverPretrainConfig)
    try:
        sources = find_pairs(config.data, config.model.image_size, print)
        with tempfile.TemporaryDirectory() as nowhere:
            data = open_pairs(replace(config, out=nowhere), sources, 0, 1)
    except (OSError, ValueError, ImportError) as error:
        return [str(error)]
    print(*pair_lines(data), sep="\n")
    data.loader.close()
    return [
        f"data.{kind}.heldout has {len(pairs)} captioned samples; scoring needs at least 2"
        for kind, pairs in (data.heldout or {}).items()
        if len(pairs) < 2
    ]


def _check_counts(config: PretrainConfig, role: str, captioned: int, uncaptioned: int) -> list[str]:
    if role == "heldout":
        return (
            []
            if captioned >= 2
            else [f"data.heldout has {captioned} captioned pictures; scoring needs at least 2"]
        )
    weights = config.objectives.weights()
    needs_captions = [name for name in ("itc", "caption", "mlm") if weights[name]]
    share = config.data.uncaptioned_fraction
    if needs_captions and not captioned:
        return [
            f"no training picture has a caption, and the objectives {', '.join(needs_captions)} need them"
        ]
    if share and not uncaptioned:
        return [
            f"data.uncaptioned_fraction is {share:g}, but every training picture has a caption; "
            "set it to 0, or add pictures without"
        ]
    if weights["mim"] and not uncaptioned:
        print("            no uncaptioned picture: objectives.mim has nothing to learn from")
    return []


def _check_machine(config: PretrainConfig, ranks: Ranks) -> list[str]:
    """Device, precision, memory, disk."""
    found = []
    try:
        device = choose_device(config.device, ranks.local_rank)
    except ConfigError as error:
        return [str(error)]
    precision = choose_precision(config.precision, device)
    print(f"device      {device_name(device)}; {precision.name}: {precision.why}")
    if (
        config.compile
        and device.type == "cpu"
        and not any(map(shutil.which, ("g++", "clang++", "c++", "cl")))
    ):
        found.append("--compile on a CPU needs a C++ compiler, and there is none in PATH")
    if isinstance(config, PerceiverPretrainConfig):
        parameters = count_perceiver(config.model)["total"]
    else:
        parameters = count_aurora(config.model)["total"]
    print(f"engine      {engine_in_words(config, ranks.size)}")
    print(f"model       {parameters:,} parameters")
    try:
        print(f"optimizer   {in_words(optimizer_of(config, ranks.size), device)}")
    except ConfigError as error:
        found.append(str(error))

    memory = estimate_memory(config, parameters, ranks.size, 2 if precision.autocast else 4)
    needed = sum(memory.values())
    has = total_memory(device)
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in memory.items())
    print(
        f"memory      about {gigabytes(needed)} per process ({parts}); "
        f"{device.type} has {gigabytes(has) if has else 'an unknown amount'}"
    )
    if has and needed > has:
        help_ = "" if config.activation_checkpointing else "--activation-checkpointing, "
        found.append(
            f"memory: about {gigabytes(needed)} needed, {device.type} has {gigabytes(has)}; what helps: "
            f"{help_}more --accumulation, more processes, an engine that shards, a smaller preset"
        )
    found += _check_scoring(config, parameters, memory, ranks.size, has)

    out = Path(config.out or f"runs/{config.name}")
    (each, needed), free = room_for_checkpoints(config, parameters), free_disk(out)
    print(
        f"disk        {gigabytes(needed)} for {config.keep_checkpoints} checkpoints of {gigabytes(each)} "
        f"and one in the making; {gigabytes(free)} free at {out}"
    )
    if needed > free:
        found.append(
            f"disk: {gigabytes(needed)} needed for checkpoints, {gigabytes(free)} free at {out}; "
            "fewer --keep-checkpoints or another --out help"
        )
    return found


def engine_for(config: PretrainConfig, world_size: int) -> EngineChoice:
    """The engine of this run, as plans name it."""
    return engine_of(config, world_size, resolve(config, world_size))


def _check_scoring(
    config: PretrainConfig, parameters: int, memory: dict[str, float], world_size: int, room: float | None
) -> list[str]:
    """The copy of the model that an engine that shards makes for an evaluation: is there room for it?"""
    engine = engine_for(config, world_size)
    if not engine.shards or not scores(config):
        return []
    static = {name: size for name, size in memory.items() if name not in ("activations", "logits")}
    needed = scoring_memory(static, parameters, engine)
    print(
        f"            about {gigabytes(needed)} on rank 0 while it scores, with a whole fp32 copy of the model "
        f"({gigabytes(4 * parameters)})"
    )
    return [scoring_problem(parameters, needed, room)] if room and needed > room else []


def estimate_memory(
    config: PretrainConfig, parameters: int, world_size: int, bytes_per_value: int
) -> dict[str, float]:
    """Bytes by part on one rank, under the engine that is asked for. Weights and optimizer are exact, activations within a
    factor of two."""
    engine = engine_for(config, world_size)
    largest = largest_block(empty_model(config)) if engine.shards else 0
    memory = static_memory(config, parameters, largest, world_size, engine)
    if engine.shards and bytes_per_value == 4:
        memory["weights"] *= 2  # not in bf16 then
    if isinstance(config, PerceiverPretrainConfig):
        values = perceiver_activations(config.model, config.objectives, config.activation_checkpointing)
        memory["activations"] = bytes_per_value * micro_batch(config, world_size) * values
        return memory
    share = config.data.uncaptioned_fraction or 0.0
    samples = micro_batch(config, world_size)
    pairs = samples * (1 - share) * config.data.captions_per_image
    image, text = activation_values(config.model, config.activation_checkpointing)
    memory["activations"] = bytes_per_value * (samples * image + pairs * text)
    logits = config.model.vocabulary * config.model.text_length * (1 + config.data.mlm_probability)
    memory["logits"] = min(4 * pairs * logits, LOGITS)
    return memory


def perceiver_activations(
    model: PerceiverConfig, objectives: PerceiverObjectives, checkpointing: bool
) -> float:
    """Values kept for the backward pass per sample, read once or twice: as in `activation_values`, for a sample with the
    modality that has most patches."""
    patches = max(math.prod(model.image_grid), math.prod(model.audio_grid), math.prod(model.video_grid))
    readings = 1.0 + (objectives.masked_share if objectives.masked_twice else 0.0)
    blocks = [
        (patches * model.encoder_width, model.encoder_layers),
        (model.latents * model.latent_width, model.latent_layers + model.input_reads),
        (model.text_length * model.decoder_width, model.decoder_layers),
        (patches * model.query_width, model.query_layers),
    ]
    if checkpointing:
        kept = sum(size * depth for size, depth in blocks) + KEPT_PER_TOKEN * max(size for size, _ in blocks)
    else:
        kept = KEPT_PER_TOKEN * sum(size * depth for size, depth in blocks)
    return readings * kept


def activation_values(model: AuroraConfig, checkpointing: bool) -> tuple[float, float]:
    """Values kept for the backward pass (per image, per caption): blocks' widths times tokens times
    KEPT_PER_TOKEN.

    With checkpointing only each block's input stays, and one block at a time is whole.
    """
    side = model.image_size // 4
    tokens = [(side // 2**i) ** 2 for i in range(4)]
    image = [
        (n * width, depth) for n, width, depth in zip(tokens, model.stage_widths, model.depths, strict=True)
    ]
    layers = 2 * (model.unimodal_layers + model.crossmodal_layers)  # once for captions, once for masked words
    text = [(model.text_length * model.decoder_width, layers)]

    def kept(blocks: list[tuple[int, int]]) -> float:
        if checkpointing:
            return sum(size * depth for size, depth in blocks) + KEPT_PER_TOKEN * max(
                size for size, _ in blocks
            )
        return float(KEPT_PER_TOKEN * sum(size * depth for size, depth in blocks))

    return kept(image), kept(text)
