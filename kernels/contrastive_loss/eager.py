"""Plain torch in chunks of rows: a chunk of logits stays in the cache, and no more of them is ever in memory.

All gradients are made together with the loss, since it is a scalar: what comes back to it only scales them. They are
those of N times the loss, which keeps them in the range of float16. "softmax" needs all logits before the first
gradient, so chunks are multiplied twice, but for the first ones, which are kept while they fit.

Legend: N images of this process, M texts of all processes, K captions per image, D width; `first` is the number of this
process's first image among all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 32 << 20}  # of logits: within a CPU's cache, enough rows for a GPU
KEPT_BYTES = {"cpu": 24 << 20, "cuda": 24 << 20}  # of exponentials that need not be computed again
SPREAD = 140.0  # logits this far apart have exponentials that float32 holds (1e-38 to 3e38), and sums of 10^6 of them


class Grads(NamedTuple):
    """Of N times the loss, in the arithmetic's dtype; text [M, D]: what this process adds for every process's texts."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor


class Normalizers(NamedTuple):
    """Of the softmax: log-sum-exp over the texts for each image [N], over these images for each text [M]; the logit of
    each of this process's texts with its image [N*K]. The first two are float64: at a logit of 70, float32 would be off by
    4e-6, and so would a probability of 1."""

    rows: Tensor
    columns: Tensor
    positives: Tensor


class Problem:
    """Rows and sizes of one call, and its chunks of logits."""

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor, captions: int, first: int) -> None:
        self.half = image.dtype.itemsize == 2
        if self.half and image.device.type == "cpu":  # a CPU's own half products are slow, and rounded
            image, text, self.half = image.float(), text.float(), False
        self.image, self.text, self.captions, self.first = image, text, captions, first
        self.wide = torch.float32 if self.half else image.dtype
        self.exact_scale, self.scale = scale.double(), scale.to(self.wide)
        device = "cuda" if image.device.type == "cuda" else "cpu"
        row = len(text) * self.wide.itemsize
        self.rows = max(1, min(len(image), CHUNK_BYTES[device] // row))
        self.kept = KEPT_BYTES[device] // (self.rows * row)  # chunks
        self.d_scale = text.new_zeros((), dtype=torch.float64)
        self.free: list[Tensor] = []  # chunks of memory that are used again

    def starts(self) -> range:
        """The first image of every chunk."""
        return range(0, len(self.image), self.rows)

    def buffer(self, rows: int) -> Tensor:
        """[rows, M], of any content."""
        full = (
            self.free.pop() if self.free else self.text.new_empty(self.rows * len(self.text), dtype=self.wide)
        )
        return full[: rows * len(self.text)].view(rows, len(self.text))

    def logits(self, start: int) -> Tensor:
        """Those of the chunk, times the scale, in memory that the next chunk may use."""
        image = self.image[start : start + self.rows]
        out = self.buffer(len(image))
        if self.half:
            torch.mm(image, self.text.T, out_dtype=self.wide, out=out)
            return out.mul_(self.scale)
        return torch.mm(self.scaled(image), self.text.T, out=out)

    def scaled(self, image: Tensor) -> Tensor:
        """Rows times the scale, rounded once: a scale that is rounded first shifts every logit the same way, and in a mean over
        thousands of pairs nothing else is left of rounding."""
        return (image.double() * self.exact_scale).to(image.dtype)

    def release(self, chunk: Tensor) -> None:
        """Its memory may be used again."""
        self.free.append(chunk.view(-1) if chunk.numel() == self.rows * len(self.text) else chunk._base)  # type: ignore[arg-type]

    def positives(self, chunk: Tensor, start: int) -> Tensor:
        """View [rows, K] of the pairs in a chunk."""
        offset = (self.first + start) * self.captions
        return chunk.as_strided(
            (len(chunk), self.captions), (len(self.text) + self.captions, 1), chunk.storage_offset() + offset
        )

    def grads(self) -> tuple[Tensor, Tensor]:
        """Zeros to add to."""
        return self.image.new_zeros(self.image.shape, dtype=self.wide), self.text.new_zeros(
            self.text.shape, dtype=self.wide
        )

    def add(self, grads: tuple[Tensor, Tensor], chunk: Tensor, start: int) -> None:
        """Into both gradients, from that of the chunk's logits."""
        image, (d_image, d_text) = self.image[start : start + self.rows], grads
        out = d_image[start : start + self.rows]
        if self.half:
            low = chunk.to(image.dtype)
            torch.mm(low, self.text, out_dtype=self.wide, out=out)
            d_text += torch.mm(low.T, image, out_dtype=self.wide).mul_(self.scale)
        else:
            torch.mm(chunk, self.text, out=out)
            d_text.addmm_(chunk.T, self.scaled(image))
        out.mul_(self.scale)
        # That of log(scale), the sum over all pairs of gradient times logit, is <image, gradient of image>.
        self.d_scale += torch.mul(image, out).sum()


def sigmoid(problem: Problem, bias: Tensor | None, training: bool) -> tuple[Tensor, Grads | None]:
    """N times the loss, and its gradients."""
    total = problem.text.new_zeros((), dtype=torch.float64)
    d_bias = torch.zeros_like(total)
    grads = problem.grads() if training else None
    for start in problem.starts():
        chunk = problem.logits(start)
        if bias is not None:
            chunk += bias.to(problem.wide)
        pairs = problem.positives(chunk, start)
        pairs.neg_()
        total += _softplus_sum(problem, chunk)
        if grads is not None:
            chunk.sigmoid_()
            pairs.neg_()
            d_bias += chunk.sum()
            problem.add(grads, chunk, start)
        problem.release(chunk)
    if grads is None:
        return total / problem.captions, None
    d_image, d_text = (grad.div_(problem.captions) if problem.captions > 1 else grad for grad in grads)
    return total / problem.captions, Grads(
        d_image, d_text, problem.d_scale / problem.captions, d_bias / problem.captions
    )


def _softplus_sum(problem: Problem, chunk: Tensor) -> Tensor:
    """Sum of log(1 + exp(x)): the loss of each pair whose sign is turned."""
    if chunk.device.type == "cpu" and chunk.amax() < SPREAD / 2:
        other = problem.buffer(len(chunk))
        total = torch.exp(chunk, out=other).log1p_().sum()
        problem.release(other)
        return total
    return F.softplus(chunk, threshold=40.0).sum()


class Exponentials(NamedTuple):
    """exp(logits - middle) of a chunk, where all of them are in range."""

    chunk: Tensor
    middle: float


class Softmax:
    """Both passes of the softmax loss."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.kept: dict[int, Exponentials] = {}

    def normalizers(self, keep: bool) -> Normalizers:
        """The first pass."""
        problem = self.problem
        rows = problem.text.new_empty(len(problem.image), dtype=torch.float64)
        columns = rows.new_full((len(problem.text),), float("-inf"))
        positives = rows.new_empty(len(rows), problem.captions, dtype=problem.wide)
        for start in problem.starts():
            chunk = problem.logits(start)
            here = slice(start, start + len(chunk))
            positives[here] = problem.positives(chunk, start)
            found = exponentials(chunk)
            if found is None:
                rows[here], part = (self._logsumexp(chunk, dim) for dim in (1, 0))
            else:
                rows[here], part = (chunk.sum(dim).double().log_() + found.middle for dim in (1, 0))
            columns = torch.logaddexp(columns, part)
            if keep and found is not None and len(self.kept) < problem.kept:
                self.kept[start] = found
            else:
                problem.release(chunk)
        return Normalizers(rows, columns, positives.flatten())

    def _logsumexp(self, chunk: Tensor, dim: int) -> Tensor:
        """float64, of logits of any size."""
        top = chunk.amax(dim, keepdim=True)
        other = self.problem.buffer(len(chunk))
        total = torch.sub(chunk, top, out=other).exp_().sum(dim)
        self.problem.release(other)
        return total.double().log_() + top.squeeze(dim)

    def grads(self, rows: Tensor, columns: Tensor) -> Grads:
        """The second pass: p over rows / 2 + p over columns / 2K - 1/K at pairs. columns [M]: over all images."""
        problem = self.problem
        share = 1 / problem.captions
        grads = problem.grads()
        for start in problem.starts():
            found = self.kept.pop(start, None)
            chunk = problem.logits(start) if found is None else found.chunk
            found = found or exponentials(chunk)
            row = rows[start : start + len(chunk), None]
            other = problem.buffer(len(chunk))
            if found is None:
                (high, low), (high_columns, low_columns) = (
                    split(row, problem.wide),
                    split(columns, problem.wide),
                )
                torch.sub(chunk, high, out=other).exp_().mul_(low / 2)
                chunk.sub_(high_columns).exp_().mul_(low_columns * (share / 2)).add_(other)
            else:
                by_row, by_column = ((found.middle - lse).exp_().to(problem.wide) for lse in (row, columns))
                torch.add(by_row / 2, by_column.mul_(share / 2), out=other)
                chunk.mul_(other)
            problem.release(other)
            problem.positives(chunk, start).sub_(share)
            problem.add(grads, chunk, start)
            problem.release(chunk)
        d_image, d_text = grads
        return Grads(d_image, d_text, problem.d_scale, torch.zeros_like(problem.d_scale))


def split(lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float64 -> a number of `dtype` to subtract, and exp(-what it leaves)."""
    high = lse.to(dtype)
    return high, (high - lse).exp_().to(dtype)


def exponentials(chunk: Tensor) -> Exponentials | None:
    """In place, where one shift serves every row and column; None, and the chunk as it was, where it does not. On a GPU the
    question would wait for the device."""
    if chunk.device.type != "cpu":
        return None
    low, high = map(float, chunk.aminmax())
    if not high - low <= SPREAD:
        return None
    middle = (low + high) / 2
    return Exponentials(chunk.sub_(middle).exp_(), middle)
