"""The contrastive loss of a whole optimizer step, over all its micro-batches and ranks (GradCache, arXiv:2101.06983).

first pass     every micro-batch is embedded, and nothing is kept for a backward
the loss       over all embeddings of all ranks; its gradients at the embeddings
second pass    the usual forward and backward of each micro-batch, with the same random numbers as in the first; the
               gradients at its embeddings take the place of a loss of its own
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dataload.batch import Batch
from dataload.images import normalize
from models.aurora.model import alignment
from models.objectives import CachedContrast

if TYPE_CHECKING:
    from train.engine import TorchEngine


@dataclass(frozen=True)
class MicroBatch:
    """A batch; what is known of its contrastive loss beforehand, and the seed of its random numbers, where it is."""

    batch: Any
    contrast: CachedContrast | None = None
    seed: int | None = None

    @contextmanager
    def draws(self, device: torch.device) -> Iterator[None]:
        """Inside, dropout and the like draw this micro-batch's own numbers, the same each time; without a seed, the
        generators go on as ever."""
        if self.seed is None:
            yield
            return
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            yield


def contrast_all(engine: TorchEngine, batches: Sequence[Batch]) -> list[MicroBatch]:
    """The micro-batches with their shares of the step's contrastive loss. All ranks call this."""
    objectives, model = engine.config.objectives, engine.model
    seeds = torch.randint(2**62, (len(batches),), device="cpu").tolist()
    micros = [MicroBatch(batch, seed=seed) for batch, seed in zip(batches, seeds, strict=True)]
    images, texts = zip(*(embed(engine, micro) for micro in micros), strict=True)
    image, text = torch.cat(images).requires_grad_(), torch.cat(texts).requires_grad_()
    with engine.autocast():
        loss = alignment(model, image, text, objectives)
    inputs = (image, text, model.logit_scale, model.logit_bias)
    d_image, d_text, d_scale, d_bias = torch.autograd.grad(loss, inputs, materialize_grads=True)
    share = 1 / len(batches)
    parts = zip(micros, d_image.split([*map(len, images)]), d_text.split([*map(len, texts)]), strict=True)
    return [
        MicroBatch(
            micro.batch,
            CachedContrast(loss.detach() * share, di, dt, d_scale * share, d_bias * share),
            micro.seed,
        )
        for micro, di, dt in parts
    ]


@torch.no_grad()
def embed(engine: TorchEngine, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """Image and text embeddings of a micro-batch. Running statistics (batch norm's) stay as they are: the second pass
    counts the batch."""
    batch, model = engine.on_device(micro.batch), engine.model
    before = [buffer.clone() for buffer in model.buffers()]
    with engine.autocast(), micro.draws(engine.device):
        found = model.embed(
            normalize(batch.pair_images), batch.tokens, normalize(batch.mim_images), batch.mim_mask,
            engine.config.objectives,
        )  # fmt: skip
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    return found
