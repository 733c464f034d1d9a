"""One training sample: fetch, decode, crop, flip, and its tokens or its mask, from the sample's own random
numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from dataload import images, order, prefetch, sandbox, substitute
from dataload.broken import Broken, BrokenSample
from dataload.masking import mim_mask, mlm_mask
from dataload.resize import resize
from dataload.shards import ShardIndex
from dataload.stages import Stages
from dataload.tokenizer import Tokenizer

PATCH = 32
"""Side of a cell of the MIM mask, in pixels."""
INTERPOLATIONS = tuple(images.INTERPOLATIONS)
BACKENDS = ("auto", "cpu", "dali")
_SHARES = (
    "flip",
    "color_jitter",
    "mim_ratio",
    "mlm_probability",
    "mlm_share",
    "max_broken",
    "tokenizer_sampling",
)


@dataclass(frozen=True)
class LoaderConfig:
    """What the training loader does. Every field can be set on the command line; ValueError for impossible
    values."""

    shards: tuple[str, ...]
    """tars, folders of tars, globs, brace ranges such as train-{000..011}.tar"""
    batch_size: int
    """samples per rank and micro-step: pairs and uncaptioned images together"""
    image_size: int
    """side of the square pictures, a multiple of 32"""
    text_length: int
    """tokens per caption, BOS and EOS included; longer captions are cut"""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """share of the picture's area that a crop covers: smallest, largest"""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """width / height of a crop before it is resized: smallest, largest"""
    flip: float = 0.5
    """probability of mirroring; "left" and "right" in the caption are then swapped"""
    interpolation: str = "bilinear"
    """bilinear or bicubic"""
    color_jitter: float = 0.0
    """brightness, contrast and saturation are each scaled by a factor within 1 - this .. 1 + this; 0 = off"""
    uncaptioned_fraction: float | None = None
    """share of uncaptioned images among the samples; None = the data's own share"""
    mim_ratio: float = 0.6
    """share of an uncaptioned image's 32 x 32 cells that is masked"""
    mlm_probability: float = 0.15
    """share of a caption's tokens that the model is asked for"""
    mlm_share: float = 1.0
    """share of the captions that masked language modelling reads (they come first); others cost nothing"""
    tokenizer_sampling: float = 0.0
    """alpha of SentencePiece's random segmentation (0.1 to 0.5 is usual); 0 = off"""
    captions_per_image: int = 1
    """captions drawn per pair, different ones as far as there are"""
    seed: int = 0
    """of order, crops, flips, captions and masks"""
    backend: str = "auto"
    """what decodes: cpu (simplejpeg and Pillow), dali (its formats by NVIDIA DALI, the rest as cpu does), or auto: dali where
    it is installed and `device` is a GPU, else cpu"""
    device: str = "auto"
    """where DALI decodes and its pictures stay: cpu, cuda, cuda:1 ...; auto: the current GPU if there is one"""
    workers: int = 2
    """threads that decode; 0 = decode in the calling thread (DALI takes one of its own)"""
    prefetch: int = 4
    """batches prepared ahead"""
    max_broken: float = 0.05
    """the run stops when more than this share of the pictures is broken (judged from 20 on)"""
    max_pixels: int = images.MAX_PIXELS
    """a picture whose header declares more pixels counts as broken"""
    stall_warning: float = 60.0
    """seconds after which a batch that does not come is announced, with the threads and their samples"""
    stall_limit: float = 600.0
    """seconds after which it ends the run; 0 = never"""
    exclude: tuple[str, ...] = ()
    """files that list samples to leave out: a quarantine file, or what dataload.verify and dataload.stats write"""
    quarantine: str = ""
    """file to which broken samples are appended, one JSON object per line; empty = none"""

    def __post_init__(self) -> None:
        def check(name: str, good: bool, supported: str) -> None:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; supported: {supported}")

        check("batch_size", self.batch_size >= 1, "1 or more")
        check("image_size", self.image_size > 0 and self.image_size % PATCH == 0, f"multiples of {PATCH}")
        check("text_length", self.text_length >= 3, "3 or more (BOS, one token, EOS)")
        check("crop_scale", 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1, "0 < smallest <= largest <= 1")
        check("crop_ratio", 0 < self.crop_ratio[0] <= self.crop_ratio[1], "0 < smallest <= largest")
        check("interpolation", self.interpolation in INTERPOLATIONS, ", ".join(INTERPOLATIONS))
        check("backend", self.backend in BACKENDS, ", ".join(BACKENDS))
        check(
            "device",
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            "auto, cpu, cuda, cuda:N",
        )
        for name in _SHARES:
            check(name, 0 <= getattr(self, name) <= 1, "0 to 1")
        fraction = self.uncaptioned_fraction
        check("uncaptioned_fraction", fraction is None or 0 <= fraction <= 1, "0 to 1, or None")
        check("captions_per_image", self.captions_per_image >= 1, "1 or more")
        check("seed", 0 <= self.seed < 2**63, "0 to 2**63 - 1")
        check("workers", self.workers >= 0, "0 or more")
        for name in ("stall_warning", "stall_limit"):
            check(name, getattr(self, name) >= 0, "0 or more")
        check("prefetch", self.prefetch >= 1, "1 or more")


@dataclass(frozen=True)
class Job:
    """A sample that is wanted: `sample` of `source` as it is in that epoch."""

    source: order.Source
    epoch: int
    sample: int
    captioned: bool


@dataclass(frozen=True)
class View:
    """A picture, and what a sample shows of it."""

    picture: images.Picture
    box: tuple[int, int, int, int]
    """left, top, width, height of the crop in the upright picture"""
    flipped: bool
    rng: np.random.Generator
    """the sample's own, after the draws of the above"""


@dataclass(frozen=True)
class Drawn:
    """One sample before it is put into a batch; its picture is there already."""

    sample: int
    text: np.ndarray | None
    """int64 [3, K, T]: tokens, mlm_tokens, mlm_targets; None for an uncaptioned sample"""
    mask: np.ndarray | None
    """bool [H/32, W/32]; None for a captioned sample"""
    broken: list[Broken]
    """what was tried before"""


@dataclass(frozen=True)
class Work(prefetch.Work[Drawn]):
    """A batch that is being made."""

    images: torch.Tensor
    """uint8 [B, H, W, 3], whole when all parts are done"""


class Attempt(substitute.Attempt):
    """A job on its way."""

    def __init__(self, job: Job, seed: int, index: ShardIndex) -> None:
        super().__init__(
            job.sample,
            job.source,
            lambda: order.generator(seed, job.epoch, job.sample, order.SUBSTITUTE),
            index,
        )
        self.job = job


class SampleMaker:
    """Makes samples of an index. Thread-safe; the result depends on (seed, epoch, sample) and on nothing
    else."""

    def __init__(self, config: LoaderConfig, index: ShardIndex, tokenizer: Tokenizer, stages: Stages) -> None:
        self.config = config
        self.stages = stages
        self._index = index
        self._tokenizer = tokenizer

    def attempt(self, job: Job) -> Attempt:
        """The first try at a sample."""
        return Attempt(job, self.config.seed, self._index)

    def name(self, attempts: Iterable[Attempt]) -> str:
        """Some samples, for a message."""
        keys = [self._index.key(attempt.sample) for attempt in attempts]
        return f"{keys[0]} and {len(keys) - 1} more" if len(keys) > 1 else "".join(keys)

    def draw(self, job: Job, out: np.ndarray) -> Drawn:
        """A sample, or a substitute where it is broken; its picture goes to `out`, uint8 [H, W, 3]. Raises TooManyBroken."""
        attempt = self.attempt(job)
        while True:
            try:
                view = self.view(attempt)
                with self.stages("decode"):
                    crop = view.picture.cut(view.box, lend=True)
                self.show(view, crop, out)
                return self.finish(attempt, view)
            except (BrokenSample, OSError) as error:
                attempt.fail(error)

    def view(self, attempt: Attempt) -> View:
        """Reads the picture and draws crop and flip. Raises BrokenSample or OSError, as the next two do."""
        config = self.config
        self.stages.begin(self._index.key(attempt.sample))
        with self.stages("fetch"):
            data = self._index.image(attempt.sample)
        with self.stages("header"):
            picture = images.read(data, config.max_pixels, sandbox.shared(max(1, config.workers)))
        rng = order.generator(config.seed, attempt.job.epoch, attempt.sample, order.IMAGE)
        flipped = rng.random() < config.flip  # first, so that it does not depend on the crop's settings
        box = images.crop_box(picture.width, picture.height, rng, config.crop_scale, config.crop_ratio)
        return View(picture, box, flipped, rng)

    def show(self, view: View, crop: np.ndarray, out: np.ndarray) -> None:
        """From the pixels of the crop, uint8 of its size, to the sample's picture."""
        with self.stages("resize"):
            resize(crop, self.config.image_size, self.config.interpolation, mirror=view.flipped, out=out)
            self.jitter(view, out)

    def jitter(self, view: View, out: np.ndarray) -> None:
        """Changes the colours of a picture that is otherwise done, where that is wanted."""
        if self.config.color_jitter:
            out[...] = np.asarray(
                images.color_jitter(Image.fromarray(out), self.config.color_jitter, view.rng)
            )

    def finish(self, attempt: Attempt, view: View) -> Drawn:
        """All but the picture."""
        config, epoch, sample = self.config, attempt.job.epoch, attempt.sample
        if attempt.job.captioned:
            return Drawn(sample, self._text(epoch, sample, view.flipped), None, attempt.broken)
        grid = (config.image_size // PATCH, config.image_size // PATCH)
        with self.stages("mask"):
            mask = mim_mask(grid, order.generator(config.seed, epoch, sample, order.MIM), config.mim_ratio)
        return Drawn(sample, None, mask, attempt.broken)

    def _text(self, epoch: int, sample: int, flipped: bool) -> np.ndarray:
        """int64 [3, K, T], see `Drawn.text`."""
        rng = order.generator(self.config.seed, epoch, sample, order.TEXT)
        with self.stages("fetch"):
            captions = self._index.captions(sample)
        with self.stages("text"):
            return self._rows(captions, rng, flipped)

    def _rows(self, captions: list[str], rng: np.random.Generator, flipped: bool) -> np.ndarray:
        config, tokenizer = self.config, self._tokenizer
        count, length = config.captions_per_image, config.text_length
        picks = rng.permutation(len(captions)).tolist()[:count]
        text = np.empty((3, count, length), dtype=np.int64)
        for i in range(count):
            caption = captions[picks[i % len(picks)]]  # fewer captions than asked for: repeated in turn
            if flipped:
                caption = images.mirror_caption(caption)
            if config.tokenizer_sampling:
                ids = tokenizer.sample(caption, config.tokenizer_sampling, int(rng.integers(2**31)))
            else:
                ids = tokenizer.encode(caption)
            tokens = text[0, i] = tokenizer.row(ids, length)
            text[1:, i] = mlm_mask(tokens, rng, tokenizer.word_starts, config.mlm_probability)
        return text
