"""PerceiverIO's contrastive losses: samples of a modality against the texts of the same samples, over all ranks.

Batches mix modalities, so ranks bring different numbers of pairs. Every rank gathers the embeddings of all, and takes the
loss of all: for the specified 2,048 pairs that is less than a thousandth of a step, and nothing travels in the backward pass.

Letters: S texts, Q samples with a modality and texts, K texts of each, R ranks, E joint space.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

import kernels

if TYPE_CHECKING:
    from models.perceiver.model import PerceiverIO
    from models.perceiver.objectives import PerceiverObjectives

CONTRASTS = {"itc": "image", "vtc": "video", "atc": "audio"}
"""The modality of each loss."""
ANY = 2**31
"""More texts than a sample has: what says how many are taken where there is none."""
Pairs = tuple[Tensor, Tensor]
"""Embeddings of samples [Q, E] and of their texts [Q, K, E], fp32 of unit length."""


def several() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first_pieces(sample: Tensor) -> Tensor:
    """bool [P]: whether a piece is the first of its sample; `sample` rises."""
    return torch.cat((sample[:1] >= 0, sample[1:] != sample[:-1]))


def texts_of_each(sample: Tensor) -> Tensor:
    """int64 [samples with texts]: how many texts each has; `sample` int64 [S] rises."""
    begin = first_pieces(sample).nonzero()[:, 0]
    return torch.cat((begin, begin.new_tensor([len(sample)]))).diff()


def fewest_texts(sample: Tensor) -> int:
    """The most texts that every sample with texts has; ANY without texts."""
    each = texts_of_each(sample)
    return int(each.min()) if len(each) else ANY


def over_ranks(texts: int, device: torch.device) -> int:
    """The least of all ranks' `fewest_texts`. Every rank calls this."""
    if not several():
        return texts
    least = torch.tensor(texts, dtype=torch.int64, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def among_first(sample: Tensor, texts: int) -> Tensor:
    """bool [S]: whether a text is among the first `texts` of its sample; `sample` rises."""
    each = texts_of_each(sample)
    begin = (each.cumsum(0) - each).repeat_interleave(each)
    return torch.arange(len(sample), device=sample.device) - begin < texts


def alignment(
    model: PerceiverIO, pairs: Mapping[str, Pairs], config: PerceiverObjectives
) -> dict[str, Tensor]:
    """The contrastive loss of each kind of pairs, over those of all ranks; 0 where no rank has one. The mean over ranks of its
    gradients is the gradient of the global batch. With `agreement`, also the loss of each text and the next one of the same
    sample. Every rank calls this, with the same kinds in the same order, and the same K.
    """
    numbers = _numbers([len(samples) for samples, _ in pairs.values()], model.logit_scale.device)
    losses = {}
    for (name, (samples, texts)), ranks in zip(pairs.items(), numbers, strict=True):
        if len(ranks) > 1:
            rows = torch.cat((samples[:, None], texts), 1)
            rows = cast(Tensor, _Gathered.apply(rows, ranks))
            samples, texts = rows[:, 0], rows[:, 1:]
        losses[name] = (samples.sum() + texts.sum() + model.logit_scale + model.logit_bias) * 0
        if len(samples):
            losses[name] = losses[name] + _loss(model, samples, texts, config)
    return losses


def _loss(model: PerceiverIO, samples: Tensor, texts: Tensor, config: PerceiverObjectives) -> Tensor:
    def loss(one: Tensor, other: Tensor) -> Tensor:
        return kernels.contrastive_loss(
            one, other, model.logit_scale, model.logit_bias, kind=config.contrastive_kind
        )

    found, each = loss(samples, texts.flatten(0, 1)), texts.shape[1]
    if config.agreement and each > 1:
        agreed = [loss(texts[:, i].contiguous(), texts[:, i - 1].contiguous()) for i in range(each)]
        found = found + config.agreement * torch.stack(agreed).mean()
    return found


def _numbers(own: list[int], device: torch.device) -> list[tuple[int, ...]]:
    """For each of these numbers: those of all ranks."""
    if not several():
        return [(number,) for number in own]
    mine = torch.tensor(own, dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return [tuple(kind) for kind in torch.stack(every).T.tolist()]


class _Gathered(torch.autograd.Function):
    """Rows [n, ...] of this rank -> [n_0 + ... + n_R-1, ...] of all, in rank order. Every rank takes the same loss of them, and
    gradients are averaged over ranks afterwards: so a rank's own rows get R times what comes back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, numbers: tuple[int, ...]) -> Tensor:
        rank, longest = dist.get_rank(), max(numbers)
        ctx.ranks, ctx.first, ctx.own = len(numbers), sum(numbers[:rank]), numbers[rank]
        mine = rows.new_zeros(longest, *rows.shape[1:])
        mine[: len(rows)] = rows
        parts = [torch.empty_like(mine) for _ in numbers]
        dist.all_gather(parts, mine)
        return torch.cat([part[:number] for part, number in zip(parts, numbers, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.first : ctx.first + ctx.own] * ctx.ranks, None
