"""What a fine-tuning run is: a pre-training run's configuration with a checkpoint to start from, a task, and its data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from models.perceiver import PerceiverConfig
from train.config import PretrainConfig, micro_batch

TaskName = Literal["captioning", "vqa", "retrieval", "detection", "segmentation", "audio"]
LOSSES: dict[str, dict[str, float]] = {
    "captioning": {"text": 1.0},
    "vqa": {"text": 1.0, "answer": 1.0},
    "retrieval": {"itc": 1.0, "match": 1.0},
    "detection": {"class": 1.0, "box": 1.0, "center": 1.0},
    "segmentation": {"pixel": 1.0, "dice": 1.0},
    "audio": {"label": 1.0},
}
"""Of each task its losses and their weights."""
PICTURES: tuple[TaskName, ...] = ("captioning", "vqa", "retrieval", "detection", "segmentation")
READ_BY: dict[str, tuple[TaskName, ...]] = {
    "task.class_ids": ("detection", "segmentation", "audio"),
    "task.head": ("vqa",),
    "task.answers": ("vqa",),
    "task.prompt": ("captioning", "vqa"),
    "task.several_labels": ("audio",),
    "task.beams": ("captioning", "vqa"),
    "task.length_penalty": ("captioning", "vqa"),
    "task.rerank": ("retrieval",),
    "objectives.label_smoothing": ("captioning", "vqa", "audio"),
    "objectives.word_dropout": ("captioning",),
    "objectives.self_critical": ("captioning",),
    "data.captions_per_image": ("captioning",),
    **{
        f"data.{name}": PICTURES
        for name in ("crop_scale", "crop_ratio", "flip", "color_jitter", "interpolation")
    },
    **{f"data.{name}": ("audio",) for name in ("speed", "noise", "hide_sound", "mix_sounds")},
}
"""The tasks that read a field. Fields that are not here are read by all, or have rules of their own."""


@dataclass(frozen=True)
class TaskConfig:
    """What is learned."""

    kind: TaskName = "captioning"
    """The task."""
    classes: tuple[str, ...] = ()
    """Names of the classes, or the answers to choose from. Empty: those of the training data."""
    class_ids: tuple[str, ...] = ()
    """Ids of the classes in the data: COCO's category ids, values in label maps, AudioSet's MIDs. Empty: those that
    classes.json beside the training shards has for the names."""
    head: Literal["written", "chosen"] = "written"
    """Questions: the text stack writes the answer, or a classifier chooses it among the most frequent ones."""
    answers: int = 3129
    """Questions with head chosen: how many answers there are to choose from."""
    prompt: str = ""
    """What the text stack reads before it writes. Questions: with {question} in it."""
    several_labels: bool = False
    """Sounds: several classes may be true of one (AudioSet), scored by mean average precision instead of accuracy. On by itself
    where a training sound has several labels."""
    beams: int = 3
    """Beam search of captions and written answers; 1 is greedy."""
    length_penalty: float = 1.0
    """Beam search: log-probabilities are divided by length to this power."""
    rerank: int = 16
    """Retrieval: the cross-attention decoder orders so many of the first ones anew; 0: it does not."""


@dataclass(frozen=True)
class TuneConfig:
    """Which weights learn."""

    freeze: tuple[str, ...] = ()
    """Parts of the pre-trained model that keep their weights, of Aurora encoder, decoder, encoder.stages.0 ..., of PerceiverIO
    adapters, latent, decoder ...; all: everything but the task's head. A weight that two parts share belongs to both."""
    lora_rank: int = 0
    """Rank of LoRA's matrices (arXiv:2106.09685, models/lora.py); the pre-trained weights then keep their values. 0: off."""
    lora_alpha: float = 16.0
    """LoRA's matrices count alpha / rank times."""
    lora_dropout: float = 0.0
    """Dropout in front of LoRA's matrices."""
    lora_layers: tuple[str, ...] = ("qkv", "q", "kv", "k", "v", "out", "proj", "gate", "up")
    """Last names of the linear layers that get LoRA's matrices."""


@dataclass(frozen=True)
class TaskDataConfig:
    """Where annotated samples come from, and how a training view is made of each."""

    train: tuple[str, ...] = ()
    """Training shards with annotations (`python -m dataload.pack`). Empty: the built-in corpus."""
    heldout: tuple[str, ...] = ()
    """Held-out shards, scored during and after the run. Empty: the built-in corpus' own, or none with your own data."""
    most: int | None = None
    """Train on the first so many samples only."""
    tokenizer: str = ""
    """Another tokenizer.model than the checkpoint's; the embeddings of its pieces are then new. Empty: the checkpoint's."""
    cache: str = ""
    """Where the built-in corpus is put the first time. Empty: $XDG_CACHE_HOME/auroraio or ~/.cache/auroraio."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Random-resized crop: smallest and largest share of the picture's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Random-resized crop: range of width to height."""
    flip: float = 0.5
    """Chance of mirroring a picture ("left" and "right" in its text are swapped along)."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation are each scaled by a factor within 1 - this and 1 + this."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How pictures are resized."""
    captions_per_image: int = 1
    """Captions read of each picture at each visit."""
    speed: float = 0.0
    """Sounds are played faster or slower by a factor within 1 - this and 1 + this, which changes their pitch. 0: off."""
    noise: float = 0.0
    """Largest standard deviation of white noise added to sounds, in shares of their own. 0: off."""
    hide_sound: float = 0.0
    """Largest share of a sound's time, and of its bands, that one gap hides (SpecAugment, arXiv:1904.08779). 0: off."""
    mix_sounds: float = 0.0
    """Chance that a sound is mixed with another of the batch, labels along (mixup, arXiv:1710.09412)."""
    workers: int = 2
    """Decoding threads per process."""
    prefetch: int = 4
    """Batches made ahead."""
    max_broken: float = 0.05
    """Share of samples that may fail to decode (each is reported and replaced) before the run stops."""
    exclude: tuple[str, ...] = ()
    """Files that list samples to leave out."""


@dataclass(frozen=True)
class TaskObjectives:
    """The losses of a task."""

    kind: TaskName = "captioning"
    """The task."""
    label_smoothing: float = 0.0
    """Label smoothing of written text and of single labels."""
    word_dropout: float = 0.0
    """Captions: chance of each input word to be hidden from the text stack, so that it looks at the picture instead."""
    self_critical: int = 0
    """Captions: so many are sampled of each picture, and those with a higher CIDEr-D than the others become likelier
    (self-critical training, arXiv:1612.00563). 0: off, people's captions are learned; that comes first, this after it with
    a lower learning rate, from that run as the checkpoint. The loss is then minus the mean CIDEr-D of the samples."""

    @property
    def itc(self) -> float:
        """Weight of the contrastive loss, which the engine asks for."""
        return LOSSES[self.kind].get("itc", 0.0)

    def weights(self) -> dict[str, float]:
        """The weight of each loss by its name."""
        return {"cider": 1.0} if self.self_critical else dict(LOSSES[self.kind])


@dataclass(frozen=True)
class FinetuneConfig(PretrainConfig):
    """One fine-tuning run of Aurora."""

    name: str = "finetune"
    """Name of the run; its output goes to runs/NAME unless --out says otherwise."""
    checkpoint: str = ""
    """What to start from: a run (its newest checkpoint) or one checkpoint directory, pre-trained, fine-tuned or exported. audio
    may go without: a new model of the size of perceiver-sounds."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """What is learned."""
    tune: TuneConfig = field(default_factory=TuneConfig)
    """Which weights learn."""
    objectives: TaskObjectives = field(default_factory=TaskObjectives)  # type: ignore[assignment]
    """The losses."""
    data: TaskDataConfig = field(default_factory=TaskDataConfig)  # type: ignore[assignment]
    """Where samples come from."""

    @property
    def family(self) -> str:
        """Of the model: Aurora or PerceiverIO."""
        return "PerceiverIO" if isinstance(self.model, PerceiverConfig) else "Aurora"

    def part_problems(self, world_size: int) -> list[str]:
        found: list[str] = []
        for name in ("flip", "max_broken", "color_jitter", "hide_sound", "mix_sounds"):
            if not 0 <= getattr(self.data, name) <= 1:
                found.append(f"data.{name} is {getattr(self.data, name):g}; it must be in [0, 1]")
        if not 0 <= self.data.speed < 1:
            found.append(f"data.speed is {self.data.speed:g}; it must be in [0, 1)")
        if self.tune.lora_rank < 0:
            found.append(f"tune.lora_rank is {self.tune.lora_rank}; it must be 0 (off) or more")
        if self.task.beams < 1:
            found.append(f"task.beams is {self.task.beams}; it must be at least 1")
        if self.task.kind == "vqa" and self.task.prompt and "{question}" not in self.task.prompt:
            found.append(f"task.prompt is {self.task.prompt!r}; it must hold {{question}}")
        if self.task.kind == "retrieval" and micro_batch(self, world_size) < 2:
            found.append(
                "retrieval contrasts the pictures of a micro-batch, which has one: a larger batch_size, or less accumulation"
            )
        if self.task.classes and self.task.kind in ("captioning", "retrieval"):
            found.append(f"task.classes is given; {self.task.kind} has no classes")
        if self.task.classes and self.task.kind == "vqa" and self.task.head == "written":
            found.append(
                "task.classes is given; written answers are not chosen among some: --task.head chosen"
            )
        if self.task.rerank < 0:
            found.append(f"task.rerank is {self.task.rerank}; it must be 0 (off) or more")
        found += self.unread()
        if samples := self.objectives.self_critical:
            if samples < 2:
                found.append(
                    f"objectives.self_critical is {samples}; it must be 0 (off) or 2 and more, which are compared"
                )
            unread = {
                "objectives.word_dropout": self.objectives.word_dropout > 0,
                "data.captions_per_image": self.data.captions_per_image > 1,
            }
            for name in (name for name, given in unread.items() if given):
                found.append(f"{name} is for people's captions, which objectives.self_critical does not read")
            # Ranks end their samples after different numbers of words, so that gathering weights would not match.
            if self.engine == "fsdp2" or (self.engine == "deepspeed" and self.zero_stage == 3):
                found.append(
                    "objectives.self_critical needs whole weights on every rank, for the captions that it samples: engine ddp, "
                    f"or deepspeed with zero_stage 1 or 2, not {self.engine} with {self.zero_stage}"
                )
        if self.eval_views != 1:
            found.append(f"eval_views is {self.eval_views}; fine-tuning supports 1")
        if self.itc_negatives != "microstep":
            found.append(f"itc_negatives is {self.itc_negatives}; fine-tuning supports microstep")
        if self.objectives.kind != self.task.kind:
            found.append(f"objectives.kind is {self.objectives.kind}, but task.kind is {self.task.kind}")
        if self.data.heldout and not self.data.train:
            found.append("data.heldout is given without data.train")
        return found

    def unread(self) -> list[str]:
        """Fields with other values than their defaults that this task would not look at."""
        found = []
        task, chosen = self.task, self.task.head == "chosen"
        by_head = {
            "task.answers": not chosen and task.answers != TaskConfig.answers,
            "task.beams": chosen and task.beams not in (1, TaskConfig.beams),  # the preset's, and the default
            "task.length_penalty": chosen and task.length_penalty != TaskConfig.length_penalty,
            "objectives.label_smoothing": chosen and self.objectives.label_smoothing > 0,
        }
        for name in (name for name, given in by_head.items() if given and task.kind == "vqa"):
            found.append(
                f"{name} is for answers that are {'written' if chosen else 'chosen'}, not for head {task.head}"
            )
        for name, tasks in READ_BY.items():
            part, field_name = name.split(".")
            values = getattr(self, part)
            value = getattr(values, field_name)
            if self.task.kind not in tasks and value != getattr(type(values)(), field_name):
                found.append(f"{name} is {value}; it is for {' and '.join(tasks)}, not {self.task.kind}")
        return found


@dataclass(frozen=True)
class PerceiverFinetuneConfig(FinetuneConfig):
    """One fine-tuning run of PerceiverIO."""

    model: PerceiverConfig = field(default_factory=PerceiverConfig)  # type: ignore[assignment]
    """The architecture."""
