"""The contrastive losses of a whole optimizer step, over all its micro-batches and ranks (GradCache, arXiv:2101.06983).

first pass     every micro-batch is embedded, and nothing is kept for a backward
the losses     over all embeddings of all ranks; their gradients at the embeddings
second pass    the usual forward and backward of each micro-batch, with the same random numbers as in the first; the
               gradients at its embeddings take the place of losses of its own
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from models.objectives import CachedContrast

if TYPE_CHECKING:
    from train.engine import TorchEngine
    from train.families import Contrasting

LOSSES = ("itc", "vtc", "atc")


@dataclass(frozen=True)
class MicroBatch:
    """A batch; what is known of its contrastive losses beforehand, and the seed of its random numbers, where it is."""

    batch: Any
    contrast: Mapping[str, CachedContrast] | None = None
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


def contrasts(weights: Mapping[str, float]) -> bool:
    """Whether a run with these weights of losses has a contrastive one."""
    return any(weights.get(name) for name in LOSSES)


def contrast_all(engine: TorchEngine, batches: Sequence[Any]) -> list[MicroBatch]:
    """The micro-batches with their shares of the step's contrastive losses. All ranks call this."""
    objectives, model, family = engine.config.objectives, engine.model, cast("Contrasting", engine.family)
    seeds = torch.randint(2**62, (len(batches),), device="cpu").tolist()
    micros = [MicroBatch(batch, seed=seed) for batch, seed in zip(batches, seeds, strict=True)]
    texts = family.texts(batches, engine.device)
    found = [embed(engine, micro, texts) for micro in micros]
    parts = {name: tuple(zip(*(pairs[name] for pairs in found), strict=True)) for name in found[0]}
    whole = {
        name: (torch.cat(images).requires_grad_(), torch.cat(captions).requires_grad_())
        for name, (images, captions) in parts.items()
    }
    with engine.autocast():
        losses = family.alignment(model, whole, objectives)
    share = 1 / len(batches)
    cached: list[dict[str, CachedContrast]] = [{} for _ in batches]
    for name, loss in losses.items():
        inputs = (*whole[name], model.logit_scale, model.logit_bias)
        d_image, d_text, d_scale, d_bias = torch.autograd.grad(loss, inputs, materialize_grads=True)
        images, captions = parts[name]
        each = zip(
            cached, d_image.split([*map(len, images)]), d_text.split([*map(len, captions)]), strict=True
        )
        for one, di, dt in each:
            one[name] = CachedContrast(loss.detach() * share, di, dt, d_scale * share, d_bias * share)
    return [
        MicroBatch(micro.batch, contrast, micro.seed) for micro, contrast in zip(micros, cached, strict=True)
    ]


@torch.no_grad()
def embed(engine: TorchEngine, micro: MicroBatch, texts: int) -> Mapping[str, tuple[Tensor, Tensor]]:
    """What is contrasted of a micro-batch, by the name of the loss. Running statistics (batch norm's) stay as they are: the
    second pass counts the batch."""
    batch, model = engine.on_device(micro.batch), engine.model
    before = [buffer.clone() for buffer in model.buffers()]
    with engine.autocast(), micro.draws(engine.device):
        found = cast("Contrasting", engine.family).embed(model, batch, engine.config.objectives, texts)
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    return found
