"""One training sample: fetch, decode, crop, flip, and its tokens or its mask, from the sample's own random
numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from dataload import images, order
from dataload.broken import Broken, BrokenSample, TooManyBroken
from dataload.masking import mim_mask, mlm_mask
from dataload.shards import ShardIndex
from dataload.stages import Stages
from dataload.tokenizer import Tokenizer

PATCH = 32
"""Side of a cell of the MIM mask, in pixels."""
INTERPOLATIONS = tuple(images.INTERPOLATIONS)
_SUBSTITUTES = 20
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
    workers: int = 2
    """threads that decode; 0 = decode in the calling thread"""
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
class Drawn:
    """One sample before it is put into a batch."""

    sample: int
    image: np.ndarray
    """uint8 [H, W, 3]"""
    text: np.ndarray | None
    """int64 [3, K, T]: tokens, mlm_tokens, mlm_targets; None for an uncaptioned sample"""
    mask: np.ndarray | None
    """bool [H/32, W/32]; None for a captioned sample"""
    broken: list[Broken]
    """what was tried before"""


class SampleMaker:
    """Makes samples of an index. Thread-safe; the result depends on (seed, epoch, sample) and on nothing
    else."""

    def __init__(self, config: LoaderConfig, index: ShardIndex, tokenizer: Tokenizer, stages: Stages) -> None:
        self._stages = stages
        self._config = config
        self._index = index
        self._tokenizer = tokenizer

    def draw(self, source: order.Source, epoch: int, wanted: int, captioned: bool) -> Drawn:
        """A sample as it is in that epoch; if it is broken, a substitute from the same source, drawn from the
        broken sample's own random numbers. Raises TooManyBroken where no substitute of 20 is whole either."""
        broken: list[Broken] = []
        sample, rng = wanted, None
        while True:
            try:
                return self._make(epoch, sample, captioned, broken)
            except (BrokenSample, OSError) as error:
                broken.append(Broken(*self._index.where(sample), str(error)))
            if len(broken) > _SUBSTITUTES:
                few = "; ".join(str(one) for one in broken[:3])
                raise TooManyBroken(f"a sample and {_SUBSTITUTES} substitutes for it are broken: {few}; ...")
            if rng is None:
                rng = order.generator(self._config.seed, epoch, wanted, order.SUBSTITUTE)
            sample = int(source.all[rng.integers(len(source))])

    def _make(self, epoch: int, sample: int, captioned: bool, broken: list[Broken]) -> Drawn:
        config = self._config
        image, flipped = self._image(epoch, sample)
        if captioned:
            return Drawn(sample, image, self._text(epoch, sample, flipped), None, broken)
        grid = (config.image_size // PATCH, config.image_size // PATCH)
        with self._stages("mask"):
            mask = mim_mask(grid, order.generator(config.seed, epoch, sample, order.MIM), config.mim_ratio)
        return Drawn(sample, image, None, mask, broken)

    def _image(self, epoch: int, sample: int) -> tuple[np.ndarray, bool]:
        """uint8 [H, W, 3], and whether it is mirrored."""
        config = self._config
        with self._stages("fetch"):
            data = self._index.image(sample)
        with self._stages("decode"):
            picture = images.decode(data, config.max_pixels)
        with self._stages("augment"):
            rng = order.generator(config.seed, epoch, sample, order.IMAGE)
            flipped = rng.random() < config.flip  # first, so that it does not depend on the crop's settings
            picture = images.random_resized_crop(
                picture, config.image_size, rng, config.crop_scale, config.crop_ratio, config.interpolation
            )
            if config.color_jitter:
                picture = images.color_jitter(picture, config.color_jitter, rng)
            if flipped:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return np.asarray(picture), flipped

    def _text(self, epoch: int, sample: int, flipped: bool) -> np.ndarray:
        """int64 [3, K, T], see `Drawn.text`."""
        rng = order.generator(self._config.seed, epoch, sample, order.TEXT)
        with self._stages("fetch"):
            captions = self._index.captions(sample)
        with self._stages("text"):
            return self._rows(captions, rng, flipped)

    def _rows(self, captions: list[str], rng: np.random.Generator, flipped: bool) -> np.ndarray:
        config, tokenizer = self._config, self._tokenizer
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
