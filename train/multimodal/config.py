"""What a pre-training run of PerceiverIO is: Aurora's configuration with another model, other losses and other data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dataload.multimodal import PAIRS
from models.perceiver import PerceiverConfig, PerceiverObjectives
from models.perceiver.objectives import MASKED
from train.config import COMPILED_TWICE, PretrainConfig, micro_batch

CONTRASTS = {"image-text": "itc", "video-text": "vtc", "audio-text": "atc"}


@dataclass(frozen=True)
class PairConfig:
    """The shards of one kind of pair."""

    train: tuple[str, ...] = ()
    """Training shards (WebDataset tars): files, directories, globs, or ranges. Empty: this kind is left out."""
    heldout: tuple[str, ...] = ()
    """Held-out shards with captions, scored during and after the run. Empty: this kind is not scored."""
    weight: float | None = None
    """Share of the samples, relative to the other kinds'. None: the mixture's."""


@dataclass(frozen=True)
class MultimodalDataConfig:
    """Where samples of several modalities come from, and how a training view is made of each."""

    image_text: PairConfig = field(default_factory=PairConfig)
    """Pictures with captions."""
    video_text: PairConfig = field(default_factory=PairConfig)
    """Videos with captions; their sound is read along."""
    audio_text: PairConfig = field(default_factory=PairConfig)
    """Sounds with captions, or with labels for captions."""
    mixture: Literal["mm-align", "equal"] = "mm-align"
    """In what proportion the kinds are mixed. mm-align: 2.5 : 0.8 : 0.3, that of MM-Align-2.0. equal: as many of each."""
    tokenizer: str = ""
    """tokenizer.model made by `python -m dataload.tokenizer`. Empty: the built-in corpus' own."""
    builtin: bool = True
    """Whether the built-in corpus may take the place of shards when none are named."""
    cache: str = ""
    """Where the built-in corpus is put the first time (some 200 megabytes). Empty: $XDG_CACHE_HOME/auroraio or
    ~/.cache/auroraio."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Random-resized crop of pictures and frames: smallest and largest share of the area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Random-resized crop: range of width to height."""
    flip: float = 0.5
    """Chance of mirroring a picture or a clip ("left" and "right" in its caption are swapped along)."""
    color_jitter: float = 0.0
    """Pictures' brightness, contrast and saturation are each scaled by a factor within 1 - this and 1 + this. 0: off."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """How pictures are resized."""
    video_seconds: float = 10.0
    """Length of a clip; its frames are drawn from equal parts of it."""
    mlm_probability: float = 0.15
    """Masked language modelling: share of the words that is asked for."""
    tokenizer_sampling: float = 0.0
    """Token boundaries drawn at random (alpha of unigram sampling or of BPE-dropout; 0.1 is usual). 0: off."""
    captions_per_sample: int = 1
    """Captions drawn of each sample at each visit (its reading is shared by them)."""
    exclude: tuple[str, ...] = ()
    """Files that list training samples to leave out: a run's broken.jsonl, or what dataload.verify and dataload.stats wrote.
    """
    workers: int = 2
    """Decoding threads per process."""
    prefetch: int = 4
    """Batches made ahead."""
    max_broken: float = 0.05
    """Share of samples that may fail to decode (each is reported and replaced) before the run stops."""

    def pairs(self) -> dict[str, PairConfig]:
        """The kinds of pairs by name, those without shards too."""
        return {kind: getattr(self, kind.replace("-", "_")) for kind in PAIRS}


@dataclass(frozen=True)
class PerceiverPretrainConfig(PretrainConfig):
    """One pre-training run of PerceiverIO."""

    name: str = "perceiver-tiny"
    """Name of the run; its output goes to runs/NAME unless --out says otherwise."""
    model: PerceiverConfig = field(default_factory=PerceiverConfig)  # type: ignore[assignment]
    """The architecture."""
    objectives: PerceiverObjectives = field(default_factory=PerceiverObjectives)  # type: ignore[assignment]
    """Loss weights (0 turns one off) and their settings."""
    data: MultimodalDataConfig = field(default_factory=MultimodalDataConfig)  # type: ignore[assignment]
    """Where samples come from."""

    def part_problems(self, world_size: int) -> list[str]:
        data = self.data
        found: list[str] = []
        for name in ("flip", "mlm_probability", "max_broken", "color_jitter"):
            if not 0 <= getattr(data, name) <= 1:
                found.append(f"data.{name} is {getattr(data, name):g}; it must be in [0, 1]")
        if data.captions_per_sample < 1:
            found.append(f"data.captions_per_sample is {data.captions_per_sample}; it must be 1 or more")
        if data.video_seconds <= 0:
            found.append(f"data.video_seconds is {data.video_seconds:g}; it must be positive")
        weights = self.objectives.weights()
        if not any(weights.values()):
            found.append(f"every objective has weight 0: set one of --objectives.{{{','.join(weights)}}}")
        if self.objectives.label:
            found.append("objectives.label is on, but these batches bring no classes; set it to 0")
        samples, share = micro_batch(self, world_size), self.objectives.masked_share
        if any(weights[name] for name in ("mlm", *MASKED)) and 0 < samples * share < 1:
            found.append(
                f"objectives.masked_share is {share:g} of micro-batches of {samples}: no sample would ever be read with hidden "
                f"parts; it must be at least {1 / samples:g}, or 0 with the weights of mlm, {', '.join(MASKED)}"
            )
        if self.itc_negatives == "global" and self.compile:
            found.append(COMPILED_TWICE)
        if self.model.image_size % CELL:
            found.append(f"model.image_size is {self.model.image_size}; training needs a multiple of {CELL}")
        given = [kind for kind, pair in data.pairs().items() if pair.train]
        for kind, pair in data.pairs().items():
            if pair.weight is not None and pair.weight <= 0:
                found.append(f"data.{kind}.weight is {pair.weight:g}; it must be positive")
        if not given and not data.builtin:
            found.append(
                f"{self.name} is for your own shards, and none were given: --data.image-text.train, --data.video-text.train, "
                "--data.audio-text.train (any of them), or --data.builtin to train on generated shapes"
            )
        if given and not data.tokenizer:
            found.append(
                "training shards are given without data.tokenizer; make one from the captions: "
                "python -m dataload.tokenizer --input SHARDS ... "
                f"--vocab-size {self.model.vocabulary} --output tokenizer.model"
            )
        if data.tokenizer and not given:
            found.append("data.tokenizer is given without shards; the built-in corpus has its own tokenizer")
        return found


CELL = 32
"""Side of a cell of the pictures' mask in pixels; half of it for pictures below 128."""
