"""Evaluation data of one kind of pair: every sample once, in the order of the shards, unaugmented, with all its captions."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from dataload.broken import Broken, BrokenSample
from dataload.multimodal.batch import MultimodalBatch
from dataload.multimodal.config import MixtureConfig, SourceConfig
from dataload.multimodal.loader import STAGES, Origin
from dataload.multimodal.sample import Clip, ClipMaker, collate
from dataload.packed import Packed, pack
from dataload.stages import Stages
from dataload.tokenizer import BOS, EOS, Tokenizer


@dataclass(frozen=True)
class PairBatch:
    """B samples and their S captions."""

    media: MultimodalBatch
    """the samples; its texts are one caption of each"""
    captions: list[list[str]]
    """of each sample"""
    texts: Packed
    """int64: S captions, each BOS, ids, EOS"""
    sample_of_text: torch.Tensor
    """int64 [S]: 0..B-1"""
    crops: torch.Tensor | None = None
    """uint8 [B, views - 1, H, W, 3]: further views of the pictures (`dataload.images.views`), where those were asked for"""


class PairSet:
    """The usable samples of one source. Iterate as often as wanted; each pass gives the same batches.

    Pictures and frames are cropped to the largest centred square, never mirrored; of longer sounds and videos each pass takes
    the same part. What is broken is left out and listed in `broken` as it is met.
    """

    def __init__(
        self,
        name: str,
        source: SourceConfig,
        config: MixtureConfig,
        tokenizer: Tokenizer,
        batch_size: int = 32,
    ) -> None:
        """config: sizes of everything, as in training; its sources and augmentation do not count."""
        whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}
        self._config = replace(
            config,
            image=replace(config.image, color_jitter=0.0, **whole),  # type: ignore[arg-type]
            video=replace(config.video, **whole),  # type: ignore[arg-type]
            text=replace(config.text, sampling=0.0, captions=1),
        )
        self.name, self._tokenizer, self._batch_size = name, tokenizer, batch_size
        self._origin = Origin(name, source, config.seed, 0)
        needs = [
            self._origin.index.captioned if kind == "text" else self._origin.index.has(kind)
            for kind in source.needs
        ]
        usable = torch.from_numpy(needs[0].copy())
        for have in needs[1:]:
            usable &= torch.from_numpy(have)
        self._samples = usable.nonzero()[:, 0].tolist()
        self._maker = ClipMaker(self._config, tokenizer, Stages(STAGES))
        self.broken: list[Broken] = []
        """samples that could not be read, each once"""

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def manifest(self) -> str:
        """Hash of what the shards hold."""
        return str(self._origin.index.manifest["hash"])

    def __iter__(self) -> Iterator[PairBatch]:
        return self.first(len(self))

    def first(self, count: int, views: int = 1) -> Iterator[PairBatch]:
        """The first `count` samples. views: of each picture (`dataload.images.views`), where every sample has one."""
        samples = self._samples[:count]
        with ThreadPoolExecutor(max(1, self._config.workers), "dataload-pairs") as pool:
            for start in range(0, len(samples), self._batch_size):
                made = list(pool.map(partial(self._make, views), samples[start : start + self._batch_size]))
                if clips := [clip for clip in made if clip is not None]:
                    yield self._collect(clips)

    def _make(self, views: int, sample: int) -> Clip | None:
        try:
            return self._maker.plain(self._origin, sample, views)
        except (BrokenSample, OSError) as error:
            found = Broken(*self._origin.index.where(sample), str(error))
            if found not in self.broken:
                self.broken.append(found)
            return None

    def _collect(self, clips: list[Clip]) -> PairBatch:
        index = self._origin.index
        captions = [index.captions(clip.sample) for clip in clips]
        length = self._config.text.length
        texts = [
            torch.tensor([BOS, *self._tokenizer.encode(text)[: length - 2], EOS])
            for of_sample in captions
            for text in of_sample
        ]
        counts = torch.tensor([len(of_sample) for of_sample in captions])
        keys = tuple(index.key(clip.sample) for clip in clips)
        owners = torch.arange(len(clips)).repeat_interleave(counts)
        seen = [clip.crops for clip in clips if clip.crops is not None]
        crops = torch.from_numpy(np.stack(seen)) if len(seen) == len(clips) else None
        return PairBatch(collate(self._config, clips, keys), captions, pack(texts), owners, crops)
