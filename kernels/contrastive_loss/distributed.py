"""What the processes of a group tell each other: sizes, texts, sums over texts. Every rank calls each function.

Each rank has its images and meets the texts of all: only one side is gathered. Three collectives of the data in all,
so a ring over R ranks (R hops) would win memory (M x D numbers) alone, and lose to its latency where the ranks have few
pairs each.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Group:
    """A process group by its name; "" is this process alone."""

    def __init__(self, name: str) -> None:
        self.group = _resolve_process_group(cast(Any, name)) if name else None
        self.size = self.group.size() if self.group else 1
        self.rank = self.group.rank() if self.group else 0

    def agree(self, image: Tensor, text: Tensor, sigmoid: bool, training: bool) -> None:
        """Raise ValueError, on every rank, unless all have as many images and texts of one width and dtype, the same
        kind of loss, and all or none want gradients."""
        if self.group is None:
            return
        kind = [DTYPES.index(image.dtype), int(sigmoid), int(training)]
        mine = torch.tensor([*image.shape, *text.shape, *kind], device=image.device)
        every = self._all(mine).tolist()
        if any(sizes != every[0] for sizes in every):
            told = "; ".join(
                f"rank {rank}: image [{n}, {d}], text [{m}, {e}], {str(DTYPES[dtype]).removeprefix('torch.')}, "
                f"{'sigmoid' if pairs else 'softmax'}, {'with' if grads else 'without'} gradients"
                for rank, (n, d, m, e, dtype, pairs, grads) in enumerate(every)
            )
            raise ValueError(f"contrastive_loss: every rank must bring as many pairs of one kind, got {told}")

    def gather(self, rows: Tensor) -> Tensor:
        """[n, ...] of every rank, in rank order, [R*n, ...]."""
        return rows if self.group is None else self._all(rows).flatten(0, 1)

    def logsumexp(self, columns: Tensor) -> Tensor:
        """[M] of every rank's images -> over all images."""
        return columns if self.group is None else self._all(columns).logsumexp(0)

    def own_sum(self, texts: Tensor) -> Tensor:
        """[R*n, ...] -> [n, ...]: this rank's part of the sum over ranks."""
        if self.group is None:
            return texts
        dist.all_reduce(texts, group=self.group)  # gloo reduces and scatters in no other way
        return texts.chunk(self.size)[self.rank].clone()

    def own(self, texts: Tensor) -> Tensor:
        """This rank's part of what there is for all texts."""
        return texts.chunk(self.size)[self.rank]

    def _all(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.stack(parts)
