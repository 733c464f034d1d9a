"""`latent_attention` over torch's scaled_dot_product_attention, bfloat16, dense, on a CPU: python ratios.py."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from bench.measure import interleave
from kernels import latent_attention

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Calls = list[Callable[[], object]]

# samples, queries, keys, heads, head_dim
SHAPES = """\
16 32 80 8 32, 1 64 256 4 32, 1 256 256 8 64, 4 64 1024 4 32, 1 64 4096 8 64, 8 128 512 8 64,
1 256 3136 1 128, 1 256 4096 8 32, 2 256 4096 4 64, 1 512 512 8 64, 1 512 2048 4 128, 1 512 16384 8 64,
1 1024 4096 8 64, 1 1024 16384 8 32, 1 256 1024 1 256, 16 256 256 4 128, 1 4096 64 8 64, 1 4096 256 8 64,
1 16384 64 8 64, 1 16384 256 8 32, 1 16384 128 4 128"""


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def calls(attention: Attention, sets: list[list[torch.Tensor]], grad: torch.Tensor | None) -> Calls:
    if grad is None:
        return [lambda s=s: attention(*s) for s in sets]  # type: ignore[misc]
    return [lambda s=s: torch.autograd.grad(attention(*s), s, grad) for s in sets]  # type: ignore[misc]


def ratio(shape: tuple[int, ...], learning: bool) -> str:
    batch, queries, keys, heads, dim = shape
    sets = [
        [torch.randn(batch, n, heads, dim).bfloat16().requires_grad_(learning) for n in (queries, keys, keys)]
        for _ in range(2)
    ]
    grad = torch.randn(batch, queries, heads, dim).bfloat16() if learning else None
    both = {"auto": calls(latent_attention, sets, grad), "torch": calls(sdpa, sets, grad)}
    found = interleave(both, device="cpu", budget=3.0, clock="cpu", fewest=7)
    auto, torchs = (np.array(found[name][1]) for name in both)
    low, middle, high = np.quantile(auto / torchs, (0.1, 0.5, 0.9))
    return f"{np.median(torchs) * 1e3:8.2f} ms {middle:.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for row in SHAPES.split(","):
        shape = tuple(map(int, row.split()))
        print(*shape, " fwd", ratio(shape, False), " train", ratio(shape, True), flush=True)
