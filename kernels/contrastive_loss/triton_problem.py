"""The loss on Triton's kernels, with the arguments and results of eager.py; see forward.py and backward.py. Importing this
file imports Triton.

float32 rows add up the texts' gradient chunk by chunk, in place. Half types have no room to add in, so where there are several
chunks of images the texts' gradient is made from chunks of texts, whose logits are made once more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contrastive_loss.backward import logit_grads
from kernels.contrastive_loss.eager import Grads, Normalizers
from kernels.contrastive_loss.forward import logit_sums

CHUNK_BYTES = 32 << 20  # of the logits' gradients
SUM_ROWS = 4096  # images of one launch of the first pass: partial sums are a few megabytes


@dataclass
class Problem:
    """Rows of one call, and where this process's images stand among all."""

    image: Tensor  # [N, D]
    text: Tensor  # [M, D]
    scale: Tensor  # fp32 []
    captions: int
    first: int

    def __post_init__(self) -> None:
        self.scale = self.scale.float()  # which the kernels load; it comes as float64

    def rows(self, columns: int) -> int:
        """Of a chunk."""
        return max(1, CHUNK_BYTES // (columns * self.image.dtype.itemsize))

    def times(self, left: Tensor, right: Tensor) -> Tensor:
        """scale * left @ right, fp32."""
        if left.dtype == torch.float32:
            found = left @ right
        elif left.device.type == "cuda":
            found = torch.mm(left, right, out_dtype=torch.float32)
        else:
            found = left.float() @ right.float()
        return found.mul_(self.scale)

    def grads(
        self, bias: Tensor | None, lse: tuple[Tensor, Tensor] | None, training: bool, share: float
    ) -> tuple[Tensor, Grads | None]:
        """`share` times the sum of the sigmoid losses, and the gradients."""
        image, text = self.image, self.text
        step = min(self.rows(len(text)), len(image))
        several, half = step < len(image), image.dtype != torch.float32
        d_image, d_text = torch.empty_like(image), torch.zeros_like(text)
        grad = image.new_empty(step, len(text))
        sums = torch.zeros(3, dtype=torch.float64, device=image.device)
        for start in range(0, len(image), step):
            part = image[start : start + step]
            here = grad[: len(part)]
            among = None if lse is None else (lse[0][start : start + step], lse[1])
            sums += logit_grads(part, text, self.scale, bias, among, here, self.first + start, self.captions)
            if not training:
                continue
            d_image[start : start + step] = self.times(here, text).mul_(share)
            if not (half and several):
                d_text += self.times(here.T, part).mul_(share).to(d_text.dtype)
        sums *= share
        if not training:
            return sums[0], None
        if half and several:
            del grad, here
            self.text_grad(d_text, bias, lse, share)
        return sums[0], Grads(d_image, d_text, sums[2], sums[1])

    def text_grad(
        self, d_text: Tensor, bias: Tensor | None, lse: tuple[Tensor, Tensor] | None, share: float
    ) -> None:
        """Into d_text, from chunks of texts."""
        image, text = self.image, self.text
        step = min(self.rows(len(image)), len(text))
        grad = image.new_empty(step, len(image))
        for start in range(0, len(text), step):
            part = text[start : start + step]
            here = grad[: len(part)]
            among = None if lse is None else (lse[1][start : start + step], lse[0])
            place = start - self.first * self.captions
            logit_grads(part, image, self.scale, bias, among, here, place, self.captions, swapped=True)
            d_text[start : start + step] = self.times(here, image).mul_(share)


def sigmoid(problem: Problem, bias: Tensor | None, training: bool) -> tuple[Tensor, Grads | None]:
    """N times the loss, and its gradients."""
    bias = torch.zeros_like(problem.scale) if bias is None else bias.float()
    return problem.grads(bias, None, training, 1 / problem.captions)


class Softmax:
    """Both passes of the softmax loss."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def normalizers(self, keep: bool) -> Normalizers:
        """The first pass; nothing is kept of it but sums."""
        problem = self.problem
        image, text, captions = problem.image, problem.text, problem.captions
        parts = [
            logit_sums(image[start : start + SUM_ROWS], text, problem.scale)
            for start in range(0, len(image), SUM_ROWS)
        ]
        rows = torch.cat([row for row, _ in parts])
        columns = torch.stack([column for _, column in parts]).logsumexp(0)
        own = text[problem.first * captions : (problem.first + len(image)) * captions].unflatten(
            0, (-1, captions)
        )
        positives = (image.float()[:, None] * own.float()).sum(-1).flatten() * problem.scale
        return Normalizers(rows, columns, positives)

    def grads(self, rows: Tensor, columns: Tensor) -> Grads:
        """The second pass; columns [M]: over all images."""
        grads = self.problem.grads(None, (rows, columns), True, 1.0)[1]
        assert grads is not None
        return grads._replace(logit_bias=torch.zeros_like(grads.logit_scale))
