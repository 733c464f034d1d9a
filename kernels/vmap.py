"""torch.func.vmap, refused once at the entrance of each public function."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor


def refuse_vmap(function: str, tensor: Tensor) -> None:
    """Raise for a tensor that torch.func.vmap made: inside, only torch's obscurer errors would say it."""
    if not torch.compiler.is_compiling() and is_batchedtensor(tensor):
        raise NotImplementedError(
            f"{function}: torch.func.vmap is not supported. Every tensor has a batch dimension of its own: fold the "
            "mapped dimension into it"
        )
