"""Evaluation data: every captioned image once, in the order of the shards, with all of its captions."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import torch
from PIL import Image

from dataload import images, sandbox, shards
from dataload.batch import EvalBatch
from dataload.broken import Broken
from dataload.tokenizer import Tokenizer
from dataload.workers import Workers


class EvalSet:
    """The captioned images of some shards. Iterate as often as wanted; each pass gives the same batches.

    Images are resized and centre-cropped. `len()` is the number of images, before broken ones are left out.
    Samples without captions are not part of it (`uncaptioned` says how many there are); broken images are
    left out of the batches and listed in `broken` as they are met. Raises what `shards.expand` and
    `shards.index` raise, and ValueError where nothing has a caption.
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

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[EvalBatch]:
        starts = deque(range(0, len(self._samples), self._batch_size))
        pending: deque[tuple[list[int], list[Future[np.ndarray | Broken]]]] = deque()
        workers = Workers(self._workers, threading.Event(), "dataload-eval")
        try:
            while starts or pending:
                while starts and len(pending) < 3:
                    start = starts.popleft()
                    samples = self._samples[start : start + self._batch_size]
                    pending.append((samples, [workers.submit(self._image, sample) for sample in samples]))
                samples, futures = pending.popleft()
                whole = []
                for sample, future in zip(samples, futures, strict=True):
                    image = future.result()
                    if not isinstance(image, Broken):
                        whole.append((sample, image))
                    elif image not in self.broken:
                        self.broken.append(image)
                if whole:
                    yield self._collect(whole)
        finally:  # also when the reader stops half way
            workers.close()

    def _image(self, sample: int) -> np.ndarray | Broken:
        try:
            data = self.index.image(sample)
            picture = images.read(data, self._max_pixels, sandbox.shared(self._workers))
            pixels = picture.cut((0, 0, picture.width, picture.height))
        except (images.BrokenImage, OSError) as error:
            return Broken(*self.index.where(sample), str(error))
        return images.resize_center_crop(Image.fromarray(pixels), self._image_size, self._interpolation)

    def _collect(self, whole: list[tuple[int, np.ndarray]]) -> EvalBatch:
        captions = [self.index.captions(sample) for sample, _ in whole]
        texts = [text for of_image in captions for text in of_image]
        counts = torch.tensor([len(of_image) for of_image in captions])
        return EvalBatch(
            images=torch.from_numpy(np.stack([image for _, image in whole])),
            captions=captions,
            tokens=self._tokenizer.encode_batch(texts, self._text_length),
            image_of_caption=torch.repeat_interleave(torch.arange(len(whole)), counts),
            keys=tuple(self.index.key(sample) for sample, _ in whole),
        )
