"""One sample of the multimodal loader: whatever of picture, sound, video and text it has, from its own random
numbers; and many of them as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from dataload import audio, images, order, sandbox, video
from dataload.broken import Broken, BrokenSample
from dataload.decode.crops import crop_box
from dataload.masking import mim_mask, mlm_mask
from dataload.multimodal.batch import MultimodalBatch
from dataload.multimodal.config import MixtureConfig
from dataload.multimodal.origin import Origin
from dataload.packed import pack
from dataload.resize import resize
from dataload.stages import Stages
from dataload.substitute import Attempt, describe
from dataload.tokenizer import BOS, EOS, Tokenizer

_SOURCE = 1 << 48
"""Sample numbers of source i begin at i times this in the counters of random numbers: two sources share none."""


@dataclass
class Clip:
    """One sample before it is put into a batch; None for what it does not have."""

    source: int = 0
    sample: int = 0
    image: np.ndarray | None = None
    """uint8 [H, W, 3]"""
    crops: np.ndarray | None = None
    """uint8 [views - 1, H, W, 3]: further views of it, for evaluation"""
    image_mask: np.ndarray | None = None
    """bool [H/cell, W/cell]"""
    audio: np.ndarray | None = None
    """float32 [n], 16 kHz"""
    frames: np.ndarray | None = None
    """uint8 [F, H, W, 3]"""
    times: np.ndarray | None = None
    """float32 [F], seconds"""
    text: list[np.ndarray] | None = None
    """of each caption int64 [3, T]: tokens, mlm_tokens, mlm_targets"""
    broken: list[Broken] = field(default_factory=list)
    """what was tried before, and what is missing of this one"""
    notes: list[str] = field(default_factory=list)
    """what is missing of it although it is used, in words"""


class ClipMaker:
    """Makes samples. Thread-safe; the result depends on (seed, source, epoch, sample) and on nothing else."""

    def __init__(self, config: MixtureConfig, tokenizer: Tokenizer, stages: Stages) -> None:
        self._config, self._tokenizer, self.stages = config, tokenizer, stages
        self._sandbox = sandbox.shared(max(1, config.workers))

    def draw(self, origin: Origin, number: int, epoch: int, wanted: int) -> Clip:
        """A sample of source `number` as it is in that epoch, or a substitute of the same source."""
        base = number * _SOURCE
        attempt = Attempt(
            wanted,
            origin.stream,
            lambda: order.generator(self._config.seed, epoch, base + wanted, order.SUBSTITUTE),
            origin.index,
        )
        while True:
            self.stages.begin(origin.index.key(attempt.sample))
            try:
                clip = self._make(origin, base, epoch, attempt.sample)
                break
            except (BrokenSample, OSError) as error:
                attempt.fail(error)
        partial = [describe(origin.index, attempt.sample, note, "partial") for note in clip.notes]
        clip.source, clip.sample, clip.broken = number, attempt.sample, attempt.broken + partial
        return clip

    def plain(self, origin: Origin, sample: int, views: int = 1) -> Clip:
        """A sample by itself, without a substitute: raises BrokenSample or OSError. views: of its picture
        (`dataload.images.views`)."""
        clip = self._make(origin, 0, 0, sample, views)
        clip.sample = sample
        return clip

    def _make(self, origin: Origin, base: int, epoch: int, sample: int, views: int = 1) -> Clip:
        config, index = self._config, origin.index

        def rng(purpose: int) -> np.random.Generator:
            return order.generator(config.seed, epoch, base + sample, purpose)

        clip = Clip()
        flipped = None  # one answer for a sample's picture and video: they share their captions
        if origin.has(sample, "image"):
            flipped = self._image(clip, self._fetch(origin, sample, "image"), rng(order.IMAGE), views)
            grid = config.image.size // config.image.cell
            clip.image_mask = mim_mask((grid, grid), rng(order.MIM), config.image.mask_ratio)
        if origin.has(sample, "audio"):
            data = self._fetch(origin, sample, "audio")
            with self.stages("audio"):
                self._audio(clip, data, rng(order.AUDIO))
        if origin.has(sample, "video"):
            sound = config.video.sound and "audio" in origin.config.modalities and clip.audio is None
            data = self._fetch(origin, sample, "video")
            with self.stages("video"):
                flipped = self._video(clip, data, sound, rng(order.VIDEO), flipped)
        if origin.has(sample, "text"):
            with self.stages("fetch"):
                captions = index.captions(sample)
            with self.stages("text"):
                clip.text = self._text(captions, rng(order.TEXT), bool(flipped))
        return clip

    def _fetch(self, origin: Origin, sample: int, kind: str) -> bytes:
        with self.stages("fetch"):
            return origin.index.media(sample, kind)

    def _image(self, clip: Clip, data: bytes, rng: np.random.Generator, views: int) -> bool:
        """Sets the picture and, of several views, the others; returns whether it is mirrored."""
        config = self._config.image
        with self.stages("image"):
            picture = images.read(data, config.max_pixels, self._sandbox)
            flipped = rng.random() < config.flip  # first, so that it does not depend on the crop's settings
            box = crop_box(picture.width, picture.height, rng, config.crop_scale, config.crop_ratio)
            pixels = picture.cut(box, lend=True)
            clip.image = resize(pixels, config.size, config.interpolation, mirror=flipped)
            if views > 1:
                square = Image.fromarray(np.ascontiguousarray(pixels))
                clip.crops = images.views(square, config.size, views, config.interpolation)[1:]
            if config.color_jitter:
                colored = images.color_jitter(Image.fromarray(clip.image), config.color_jitter, rng)
                clip.image = np.asarray(colored)
        return flipped

    def _audio(self, clip: Clip, data: bytes, rng: np.random.Generator) -> None:
        sound = audio.decode(
            data, seconds=self._config.audio.seconds, place=rng.random(), sandbox=self._sandbox
        )
        clip.audio = sound.samples
        if sound.problem:
            clip.notes.append(f"the sound is not whole: {sound.problem}")

    def _video(
        self, clip: Clip, data: bytes, sound: bool, rng: np.random.Generator, flipped: bool | None
    ) -> bool:
        """Sets the frames, and the sound where it is asked for and there; returns whether they are mirrored."""
        config = self._config.video
        draw = rng.random() < config.flip
        flipped = draw if flipped is None else flipped
        found = video.decode(
            data,
            frames=config.frames,
            seconds=config.seconds,
            rng=rng,
            size=config.size,
            scale=config.crop_scale,
            ratio=config.crop_ratio,
            flip=float(flipped),
            sound=sound,
            sandbox=self._sandbox,
        )
        clip.frames, clip.times = found.frames, found.times.astype(np.float32)
        if found.sound is not None:
            clip.audio = found.sound[: round(self._config.audio.seconds * audio.RATE)]
        if found.problem:
            clip.notes.append(f"the video is not whole: {found.problem}")
        return flipped

    def _text(self, captions: list[str], rng: np.random.Generator, flipped: bool) -> list[np.ndarray]:
        """Of each caption that is drawn int64 [3, T]: tokens, mlm_tokens, mlm_targets. Fewer captions than asked for are
        repeated in turn."""
        config, tokenizer = self._config.text, self._tokenizer
        count = config.captions
        picks = [int(rng.integers(len(captions)))] if count == 1 else rng.permutation(len(captions)).tolist()
        rows = []
        for i in range(count):
            caption = captions[picks[i % len(picks)]]
            if flipped:
                caption = images.mirror_caption(caption)
            if config.sampling:
                ids = tokenizer.sample(caption, config.sampling, int(rng.integers(2**31)))
            else:
                ids = tokenizer.encode(caption)
            tokens = np.array([BOS, *ids[: config.length - 2], EOS], dtype=np.int64)
            masked, targets = mlm_mask(tokens, rng, tokenizer.word_starts, config.mlm_probability)
            rows.append(np.stack([tokens, masked, targets]))
        return rows


def collate(config: MixtureConfig, clips: Sequence[Clip], keys: tuple[str, ...]) -> MultimodalBatch:
    """One batch of B samples, in their order, without padding."""

    def of(name: str) -> tuple[list[Any], torch.Tensor]:
        """What the samples have of it, and which samples these are."""
        have = [i for i, clip in enumerate(clips) if getattr(clip, name) is not None]
        return [getattr(clips[i], name) for i in have], torch.tensor(have, dtype=torch.int64)

    size, cells = config.image.size, config.image.size // config.image.cell
    pictures, image_sample = of("image")
    masks, _ = of("image_mask")
    sounds, audio_sample = of("audio")
    frames, video_sample = of("frames")
    times, _ = of("times")
    of_samples, owners = of("text")
    texts = [text for of_sample in of_samples for text in of_sample]
    text_sample = owners.repeat_interleave(torch.tensor([len(one) for one in of_samples], dtype=torch.int64))
    side = config.video.size
    tokens, masked, targets = (
        pack([text[i] for text in texts], like=torch.zeros(0, dtype=torch.int64)) for i in range(3)
    )
    return MultimodalBatch(
        images=_stack(pictures, (size, size, 3), np.uint8),
        image_sample=image_sample,
        image_mask=_stack(masks, (cells, cells), np.bool_),
        audio=pack(sounds, like=torch.zeros(0, dtype=torch.float32)),
        audio_sample=audio_sample,
        video=pack(frames, like=torch.zeros((0, side, side, 3), dtype=torch.uint8)),
        video_times=pack(times, like=torch.zeros(0, dtype=torch.float32)).values,
        video_sample=video_sample,
        text=tokens,
        mlm_tokens=masked.values,
        mlm_targets=targets.values,
        text_sample=text_sample,
        sources=torch.tensor([clip.source for clip in clips], dtype=torch.int64),
        keys=keys,
    )


def _stack(arrays: list[np.ndarray], shape: tuple[int, ...], dtype: type) -> torch.Tensor:
    """[len(arrays), *shape], also where there is none."""
    stacked: np.ndarray = np.empty((len(arrays), *shape), dtype=dtype)
    for i, array in enumerate(arrays):
        stacked[i] = array
    return torch.from_numpy(stacked)
