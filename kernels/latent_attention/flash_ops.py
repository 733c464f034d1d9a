"""Latent attention by FlashAttention (arXiv:2307.08691, 2407.08608), as two operators that torch.compile does not look into.

FlashAttention-2 (the package flash-attn) does both passes, its backward in deterministic mode. FlashAttention-3 (the module
flash_attn_interface) is taken on Hopper GPUs where nothing asks for a gradient: its authors do not test its deterministic
backward. Where the packages mean something else than this function, it is put right here: the log-sum-exp of a row
that sees nothing, and gradients through the log-sum-exp, which the packages drop. Neither is imported before the first call.

Keys that a sample must not see are samples of their own, without queries: nothing is copied, and no length is read on the
host. Their gradients are 0.
"""

from __future__ import annotations

import importlib.metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kernels.backend import BackendError, capability_refusal, is_hopper
from kernels.operators import operator

LEAST = (2, 8)  # the oldest version whose source was read
WIDEST = 256
HOW = "pip install --no-build-isolation 'flash-attn>=2.8'"


def _missing() -> str | None:
    """Why FlashAttention-2 is not there. By its distribution: FlashAttention-4 has a folder flash_attn too."""
    try:
        found = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return f"it is not installed: {HOW}"
    if tuple(int(part) for part in found.split(".")[:2]) < LEAST:
        return f"version {found} is installed, 2.8 or newer is needed: {HOW}"
    return None


# Asked once: torch 2.11's compiler cannot look into the questions.
MISSING_2: str | None = _missing()
MISSING_3: str | None = "it is not installed" if find_spec("flash_attn_interface") is None else None


def machine_refusal(device: torch.device) -> str | None:
    """Why no call can run on `device`; None where some can."""
    why = capability_refusal(device)
    if MISSING_2 and MISSING_3:
        why = f"FlashAttention is not installed: {HOW}" + (f"; {why}" if why else "")
    return why


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd will ask for a gradient of one of them."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def refusal(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, masked: bool) -> str | None:
    """Every reason why the packages cannot run this call; None where one of them can."""
    why = machine_refusal(q.device)
    reasons = [] if why is None else [why]
    if q.dtype.itemsize != 2:
        reasons.append(f"it takes float16 and bfloat16, got {q.dtype}")
    if masked:
        reasons.append("it takes no key_mask; key_lengths and cu_seqlens_k can be")
    if dropout_p > 0:
        reasons.append(
            f"it draws its own random numbers, so dropout_p={dropout_p} could not be reproduced from a seed"
        )
    third = _third_refusals(q, k, v)
    nothing_installed = bool(MISSING_2 and MISSING_3)  # which `why` says
    if not nothing_installed and third and (second := _second_refusals(q, v)):
        reasons.append("FlashAttention-2: " + ", ".join(second) + "; FlashAttention-3: " + ", ".join(third))
    return "; ".join(reasons) or None


def _second_refusals(q: Tensor, v: Tensor) -> list[str]:
    dqk, dv = q.shape[-1], v.shape[-1]
    reasons = [] if MISSING_2 is None else [MISSING_2]
    if dqk != dv:
        reasons.append(f"dqk and dv must be equal, got {dqk} and {dv}")
    if dqk % 8 or dv % 8 or max(dqk, dv) > WIDEST:
        reasons.append(f"head_dim must be a multiple of 8 up to {WIDEST}, got {_dims(dqk, dv)}")
    return reasons


def _third_refusals(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    if MISSING_3 is not None:
        return [MISSING_3]
    dqk, dv = q.shape[-1], v.shape[-1]
    reasons = []
    if not is_hopper(q.device):
        reasons.append("it is taken on GPUs of compute capability 9.0 alone")
    if wants_gradient(q, k, v):
        reasons.append("it is taken without gradients alone")
    if dqk % 8 or dv % 8 or dqk > WIDEST:
        reasons.append(f"head_dim must be a multiple of 8 up to {WIDEST}, got {_dims(dqk, dv)}")
    if dqk != dv and not (128 < dqk <= 192 and 96 < dv <= 128) and not (dqk <= 64 and dv <= 512):
        reasons.append(
            f"dqk and dv must be equal, or 136 to 192 and 104 to 128, or up to 64 and up to 512, got {dqk} and {dv}"
        )
    return reasons


def _dims(dqk: int, dv: int) -> str:
    return str(dqk) if dqk == dv else f"{dqk} and {dv}"


def latent_attention(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, offsets: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q [B, M, h, dqk]; k, v [B, N, h_kv, d], or packed with offsets [B + 1] -> out [B, M, h, dv], lse [B, h, M]."""
    third = not _third_refusals(q, k, v)
    cu_q = cu_k = used = None
    batch, queries = q.shape[:2]
    if offsets is not None:
        total = len(k)
        # Offsets of another device were not looked at: they must not lead beyond k. What lies before the first and behind
        # the last is a sample without queries too, so that its gradient is written.
        ends = [torch.zeros_like(offsets[:1]), offsets.clamp(0, total), torch.full_like(offsets[:1], total)]
        cu_k = torch.cat(ends).int()
        cu_q = (torch.arange(-1, batch + 2, device=q.device, dtype=torch.int32).clamp(0, batch)) * queries
    elif key_lengths is not None:
        keys, count = k.shape[1], torch.arange(2 * batch + 1, device=q.device, dtype=torch.int32)
        lengths = key_lengths.clamp(0, keys).int()
        if third:
            cu_q, cu_k, used = count[: batch + 1] * queries, count[: batch + 1] * keys, lengths
        else:  # each sample, then its hidden keys
            starts = count[:batch] * keys
            cu_k = torch.cat(
                [torch.stack([starts, starts + lengths], 1).flatten(), count[batch : batch + 1] * keys]
            )
            cu_q = (count + 1) // 2 * queries
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    out, lse = _forward(q, k, v, cu_q, cu_k, used, scale, third)
    return out, lse


def _second() -> Any:
    """FlashAttention-2's module."""
    try:
        from flash_attn import flash_attn_interface
    except ImportError as error:
        raise BackendError(
            f"latent_attention: backend 'flash_attn': flash-attn is installed, but its import fails: {error}"
        ) from error
    return flash_attn_interface


def _third() -> Any:
    """FlashAttention-3's module."""
    try:
        import flash_attn_interface
    except ImportError as error:
        raise BackendError(
            f"latent_attention: backend 'flash_attn': FlashAttention-3 is installed, but its import fails: {error}"
        ) from error
    return flash_attn_interface


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    used: Tensor | None,
    scale: float,
    third: bool,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    out = q.new_empty((batch, queries, heads, v.shape[-1]))
    return out, q.new_empty((batch, heads, queries), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, _, ctx.scale, third = inputs
    assert not third, "FlashAttention-3 was chosen for a call that needs no gradient"
    ctx.save_for_backward(*output, q, k, v, cu_q, cu_k)
    ctx.set_materialize_grads(False)  # a gradient through lse costs a second pass


def _autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.scale), *[None] * 5


@operator("latent_attention_flash_forward", _fake_forward, (_autograd, _setup_context))
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    used: Tensor | None,
    scale: float,
    third: bool,
) -> tuple[Tensor, Tensor]:
    """out [B, M, h, dv] and lse [B, h, M] fp32. k, v [B, N, h_kv, d], or with cu_q, cu_k int32 [samples + 1] rows."""
    if q.numel() == 0 or k.numel() == 0:
        out, lse = _fake_forward(q, k, v, cu_q, cu_k, used, scale, third)
        return out.zero_(), lse.fill_(float("-inf"))
    batch, queries, heads, _ = q.shape
    more: dict[str, Any] = {"softmax_scale": scale, "return_attn_probs": True}
    package = _third() if third else _second()
    q, k, v = q.contiguous(), _loadable(k), _loadable(v)
    with torch.no_grad():
        if cu_q is None:
            out, lse = package.flash_attn_func(_loadable(q), k, v, **more)[:2]
        else:
            if used is not None:
                more["seqused_k"] = used
            rows = _loadable(q.flatten(0, 1))
            out, lse = package.flash_attn_varlen_func(rows, k, v, cu_q, cu_k, *_longest(queries, k), **more)[
                :2
            ]
            out, lse = out.view(batch, queries, heads, -1), lse.view(heads, batch, queries).transpose(0, 1)
    return out, torch.where(lse == float("inf"), float("-inf"), lse).contiguous()


def _longest(queries: int, k: Tensor) -> tuple[int, int]:
    """max_seqlen_q, max_seqlen_k, as bounds. At one query and grouped heads FlashAttention-2 takes every sample to have one."""
    return max(queries, 2), len(k)


def _fake_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@operator("latent_attention_flash_backward", _fake_backward)
def _backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous.

    FlashAttention computes dS = P (dO v' - rowsum(dO O)). What comes through lse is P d_lse: a pass of its own, with values
    of zero and a dO and an O whose products add up to -d_lse.
    """
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    q, k, v = _loadable(q.contiguous()), _loadable(k), _loadable(v)
    lse = torch.where(lse == float("-inf"), float("inf"), lse)  # as FlashAttention wrote it
    first = None
    if grad_out is not None:
        first = _pass(_loadable(grad_out.contiguous()), q, k, v, out, lse, cu_q, cu_k, scale)
    if grad_lse is None:
        return first or (q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape))
    wanted = grad_lse.masked_fill(torch.isinf(lse), 0).transpose(1, 2)  # [B, M, h]
    largest = wanted.abs().amax().clamp(2.0**-14, 2.0**15)
    size = torch.exp2(largest.log2().ceil()).clamp(
        max=2.0**15
    )  # a power of 2, so that nothing is rounded by it
    rest, directions, sums = wanted / size, torch.zeros_like(q), torch.zeros_like(q)
    for column in range(3):  # so many numbers of the half type hold a float32
        directions[..., column] = rest
        sums[..., column] = -1
        rest = rest - directions[..., column]
    nothing = v.new_zeros(v.shape[-1]).expand_as(v)
    d_q, d_k, _ = _pass(directions, q, k, nothing, sums, lse, cu_q, cu_k, scale)
    size = size.to(q.dtype)
    if first is None:
        return d_q.mul_(size), d_k.mul_(size), v.new_zeros(v.shape)
    return first[0].addcmul_(d_q, size), first[1].addcmul_(d_k, size), first[2]


def _pass(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention-2's backward."""
    d_q, d_k, d_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    more: dict[str, Any] = {
        "dropout_p": 0.0, "softmax_scale": scale, "causal": False, "window_size_left": -1, "window_size_right": -1,
        "softcap": 0.0, "alibi_slopes": None, "deterministic": True,
    }  # fmt: skip
    if cu_q is None:
        _second()._flash_attn_backward(d_out, q, k, v, out, lse, d_q, d_k, d_v, **more)
        return d_q, d_k, d_v
    most_q, most_k = _longest(q.shape[1], k)
    _second()._flash_attn_varlen_backward(
        d_out.flatten(0, 1), q.flatten(0, 1), k, v, out.flatten(0, 1), lse.transpose(0, 1).flatten(1).contiguous(),
        d_q.view(-1, *q.shape[2:]), d_k, d_v, cu_q, cu_k, most_q, most_k, **more,
    )  # fmt: skip
    return d_q, d_k, d_v


def _loadable(tensor: Tensor) -> Tensor:
    """As it is, or a copy whose rows 16-byte loads can take, which FlashAttention does not check."""
    wide = all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
    if wide and tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
