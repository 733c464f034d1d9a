"""One source of a mixture."""

from __future__ import annotations

import numpy as np

from dataload import order, shards
from dataload.multimodal.config import SourceConfig
from dataload.shards import ShardIndex
from dataload.shards.ahead import ReadAhead


class Origin:
    """One source of the mixture: its shards, and the endless stream of those of its samples that can be used."""

    def __init__(
        self, name: str, config: SourceConfig, seed: int, number: int, ahead: ReadAhead | None = None
    ) -> None:
        self.name = name
        self.config = config
        self.index: ShardIndex = shards.index(shards.expand(config.shards), exclude=config.exclude)
        self._have = have = {kind: self._all(kind) for kind in config.modalities}
        usable = np.any(list(have.values()), axis=0)
        for kind in config.needs:
            usable &= have[kind]
        self.left_out = int(len(usable) - usable.sum())
        """samples that lack what the source needs"""
        if not usable.any():
            counts = ", ".join(f"{int(has.sum())} have {kind}" for kind, has in have.items())
            wanted = " and ".join(config.needs) or "anything that it reads"
            raise ValueError(f"source {name!r}: none of its {len(usable)} samples has {wanted} ({counts})")
        per_shard, start = [], 0
        for shard in self.index.shards:
            per_shard.append(start + np.flatnonzero(usable[start : start + len(shard)]))
            start += len(shard)
        begun = ahead.of(self.index.shards) if ahead is not None else None
        self.stream = order.Source(per_shard, seed, number, begun)

    def has(self, sample: int, kind: str) -> bool:
        """Whether the sample has this modality, and the source reads it."""
        return kind in self._have and bool(self._have[kind][sample])

    def _all(self, kind: str) -> np.ndarray:
        return self.index.captioned if kind == "text" else self.index.has(kind)
