"""Evaluation data: every captioned image once, in the order of the shards, with all of its captions."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from dataload import images, sandbox, shards
from dataload.batch import EvalBatch
from dataload.broken import Broken
from dataload.prefetch import Limits, wait
from dataload.tokenizer import Tokenizer
from dataload.workers import Workers

Read: TypeAlias = tuple[np.ndarray, list[str]]
"""the views of a picture, uint8 [views, H, W, 3], and its captions"""


class EvalSet:
    """The captioned images of some shards. Iterate as often as wanted; each pass gives the same batches.

    Images are resized and centre-cropped. `len()` is the number of images, before broken ones are left out.
    Samples without captions are not part of it (`uncaptioned` says how many there are); broken images, and those whose
    captions cannot be fetched, are left out of the batches and listed in `broken` as they are met. Raises what
    `shards.expand` and `shards.index` raise, and ValueError where nothing has a caption. Iterating raises WorkerStuck
    where an image takes longer than `limits.stop`.
    """

    def __init__(
        self,
        shard_patterns: Sequence[str],
        tokenizer: Tokenizer,
        image_size: int,
        text_length: int,
        *,
        batch_size: int = 64,
        interpolation: str = "bilinear",
        workers: int = 2,
        max_pixels: int = images.MAX_PIXELS,
        limits: Limits | None = None,
    ) -> None:
        self.index = shards.index(shards.expand(shard_patterns))
        self._samples = [
            int(sample) for sample in np.flatnonzero(self.index.captioned & self.index.has("image"))
        ]
        if not self._samples:
            raise ValueError(f"no sample of {list(shard_patterns)} has a caption")
        self.uncaptioned = len(self.index) - len(self._samples)
        """samples without captions, which are not part of the set"""
        self.broken: list[Broken] = []
        """images that could not be read, each once"""
        self._tokenizer = tokenizer
        self._image_size = image_size
        self._text_length = text_length
        self._batch_size = batch_size
        self._interpolation = interpolation
        self._workers = max(1, workers)
        self._max_pixels = max_pixels
        self._limits = limits or Limits()

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[EvalBatch]:
        return self.batches()

    def batches(self, views: int = 1) -> Iterator[EvalBatch]:
        """A pass over the set, with so many views of each picture (`dataload.images.views`)."""
        starts = deque(range(0, len(self._samples), self._batch_size))
        pending: deque[tuple[list[int], list[Future[Read | Broken]]]] = deque()
        workers = Workers(self._workers, threading.Event(), "dataload-eval")
        try:
            while starts or pending:
                while starts and len(pending) < 3:
                    start = starts.popleft()
                    samples = self._samples[start : start + self._batch_size]
                    pending.append(
                        (samples, [workers.submit(self._read, sample, views) for sample in samples])
                    )
                samples, futures = pending.popleft()
                whole = []
                for sample, future in zip(samples, futures, strict=True):
                    read = wait(future, self._limits, workers.dead, partial(self._at, sample))
                    if not isinstance(read, Broken):
                        whole.append((sample, *read))
                    elif read not in self.broken:
                        self.broken.append(read)
                if whole:
                    yield self._collect(whole)
        finally:  # also when the reader stops half way
            workers.close()

    def _read(self, sample: int, views: int) -> Read | Broken:
        try:
            data, captions = self.index.image(sample), self.index.captions(sample)
            picture = images.read(data, self._max_pixels, sandbox.shared(self._workers))
            pixels = picture.cut((0, 0, picture.width, picture.height))
        except (images.BrokenImage, OSError) as error:
            return Broken(*self.index.where(sample), str(error))
        small = images.views(Image.fromarray(pixels), self._image_size, views, self._interpolation)
        return small, captions

    def _at(self, sample: int) -> str:
        where = self.index.where(sample)
        return f"reading {where[1]} of {where[0]}"

    def _collect(self, whole: list[tuple[int, np.ndarray, list[str]]]) -> EvalBatch:
        captions = [texts for _, _, texts in whole]
        texts = [text for of_image in captions for text in of_image]
        counts = torch.tensor([len(of_image) for of_image in captions])
        pictures = torch.from_numpy(np.stack([views for _, views, _ in whole]))
        return EvalBatch(
            images=pictures[:, 0].clone(),  # kept for longer than the crops
            captions=captions,
            tokens=self._tokenizer.encode_batch(texts, self._text_length),
            image_of_caption=torch.repeat_interleave(torch.arange(len(whole)), counts),
            keys=tuple(self.index.key(sample) for sample, _, _ in whole),
            crops=pictures[:, 1:] if pictures.shape[1] > 1 else None,
        )
