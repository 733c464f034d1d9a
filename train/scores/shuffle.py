"""Wrong pairings on purpose: the baseline which shows that a score comes from the picture, not from habit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def derangement(count: int, seed: int) -> Tensor:
    """A permutation of 0..count-1 in which nothing stays in its place.

    Sattolo's algorithm (1986): one random cycle through all elements, so no element can meet itself.

    Returns int64 [count]. Raises ValueError below two elements, where no such permutation exists.
    """
    if count < 2:
        raise ValueError(f"shuffling needs at least 2 images so that none keeps its own caption; got {count}")
    rng = np.random.Generator(np.random.Philox(key=seed))
    order = np.arange(count)
    for last in range(count - 1, 0, -1):
        other = int(rng.integers(0, last))  # strictly below `last`: this is what makes it one cycle
        order[last], order[other] = order[other], order[last]
    return torch.from_numpy(order)
