"""What a pre-training run is: frozen dataclasses, their JSON form, and the checks that need no data.

`python -m train.pretrain --help` shows the text under each field. Presets (train/presets.py) fill them in.
"""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dataload.squares import SUPPORTED, VIEWS
from models import AuroraConfig
from models.objectives import ObjectiveConfig

COMPILED_TWICE = (
    "itc_negatives is global and compile is on: compiled code draws other dropout the second time; "
    "set --itc-negatives microstep or --no-compile"
)


class ConfigError(ValueError):
    """A run that cannot be started as asked; the message lists every reason."""


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how a training view is made of each."""

    train: tuple[str, ...] = ()
    """Training shards (WebDataset tars): files, directories, globs, or ranges as in
    "train-{000000..000011}.tar". Empty: the built-in corpus of generated pictures.
    """
    heldout: tuple[str, ...] = ()
    """Held-out shards with captions, scored during and after the run. Empty: the built-in corpus' own, or
    none with your own data.
    """
    tokenizer: str = ""
    """tokenizer.model made by `python -m dataload.tokenizer`. Empty: the built-in corpus' own."""
    builtin: bool = True
    """Whether the built-in corpus may take the place of training shards that are not named. A preset for your own pictures
    says no, so that a forgotten --data.train is noticed."""
    cache: str = ""
    """Where the built-in corpus is put the first time (some 50 megabytes). Empty: $XDG_CACHE_HOME/auroraio or
    ~/.cache/auroraio.
    """
    uncaptioned_fraction: float | None = None
    """Share of each batch that has no caption and feeds masked image modelling only. None: the share that the
    data has.
    """
    captions_per_image: int = 1
    """Captions drawn for each picture at each visit (its encoding is shared by them)."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Random-resized crop: smallest and largest share of the picture's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Random-resized crop: range of width to height."""
    flip: float = 0.5
    """Chance of mirroring a picture ("left" and "right" in its caption are swapped along)."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation are each scaled by a factor within 1 - this and 1 + this. 0: off.
    """
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How pictures are resized."""
    mim_ratio: float = 0.6
    """Masked image modelling: share of the 32-pixel units that is hidden."""
    mlm_probability: float = 0.15
    """Masked language modelling: share of the words that is asked for."""
    mlm_share: float = 1.0
    """Masked language modelling: share of each micro-batch's captions that takes part; the others cost it nothing."""
    tokenizer_sampling: float = 0.0
    """Token boundaries drawn at random (alpha of unigram sampling or of BPE-dropout; 0.1 is usual). 0: off."""
    backend: Literal["auto", "cpu", "dali"] = "auto"
    """What decodes pictures: cpu (simplejpeg and Pillow), dali (NVIDIA DALI), or auto: dali on a GPU where it is
    installed, else cpu. The samples, crops and flips are the same."""
    exclude: tuple[str, ...] = ()
    """Files that list samples to leave out: a run's broken.jsonl, or what dataload.verify and dataload.stats wrote."""
    workers: int = 2
    """Decoding threads per process."""
    prefetch: int = 4
    """Batches made ahead."""
    max_broken: float = 0.05
    """Share of pictures that may fail to decode (each is reported and replaced) before the run stops."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule: linear warm-up, then a cosine down to `final_lr` at the last
    step.
    """

    lr: float = 1e-3
    """Peak learning rate."""
    final_lr: float = 1e-6
    """Learning rate at the last step."""
    warmup: int = 30
    """Optimizer steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay of the first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.05
    """Decoupled weight decay; what is exempt is said at models.parameter_groups."""
    clip: float = 1.0
    """Largest global gradient norm; longer gradients are scaled down to it. 0: no clipping."""
    kind: Literal["auto", "torch", "apex", "torch-8bit"] = "auto"
    """Whose AdamW: torch's fused one, NVIDIA apex's FusedAdam (GPUs), or torchao's with moments in 8 bits. auto: apex where
    NVIDIA's is installed, else torch; a line at the start says which."""
    max_skipped: int = 10
    """Steps in a row with a non-finite loss or gradient that are skipped before the run stops."""


@dataclass(frozen=True)
class PretrainConfig:
    """One pre-training run of Aurora."""

    name: str = "aurora-tiny"
    """Name of the run; its output goes to runs/NAME unless --out says otherwise."""
    model: AuroraConfig = field(default_factory=AuroraConfig)
    """The architecture."""
    objectives: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Loss weights (0 turns one off) and their settings."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where samples come from."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW and the schedule."""
    batch_size: int = 64
    """Samples per optimizer step, pairs and uncaptioned pictures together, over all ranks and micro-steps."""
    accumulation: int = 1
    """Micro-steps per optimizer step. Contrastive negatives are those of one micro-step over all ranks, unless
    itc_negatives says otherwise."""
    itc_negatives: Literal["microstep", "global"] = "microstep"
    """Which texts an image is contrasted with. microstep: those of its micro-step over all ranks. global: those of all
    micro-steps, with the gradients of one large batch (GradCache); embeddings are computed twice, about a third more time.
    """
    steps: int = 400
    """Optimizer steps."""
    engine: Literal["auto", "single", "ddp", "fsdp2", "deepspeed"] = "auto"
    """How processes share the work. ddp: all hold everything. fsdp2 (torch) and deepspeed (an extra): optimizer, gradients and
    weights in shards, as zero_stage says. auto: single with one process, ddp with several. train/README.md compares them."""
    zero_stage: Literal[1, 2, 3] = 2
    """What fsdp2 and deepspeed keep in shards. 1 (deepspeed only): the optimizer. 2: gradients too. 3: weights too, gathered
    layer by layer."""
    offload: bool = False
    """deepspeed: master weights and moments in main memory, where the optimizer then runs."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the matrix products. auto: bf16 on GPUs that have it and on CPUs where it measures faster
    than fp32. Weights stay fp32.
    """
    compile: bool = False
    """torch.compile the model (minutes at the start, faster steps after; on a CPU it needs a C++ compiler).
    """
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: far less memory for about a third more compute."""
    ema_decay: float = 0.0
    """Decay per step of an exponential moving average of the weights, which is then what gets scored. 0: off.
    """
    seed: int = 0
    """Seed of the weights, the sample order, crops, masks and dropout."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    out: str = ""
    """Directory of the run. Empty: runs/NAME, or runs/NAME-2, -3 ... where that holds a run already."""
    resume: str = ""
    """auto: go on from the newest intact checkpoint of this run, or start where there is none. A path: from
    that run or checkpoint. Empty: a new run.
    """
    eval_every: int = 100
    """Steps between evaluations on the held-out set; 0: only at the end."""
    eval_images: int = 500
    """Held-out pictures (sounds) scored during the run; the last evaluation takes them all."""
    eval_views: int = 1
    """Views of each held-out picture whose embeddings are averaged for the retrieval of the last evaluation: 1 (all of it),
    5 (and four squares of 3/4 of its side), 14 (and nine of 1/2). Those during the run take 1."""
    log_every: int = 10
    """Steps between progress lines where output is not a terminal."""
    metrics_every: int = 1
    """Steps between lines in metrics.jsonl and TensorBoard."""
    save_every: int = 100
    """Steps between checkpoints; 0: only at the end (and on Ctrl-C or SIGTERM)."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints are kept."""
    profile: tuple[int, ...] = ()
    """First and last step that torch.profiler records on rank 0, as in --profile 10 12; the trace goes to OUT/profile/."""
    wandb: str = ""
    """Project of Weights & Biases that gets the same numbers as TensorBoard (extra wandb); WANDB_MODE=offline keeps them on
    disk. Empty: none."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0: none is."""
    save_async: bool = True
    """Write checkpoints beside the training, which waits only while its state is copied to main memory."""
    hang_timeout: float = 1800.0
    """Seconds without progress of any of several processes after which the run says which one hangs, and where, and stops; 0:
    never. The first step counts, and whatever it compiles."""
    dry_run: bool = False
    """Resolve and print everything, check data, disk and memory, and stop."""

    def part_problems(self, world_size: int) -> list[str]:
        """What of `problems` depends on model, objectives and data."""
        config, data = self, self.data
        found: list[str] = []
        shares = {
            "uncaptioned_fraction": data.uncaptioned_fraction,
            "flip": data.flip,
            "mim_ratio": data.mim_ratio,
        }
        shares |= {"mlm_probability": data.mlm_probability, "max_broken": data.max_broken}
        found += [
            f"data.{name} is {x:g}; it must be in [0, 1]"
            for name, x in shares.items()
            if x is not None and not 0 <= x <= 1
        ]
        if not any(config.objectives.weights().values()):
            found.append(
                "every objective has weight 0: nothing to learn; set one of --objectives.{mim,itc,caption,mlm}"
            )
        if config.objectives.itc_mix and micro_batch(config, world_size) < 2:
            found.append(
                f"objectives.itc_mix is {config.objectives.itc_mix:g} with micro-batches of 1: pairs are mixed with others "
                "of their micro-batch; lower --accumulation, or set --objectives.itc-mix 0"
            )
        if config.itc_negatives == "global" and config.compile:
            found.append(COMPILED_TWICE)
        if config.model.stem == "conv" and config.objectives.mim:
            found.append(
                "model.stem is conv, which sees across hidden patches, and objectives.mim is on; "
                "set --objectives.mim 0 or --model.stem patch"
            )
        if not data.train and not data.builtin:
            found.append(
                f"{config.name} is for your own pictures, and no --data.train was given; make shards with "
                "python -m dataload.pack (README, 'Your own pictures'), or say --data.builtin to train on generated shapes"
            )
        if data.train and not data.tokenizer:
            found.append(
                "data.train is given without data.tokenizer; make one from the captions: "
                f"python -m dataload.tokenizer --input {' '.join(data.train)} "
                f"--vocab-size {config.model.vocabulary} --output tokenizer.model"
            )
        if data.tokenizer and not data.train:
            found.append(
                "data.tokenizer is given without data.train; the built-in corpus has its own tokenizer"
            )
        return found


def micro_batch(config: PretrainConfig, world_size: int) -> int:
    """Samples per rank per micro-step."""
    return config.batch_size // max(1, config.accumulation * world_size)


def problems(config: PretrainConfig, world_size: int = 1) -> list[str]:
    """Every reason why this configuration cannot run on `world_size` processes; empty if it can."""
    found = []
    optim = config.optim
    for name in (
        "batch_size",
        "accumulation",
        "steps",
        "log_every",
        "metrics_every",
        "keep_checkpoints",
        "eval_images",
    ):
        if getattr(config, name) < 1:
            found.append(f"{name} is {getattr(config, name)}; it must be at least 1")
    if config.eval_views not in VIEWS:
        found.append(f"eval_views is {config.eval_views}; {SUPPORTED}")
    for name in ("eval_every", "save_every", "keep_every", "hang_timeout"):
        if getattr(config, name) < 0:
            found.append(f"{name} is {getattr(config, name)}; it must be 0 (only at the end) or more")
    parts = config.accumulation * world_size
    if parts > 0 and config.batch_size % parts:
        lower, upper = config.batch_size // parts * parts, -(-config.batch_size // parts) * parts
        nearest = f"{lower} or {upper}" if lower else str(upper)
        found.append(
            f"batch_size {config.batch_size} cannot be split over accumulation {config.accumulation} x "
            f"{world_size} process{'es' if world_size > 1 else ''}; try {nearest}"
        )
    if optim.warmup < 0 or optim.warmup >= config.steps:
        found.append(
            f"optim.warmup is {optim.warmup} steps, but the run has {config.steps}; it must be 0 or more, "
            f"and fewer: try --optim.warmup {max(config.steps // 10, 0)}"
        )
    if not 0 <= optim.final_lr <= optim.lr or optim.lr <= 0:
        found.append(
            f"optim.lr is {optim.lr:g} and optim.final_lr {optim.final_lr:g}; wanted: "
            "0 <= final_lr <= lr, and lr > 0"
        )
    if optim.clip < 0:
        found.append(f"optim.clip is {optim.clip:g}; it must be 0 (off) or more")
    if optim.max_skipped < 1:
        found.append(f"optim.max_skipped is {optim.max_skipped}; it must be at least 1")
    if config.profile and not (len(config.profile) == 2 and 1 <= config.profile[0] <= config.profile[1]):
        found.append(
            f"profile is {list(config.profile)}; it takes the first and the last step, as in --profile 10 12"
        )
    if config.wandb and find_spec("wandb") is None:
        found.append(
            "wandb names a project, but Weights & Biases is not installed: pip install 'auroraio[wandb]'"
        )
    if not 0 <= config.ema_decay < 1:
        found.append(f"ema_decay is {config.ema_decay:g}; it must be in [0, 1): 0 is off, 0.999 is usual")
    return found + config.part_problems(world_size)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON-able data (tuples become lists)."""
    return {
        f.name: to_dict(value)
        if dataclasses.is_dataclass(value := getattr(config, f.name))
        else _plain(value)
        for f in dataclasses.fields(config)
    }


def from_dict(kind: Any, data: dict[str, Any]) -> Any:
    """The inverse of to_dict. A field that `data` lacks takes its default; one that `kind` lacks is refused
    by name.
    """
    hints = get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(data) - names):
        raise ConfigError(
            f"{kind.__name__} has no field {', '.join(unknown)}: written by another version of auroraio?"
        )
    return kind(**{name: _typed(hints[name], value) for name, value in data.items()})


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Fields whose values differ between two configs of one kind: dotted name -> (old, new)."""
    changed: dict[str, tuple[Any, Any]] = {}
    for f in dataclasses.fields(old):
        a, b = getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(a):
            changed |= differences(a, b, f"{prefix}{f.name}.")
        elif a != b:
            changed[prefix + f.name] = (a, b)
    return changed


def _plain(value: Any) -> Any:
    return [_plain(x) for x in value] if isinstance(value, tuple) else value


def _typed(hint: Any, value: Any) -> Any:
    """JSON lists back to tuples, JSON objects back to dataclasses, whole numbers back to floats."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    if get_origin(hint) in (Union, types.UnionType):
        return (
            None if value is None else _typed(next(a for a in get_args(hint) if a is not type(None)), value)
        )
    if get_origin(hint) is tuple:
        return tuple(tuple(x) if isinstance(x, list) else x for x in value)
    return float(value) if hint is float else value
