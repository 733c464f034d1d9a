"""What the multimodal loader does. Every field can be set on a command line; ValueError for impossible values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dataload import images
from dataload.schedule import shares

MODALITIES = ("image", "audio", "video", "text")


def _check(one: Any, name: str, good: bool, supported: str) -> None:
    if not good:
        raise ValueError(f"{name} is {getattr(one, name)!r}; supported: {supported}")


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture."""

    shards: tuple[str, ...]
    """tars, folders of tars, globs, brace ranges, or addresses of any of them"""
    weight: float = 1.0
    """share of the samples, relative to the other sources' weights"""
    modalities: tuple[str, ...] = MODALITIES
    """which of a sample's modalities are read: image, audio, video, text"""
    needs: tuple[str, ...] = ()
    """modalities that a sample must have; those without are left out, and counted"""
    exclude: tuple[str, ...] = ()
    """files that list samples to leave out, such as a quarantine file"""

    def __post_init__(self) -> None:
        _check(self, "shards", bool(self.shards), "one pattern or more")
        known = ", ".join(MODALITIES)
        _check(self, "modalities", bool(self.modalities) and set(self.modalities) <= set(MODALITIES), known)
        _check(
            self, "needs", set(self.needs) <= set(self.modalities), f"some of {', '.join(self.modalities)}"
        )


@dataclass(frozen=True)
class ImageConfig:
    """Pictures: a random crop, resized to a square, mirrored at random."""

    size: int = 512
    """side in pixels, a multiple of `cell`"""
    interpolation: str = "bicubic"
    """bilinear or bicubic"""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """share of the picture's area that a crop covers: smallest, largest"""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """width / height of a crop before it is resized: smallest, largest"""
    flip: float = 0.5
    """probability of mirroring; "left" and "right" in the caption are then swapped"""
    color_jitter: float = 0.0
    """brightness, contrast and saturation are each scaled by a factor within 1 - this .. 1 + this"""
    cell: int = 32
    """side of a cell of the mask for masked image modelling, in pixels"""
    mask_ratio: float = 0.6
    """share of the cells that is masked"""
    max_pixels: int = images.MAX_PIXELS
    """a picture whose header declares more counts as broken"""

    def __post_init__(self) -> None:
        _check(self, "cell", self.cell > 0, "1 or more")
        _check(self, "size", self.size > 0 and self.size % self.cell == 0, f"multiples of {self.cell}")
        known = tuple(images.INTERPOLATIONS)
        _check(self, "interpolation", self.interpolation in known, ", ".join(known))
        _check(
            self,
            "crop_scale",
            0 < self.crop_scale[0] <= self.crop_scale[1] <= 1,
            "0 < smallest <= largest <= 1",
        )
        _check(self, "crop_ratio", 0 < self.crop_ratio[0] <= self.crop_ratio[1], "0 < smallest <= largest")
        for name in ("flip", "color_jitter", "mask_ratio"):
            _check(self, name, 0 <= getattr(self, name) <= 1, "0 to 1")


@dataclass(frozen=True)
class AudioConfig:
    """Sound: mono at 16 kHz, a random segment of longer clips; shorter ones keep their length."""

    seconds: float = 10.0
    """length of a segment"""

    def __post_init__(self) -> None:
        _check(self, "seconds", 0 < self.seconds <= 3600, "above 0, to 3600")


@dataclass(frozen=True)
class VideoConfig:
    """Video: frames of a clip, one crop and one flip for all of them (the picture's flip, where there is a picture)."""

    frames: int = 8
    """frames per clip"""
    seconds: float = 10.0
    """length of a clip, from a random place of longer videos; each frame is drawn from an equal part of it"""
    size: int = 224
    """side of a frame in pixels"""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """as for pictures"""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """as for pictures"""
    flip: float = 0.5
    """probability of mirroring"""
    sound: bool = True
    """read the sound track too, where the sample has no sound file of its own"""

    def __post_init__(self) -> None:
        _check(self, "frames", self.frames >= 1, "1 or more")
        _check(self, "size", self.size >= 1, "1 or more")
        _check(
            self,
            "crop_scale",
            0 < self.crop_scale[0] <= self.crop_scale[1] <= 1,
            "0 < smallest <= largest <= 1",
        )
        _check(self, "crop_ratio", 0 < self.crop_ratio[0] <= self.crop_ratio[1], "0 < smallest <= largest")
        _check(self, "flip", 0 <= self.flip <= 1, "0 to 1")


@dataclass(frozen=True)
class TextConfig:
    """Text: captions of the sample's, without padding."""

    length: int = 77
    """tokens at most, BOS and EOS included; longer captions are cut"""
    sampling: float = 0.0
    """alpha of SentencePiece's random segmentation (0.1 to 0.5 is usual); 0 = off"""
    mlm_probability: float = 0.15
    """share of the tokens that masked language modelling asks for"""
    captions: int = 1
    """captions drawn at each visit, different ones as far as there are"""

    def __post_init__(self) -> None:
        _check(self, "length", self.length >= 3, "3 or more (BOS, one token, EOS)")
        _check(self, "captions", self.captions >= 1, "1 or more")
        for name in ("sampling", "mlm_probability"):
            _check(self, name, 0 <= getattr(self, name) <= 1, "0 to 1")


@dataclass(frozen=True)
class MixtureConfig:
    """Several sources in one stream."""

    sources: Mapping[str, SourceConfig]
    """by name; the order is that of the batches"""
    batch_size: int
    """samples per rank and micro-step"""
    image: ImageConfig = field(default_factory=ImageConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    text: TextConfig = field(default_factory=TextConfig)
    seed: int = 0
    """of order, crops, flips, segments, captions and masks"""
    workers: int = 2
    """threads that decode; 0 = decode in the calling thread"""
    prefetch: int = 4
    """batches prepared ahead"""
    max_broken: float = 0.05
    """the run stops when more than this share of the samples is broken (judged from 20 on)"""
    stall_warning: float = 60.0
    """seconds after which a batch that does not come is announced, with the threads and their samples"""
    stall_limit: float = 600.0
    """seconds after which it ends the run; 0 = never"""
    quarantine: str = ""
    """file to which broken samples are appended, one JSON object per line; empty = none"""

    def __post_init__(self) -> None:
        shares({name: source.weight for name, source in self.sources.items()})
        _check(self, "batch_size", self.batch_size >= 1, "1 or more")
        _check(self, "seed", 0 <= self.seed < 2**63, "0 to 2**63 - 1")
        _check(self, "workers", self.workers >= 0, "0 or more")
        _check(self, "prefetch", self.prefetch >= 1, "1 or more")
        _check(self, "max_broken", 0 <= self.max_broken <= 1, "0 to 1")
        for name in ("stall_warning", "stall_limit"):
            _check(self, name, getattr(self, name) >= 0, "0 or more")
