"""What stands in for the project's kernels while a step is traced on the meta device: the same outputs, the same tensors kept
for the backward pass, and the FLOPs that they would do. A kernel's own launcher would ask for a GPU.

Shapes as in `kernels`: B batch, H W map, h heads, d head width, M queries, N keys, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
import models.aurora.encoder
import models.layers
import models.perceiver.adapters.audio
import models.perceiver.adapters.image
import models.perceiver.latents
from models.perceiver.adapters.audio import FFT, HOP
from train.plan.meter import Meter, forward_phase

LOGITS = {
    "cpu": 64 * 2**20,
    "cuda": 512 * 2**20,
}  # bytes of logits at a time: kernels/linear_cross_entropy/eager.py
FEWEST_ROWS = {"cpu": 128, "cuda": 2048}


class _Attention(torch.autograd.Function):
    """Attention that keeps `kept` (shapes and dtypes) and, where `keeps_inputs`, what it was given; backward needs `scratch`
    for a while, and twice the forward's FLOPs (what a fused kernel computes again is no work)."""

    @staticmethod
    def forward(ctx: Any, meter: Meter, how: _How, *inputs: Tensor) -> Tensor:
        out = inputs[0].new_empty(how.out)
        kept = [inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in how.kept]
        ctx.save_for_backward(
            *(inputs if how.keeps_inputs else ()), *((out,) if how.keeps_output else ()), *kept
        )
        ctx.likes = [(x.shape, x.dtype) for x in inputs]
        ctx.meter, ctx.how = meter, how
        meter.count(how.flops, 0, forward_phase())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        scratch = [grad.new_empty(shape, dtype=dtype) for shape, dtype in ctx.how.scratch]
        ctx.meter.count(2 * ctx.how.flops, 0, "backward")
        found = [grad.new_empty(shape, dtype=dtype) for shape, dtype in ctx.likes]
        del scratch
        return None, None, *found


Spec = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class _How:
    """Of one call of attention."""

    flops: float
    out: tuple[int, ...]
    kept: tuple[Spec, ...] = ()
    scratch: tuple[Spec, ...] = ()
    keeps_inputs: bool = True
    keeps_output: bool = True


class _TokenLoss(torch.autograd.Function):
    """Linear cross-entropy that makes its gradients in the forward sweep and keeps them."""

    @staticmethod
    def forward(ctx: Any, meter: Meter, kind: str, low: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        m, width, vocabulary = *hidden.shape, len(weight)
        dtype = low or hidden.dtype
        rows = min(m, max(LOGITS[kind] // (vocabulary * dtype.itemsize), FEWEST_ROWS[kind]))
        table = weight.to(dtype)
        d_hidden, d_weight = torch.zeros_like(hidden), weight.new_zeros(weight.shape, dtype=torch.float32)
        buffer = hidden.new_empty(rows, vocabulary, dtype=dtype)
        half = dtype != torch.float32  # else the chunk itself becomes its gradient
        wide = hidden.new_empty(rows, vocabulary, dtype=torch.float32) if half else buffer
        back = torch.empty_like(buffer) if half else buffer
        chunks = -(-m // max(rows, 1))
        meter.logits = max(meter.logits, buffer.nbytes + half * (wide.nbytes + back.nbytes))
        # Each chunk of logits is written, read and rewritten by softmax, and read by both products.
        moved = chunks * (2 * table.nbytes + 2 * d_weight.nbytes) + m * vocabulary * (
            2 * dtype.itemsize + 6 * 4
        )
        meter.count(2.0 * m * width * vocabulary, moved / 3, forward_phase())
        meter.count(4.0 * m * width * vocabulary, 2 * moved / 3, "backward")  # made here, in the sweep
        del table, buffer, wide, back
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight = (x.to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return None, None, None, hidden, weight


class StandIns:
    """kind: "cuda" (fused kernels in bfloat16) or "cpu" (the plain versions that a CPU takes, in float32); low: the dtype
    that autocast casts to, None where it is off."""

    def __init__(self, meter: Meter, kind: str, low: torch.dtype | None) -> None:
        self.meter, self.kind, self.low = meter, kind, low
        self._cast: dict[int, Tensor] = {}

    def lowered(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`function` as torch.autocast("cuda") runs it: in `low`; a weight is cast once."""

        def cast(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dtype != torch.float32 or not x.is_meta:
                return x
            if not (x.is_leaf and x.requires_grad):
                return x.to(self.low)
            if id(x) not in self._cast:
                self._cast[id(x)] = x.to(self.low)
            return self._cast[id(x)]

        def run(*args: Any, **kwargs: Any) -> Tensor:
            return function(*map(cast, args), **{name: cast(x) for name, x in kwargs.items()})

        return run

    def layer_norm(
        self, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Tensor:
        """In float32 where autocast is on, as all norms are then."""
        return torch.layer_norm(x.float() if self.low else x, shape, weight, bias, eps)

    def rms_norm(self, x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
        """The same; one kernel on a GPU, seven operations on a CPU."""
        out: Tensor = _RMSNorm.apply(self.meter, self.kind, x.float() if self.low else x, weight)
        return out

    def cast(self, x: Tensor) -> Tensor:
        """As autocast does at the entrance of each kernel."""
        return x if self.low is None else x.to(self.low)

    def window_attention(
        self, qkv: Tensor, bias: Tensor | None = None, *, window: tuple[int, int], shift: Any = 0,
        logit_scale: Tensor | None = None, pad_kv: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """[B, H, W, 3, h, d] -> [B, H, W, h * d]."""
        qkv = self.cast(qkv)
        batch, height, width, _, heads, dim = qkv.shape
        slots = window[0] * window[1]
        windows = -(-height // window[0]) * -(-width // window[1])
        flops = 4.0 * batch * windows * slots * slots * heads * dim
        more = [x for x in (bias, logit_scale, pad_kv) if x is not None]
        out_shape, rows = (batch, height, width, heads * dim), (batch, height, width, heads)
        how = _How(flops, out_shape, ((rows, torch.float32),))
        if self.kind == "cpu":  # eager.py keeps packed q, k, v, the probabilities, and the lengths of q and k
            f32, padded = torch.float32, batch * windows * slots * heads
            packed, logits = ((3, padded, dim), f32), ((padded, slots), f32)
            how = _How(
                flops, out_shape, (packed, logits, ((2, padded), f32)), (packed, ((padded, dim), f32), logits), False, False
            )  # fmt: skip
        out: Tensor = _Attention.apply(self.meter, how, qkv, *more)
        return out

    def latent_attention(self, q: Tensor, k: Tensor, v: Tensor, **where: Any) -> Tensor:
        """q [B, M, h, d], k and v [B, N, h, d], or packed [N, h, d] with cu_seqlens_k."""
        q, k, v = self.cast(q), self.cast(k), self.cast(v)
        batch, queries, heads, dim = q.shape
        keys = k.shape[0] if k.dim() == 3 else batch * k.shape[1]
        flops = 2.0 * queries * keys * heads * (dim + v.shape[-1])
        rows: Spec = ((batch, heads, queries), torch.float32)
        out: Tensor = _Attention.apply(
            self.meter, _How(flops, (batch, queries, heads, v.shape[-1]), (rows,)), q, k, v
        )
        return out

    def dense(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        """[B, h, T, d]; what a causal mask hides is counted, as torch's counter does."""
        q, k, v = self.cast(q), self.cast(k), self.cast(v)
        batch, heads, queries, dim = q.shape
        flops = 2.0 * batch * heads * queries * k.shape[2] * (dim + v.shape[-1])
        rows: Spec = (tuple(q.shape[:-1]), torch.float32)
        out: Tensor = _Attention.apply(
            self.meter, _How(flops, (*q.shape[:-1], v.shape[-1]), (rows,)), q, k, v
        )
        return out

    def linear_cross_entropy(self, hidden: Tensor, weight: Tensor, targets: Tensor, **_: Any) -> Tensor:
        """hidden [M, H], weight [V, H] -> the sum of the losses."""
        out: Tensor = _TokenLoss.apply(self.meter, self.kind, self.low, hidden, weight)
        return out

    def contrastive_loss(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, **_: Any
    ) -> Tensor:
        """image [P, E], text [P*K, E]: without the P x P*K logits in memory."""
        flops = 2.0 * len(image) * len(text) * image.shape[1]
        how = _How(flops, (), (((len(image),), torch.float32),))
        out: Tensor = _Attention.apply(self.meter, how, image, text, logit_scale, logit_bias)
        return out


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and a float per row; on a CPU also what it has normalised."""

    @staticmethod
    def forward(ctx: Any, meter: Meter, kind: str, x: Tensor, weight: Tensor) -> Tensor:
        normalised = (torch.empty_like(x),) if kind == "cpu" else ()
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1]), weight, *normalised)
        ctx.meter = meter
        meter.count(0, 2 * x.nbytes, forward_phase())
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, _, weight, *_ = ctx.saved_tensors
        ctx.meter.count(0, 3 * x.nbytes, "backward")
        return None, None, torch.empty_like(x), torch.empty_like(weight)


def log_mel(waveforms: Tensor, mels: int) -> Tensor:
    """[P, S] at 16 kHz -> [P, mels, S / 160]; the spectrum and its power exist for a while. It is data: no gradient."""
    count, frames, bins = len(waveforms), waveforms.shape[1] // HOP, FFT // 2 + 1
    spectrum = waveforms.new_empty(count, bins, frames + 1, dtype=torch.complex64)
    power = waveforms.new_empty(2, count, bins, frames, dtype=torch.float32)
    del spectrum, power
    return waveforms.new_empty(count, mels, frames, dtype=torch.float32)


@contextmanager
def in_place_of_kernels(meter: Meter, kind: str, low: torch.dtype | None) -> Iterator[None]:
    """The models call these while this is on."""
    stand_ins = StandIns(meter, kind, low)
    places: list[tuple[Any, str, Callable[..., Tensor]]] = [
        (models.aurora.encoder, "window_attention", stand_ins.window_attention),
        (models.perceiver.adapters.image, "window_attention", stand_ins.window_attention),
        (models.layers, "latent_attention", stand_ins.latent_attention),
        (models.perceiver.latents, "latent_attention", stand_ins.latent_attention),
        (models.perceiver.adapters.audio, "log_mel", log_mel),
        (kernels, "linear_cross_entropy", stand_ins.linear_cross_entropy),
        (kernels, "contrastive_loss", stand_ins.contrastive_loss),
        (F, "scaled_dot_product_attention", stand_ins.dense),
        (F, "rms_norm", stand_ins.rms_norm),
        (F, "layer_norm", stand_ins.layer_norm),
    ]
    if low is not None:
        places += [(F, name, stand_ins.lowered(getattr(F, name))) for name in ("linear", "conv2d")]
    with replaced(places):
        yield


@contextmanager
def replaced(places: list[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    """Attributes of modules are others while this is on."""
    with ExitStack() as stack:
        for module, name, function in places:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, function)
        yield
