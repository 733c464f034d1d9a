"""What the engine asks of a model's family: how many targets a batch has, and its losses. One loop, two models.

A third model is a class with these methods, its branch in `family_of`, and what `setup`, `run` and `finish` do for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dataload.batch import Batch
from dataload.images import normalize
from dataload.multimodal import MultimodalBatch
from models import Aurora
from models.aurora.model import alignment as aurora_alignment
from models.objectives import CachedContrast, Normalizers, ObjectiveConfig, count
from models.perceiver import PerceiverIO, PerceiverObjectives, Piece
from models.perceiver.contrast import alignment as perceiver_alignment
from models.perceiver.contrast import fewest_texts, over_ranks
from models.perceiver.objectives import count_targets
from train.config import PretrainConfig
from train.multimodal.config import PerceiverPretrainConfig
from train.tasks.config import FinetuneConfig


class Family(Protocol):
    """A kind of model in training."""

    name: str

    def model(self, config: PretrainConfig) -> nn.Module:
        """A new one, from torch's generators."""

    def begin(self, model: nn.Module, config: PretrainConfig) -> list[str]:
        """Before the first step of a run that does not go on from another: takes over weights where the run says so; lines
        about it."""

    def counts(self, batch: Any, config: PretrainConfig) -> Sequence[float]:
        """How many targets each loss of a micro-batch has; they are summed over micro-batches and ranks."""

    def normalizers(self, shares: Sequence[float], micro_steps: int) -> Any:
        """What the losses are divided by: the sums over the number of ranks, at least 1 / ranks each."""

    def forward(
        self,
        module: nn.Module,
        batch: Any,
        objectives: Any,
        normalizers: Any,
        contrast: Mapping[str, CachedContrast] | None,
    ) -> dict[str, Tensor]:
        """The losses of a micro-batch by name, unweighted."""


class Contrasting(Family, Protocol):
    """One whose contrastive losses can be taken over a whole step (train/contrast.py)."""

    def texts(self, batches: Sequence[Any], device: torch.device) -> int:
        """How many texts of a sample are contrasted in this step. Every rank calls this."""

    def embed(
        self, model: Any, batch: Any, objectives: Any, texts: int
    ) -> Mapping[str, tuple[Tensor, Tensor]]:
        """What `forward` contrasts, by the name of the loss, from the same random numbers in the same order."""

    def alignment(
        self, model: Any, pairs: Mapping[str, tuple[Tensor, Tensor]], objectives: Any
    ) -> Mapping[str, Tensor]:
        """The losses of that. The mean of their gradients over ranks is that of the global batch."""


class AuroraFamily:
    """Images and text."""

    name = "Aurora"

    def model(self, config: PretrainConfig) -> nn.Module:
        return Aurora(config.model)

    def begin(self, model: nn.Module, config: PretrainConfig) -> list[str]:
        return []

    def counts(self, batch: Batch, config: PretrainConfig) -> Sequence[float]:
        return count(batch.tokens, batch.mlm_targets, batch.mim_mask)

    def normalizers(self, shares: Sequence[float], micro_steps: int) -> Normalizers:
        caption, mlm, mim = shares
        return Normalizers(caption, mlm, mim, itc_share=1 / micro_steps)

    def forward(
        self, module: nn.Module, batch: Batch, objectives: ObjectiveConfig, normalizers: Normalizers,
        contrast: Mapping[str, CachedContrast] | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        losses: dict[str, Tensor] = module(
            normalize(batch.pair_images), batch.tokens, batch.mlm_tokens, batch.mlm_targets,
            normalize(batch.mim_images), batch.mim_mask, objectives=objectives, normalizers=normalizers,
            contrast=(contrast or {}).get("itc"),
        )  # fmt: skip
        return losses

    def texts(self, batches: Sequence[Batch], device: torch.device) -> int:
        return len(batches[0].tokens) // max(len(batches[0].pair_images), 1)

    def embed(
        self, model: Aurora, batch: Batch, objectives: ObjectiveConfig, texts: int
    ) -> Mapping[str, tuple[Tensor, Tensor]]:
        return {
            "itc": model.embed(
                normalize(batch.pair_images), batch.tokens, normalize(batch.mim_images), batch.mim_mask, objectives
            )
        }  # fmt: skip

    def alignment(
        self, model: Aurora, pairs: Mapping[str, tuple[Tensor, Tensor]], objectives: ObjectiveConfig
    ) -> Mapping[str, Tensor]:
        return {name: aurora_alignment(model, *pair, objectives) for name, pair in pairs.items()}


COUNTED = ("itc", "vtc", "atc", "caption", "mlm", "mim", "mvm", "mam", "label")


class PerceiverFamily:
    """Any modalities. A micro-batch's contrastive losses are means: each counts 1, however many pairs it has."""

    name = "PerceiverIO"

    def model(self, config: PretrainConfig) -> nn.Module:
        assert isinstance(config, PerceiverPretrainConfig)
        return PerceiverIO(config.model)

    def begin(self, model: nn.Module, config: PretrainConfig) -> list[str]:
        return []

    def counts(self, batch: MultimodalBatch, config: PretrainConfig) -> Sequence[float]:
        assert isinstance(config, PerceiverPretrainConfig)
        found = count_targets(pieces_of(batch), len(batch), batch.mlm_targets, config.objectives)
        return [found[name] for name in COUNTED]

    def normalizers(self, shares: Sequence[float], micro_steps: int) -> Mapping[str, float]:
        return dict(zip(COUNTED, shares, strict=True))

    def forward(
        self, module: nn.Module, batch: MultimodalBatch, objectives: PerceiverObjectives,
        normalizers: Mapping[str, float], contrast: Mapping[str, CachedContrast] | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        losses: dict[str, Tensor] = module(
            pieces_of(batch), len(batch), batch.mlm_tokens, batch.mlm_targets, objectives=objectives,
            normalizers=normalizers, contrast=contrast,
        )  # fmt: skip
        return losses

    def texts(self, batches: Sequence[MultimodalBatch], device: torch.device) -> int:
        return over_ranks(min(fewest_texts(batch.text_sample) for batch in batches), device)

    def embed(
        self, model: PerceiverIO, batch: MultimodalBatch, objectives: PerceiverObjectives, texts: int
    ) -> Mapping[str, tuple[Tensor, Tensor]]:
        return model.embed(pieces_of(batch), len(batch), batch.mlm_tokens, objectives, texts)

    def alignment(
        self, model: PerceiverIO, pairs: Mapping[str, tuple[Tensor, Tensor]], objectives: PerceiverObjectives
    ) -> Mapping[str, Tensor]:
        return perceiver_alignment(model, pairs, objectives)


def pieces_of(batch: MultimodalBatch, text: bool = True) -> dict[str, Piece]:
    """What the model reads of a batch; without its texts on request."""
    pieces = {
        "image": Piece(batch.images, batch.image_sample, mask=batch.image_mask),
        "audio": Piece(batch.audio.values, batch.audio_sample, batch.audio.cu_seqlens),
        "video": Piece(batch.video.values, batch.video_sample, batch.video.cu_seqlens),
    }
    if text:
        pieces["text"] = Piece(batch.text.values, batch.text_sample, batch.text.cu_seqlens)
    return pieces


def family_of(config: PretrainConfig) -> Family:
    """The family of the model that a configuration is for."""
    if isinstance(config, FinetuneConfig):
        from train.tasks.family import TaskFamily

        return TaskFamily(config)
    return PerceiverFamily() if isinstance(config, PerceiverPretrainConfig) else AuroraFamily()
