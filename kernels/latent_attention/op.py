"""The public function: checks, choice of the backend, dispatch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal, overload

import torch
from torch import Tensor

from kernels.autocast import autocast_dtype
from kernels.backend import Choice, Plan, describe, resolve
from kernels.latent_attention import auto, eager, flash_ops, reference, sdpa, triton_ops
from kernels.latent_attention.dropout import seed_tensor
from kernels.latent_attention.packing import unpack_keys
from kernels.transforms import refuse_transforms, require_tensors

NAME = "latent_attention"
VISIBILITY = ("key_lengths", "cu_seqlens_k", "key_mask")
FEW_KEYS = 16
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@overload
def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of few queries (latents) over many keys, as in Perceiver (arXiv:2103.03206); any other sizes
    work too.

    q: [B, M, h, dqk]; k: [B, N, h_kv, dqk]; v: [B, N, h_kv, dv]; h a multiple of h_kv: query head i reads
        key head i // (h / h_kv). float64, float32, float16 or bfloat16, all three the same.
    Visible keys, at most one of:
        key_lengths: int [B], the first so many keys of each sample;
        cu_seqlens_k: int32 [B + 1], k and v are packed, [total, h_kv, d], sample b has rows cu[b] to cu[b +
        1]; key_mask: bool [B, N], True = visible.
    scale: of the dot products; default dqk**-0.5.
    dropout_p: share of the probabilities that is dropped, the others grow by 1 / (1 - dropout_p); for
        training only: pass 0 in evaluation. What is dropped depends on seed and on places alone (see
        dropout.py); seed None draws one from torch's default generator.
    backend: "auto", "reference", "eager", "sdpa", "triton" or "flash_attn"; `kernels.explain` tells what auto takes.

    Returns out [B, M, h, dv], and with return_lse also the natural log of each row's sum of exponentials,
    [B, h, M], float32 (float64 for float64 inputs), before dropout. A row with no visible key gives 0, lse
    -inf, and gradients 0. Gradients: q, k, v, through out and through lse. What is hidden must still be
    finite. Under autocast q, k and v are cast to autocast's dtype, as torch's own attention casts them.
    Raises TypeError (dtypes), ValueError (shapes, values), BackendError (a named backend that cannot run the
    call).
    """
    require_tensors(
        NAME, VISIBILITY, q=q, k=k, v=v, key_lengths=key_lengths, cu_seqlens_k=cu_seqlens_k, key_mask=key_mask
    )
    refuse_transforms(NAME, backend, q, k, v, key_lengths, cu_seqlens_k, key_mask)
    low = autocast_dtype(q)
    if low is not None:
        q, k, v = q.to(low), k.to(low), v.to(low)
    _check(q, k, v, key_lengths, cu_seqlens_k, key_mask, dropout_p)
    if backend == "auto":
        dense = key_lengths is None and cu_seqlens_k is None and key_mask is None
        backend = prefer(q, k, v, dropout_p, return_lse, dense)[0]
    else:
        resolve(NAME, backend, plan(q, k, v, dropout_p, return_lse, key_lengths, cu_seqlens_k, key_mask))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    drop = seed_tensor(seed, q.device) if dropout_p > 0 else None
    with torch.autocast(q.device.type, enabled=False) if low else nullcontext():
        # From here on, dtypes are this function's business.
        out, lse = _run(
            backend, q, k, v, key_lengths, cu_seqlens_k, key_mask, scale, dropout_p, drop, return_lse
        )
    return out if lse is None else (out, lse)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Choice:
    """`kernels.explain(latent_attention, ...)`."""
    if (low := autocast_dtype(q)) is not None:
        q, k, v = q.to(low), k.to(low), v.to(low)
    _check(q, k, v, key_lengths, cu_seqlens_k, key_mask, dropout_p)
    return describe(NAME, backend, plan(q, k, v, dropout_p, return_lse, key_lengths, cu_seqlens_k, key_mask))


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    key_lengths: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Plan:
    """What auto takes for this call, and what the others cannot do."""
    found = {
        "sdpa": "; ".join(_sdpa_refusals(k, dropout_p, return_lse)) or None,
        "triton": triton_ops.refusal(q, v),
        "flash_attn": flash_ops.refusal(q, k, v, dropout_p, key_mask is not None),
    }
    dense = key_lengths is None and cu_seqlens_k is None and key_mask is None
    refusals = {name: why for name, why in found.items() if why is not None}
    return Plan(*prefer(q, k, v, dropout_p, return_lse, dense), refusals)


def _sdpa_refusals(k: Tensor, dropout_p: float, return_lse: bool) -> list[str]:
    reasons = []
    if return_lse:
        reasons.append("torch's attention returns no log-sum-exp (return_lse=True)")
    if dropout_p > 0:
        reasons.append(f"torch's attention takes no seed, so dropout_p={dropout_p} could not be reproduced")
    if k.shape[-3] == 0:
        reasons.append("there are no keys")
    return reasons


def prefer(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, return_lse: bool, dense: bool
) -> tuple[str, str]:
    """The backend that auto takes for this call, and why. The figures behind it are in kernels/README.md; those of GPUs
    also in auto.json."""
    able = not (return_lse or dropout_p > 0 or k.shape[-3] == 0)  # sdpa
    if able and dense and torch.compiler.is_exporting():
        return "sdpa", "its program does not depend on the batch (torch.export)"
    if q.device.type == "cpu":
        if not able:
            return "eager", "the fastest that was measured"
        if dense and q.shape[-1] != v.shape[-1]:
            return "eager", "measured faster on CPUs where dqk and dv differ"
        if q.shape[1] > 1 and k.shape[-3] <= FEW_KEYS:
            return "eager", f"measured faster on CPUs for several queries and up to {FEW_KEYS} keys"
        return "sdpa", f"measured faster on CPUs for one query and for more than {FEW_KEYS} keys"
    triton = triton_ops.refusal(q, v) is None
    figures = auto.figures(q.device)
    if figures is not None and triton and q.dtype.itemsize == 2:
        training = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        if able and dense and sdpa.takes_cudnn(q, k, v) and figures.fills(q, v, training):
            return "sdpa", f"cuDNN's attention, measured faster on an {figures.device} where it fills the GPU"
        return "triton", f"measured faster on an {figures.device} than torch's kernels for such a call"
    if not able:
        reason = f"sdpa cannot run it, and nothing was measured on {q.device.type} like this in {q.dtype}"
        return "eager", reason + (": triton can be asked for by name" if triton else "")
    if figures is not None and q.dtype == torch.float32:
        return figures.float32, f"measured faster on an {figures.device} in float32"
    reason = f"torch's fused attention; nothing was measured on {q.device.type} like this in {q.dtype}"
    return "sdpa", reason + (": triton can be asked for by name" if triton else "")


def _run(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if backend == "triton":
        out, lse = triton_ops.latent_attention(
            q, k, v, key_lengths, offsets, key_mask, scale, dropout_p, seed
        )
        return out, lse if return_lse else None
    if backend == "flash_attn":
        out, lse = flash_ops.latent_attention(q, k, v, key_lengths, offsets, scale)
        return out, lse if return_lse else None
    if backend == "sdpa" and key_mask is None:
        found = sdpa.one_by_one(q, k, v, key_lengths, offsets, scale)
        if found is not None:
            return found, None
    visible = key_mask
    if key_lengths is not None:
        visible = torch.arange(k.shape[1], device=k.device) < key_lengths[:, None]
    if backend == "reference":
        out, lse = reference.latent_attention(q, k, v, visible, offsets, scale, dropout_p, seed)
        return out, lse if return_lse else None
    if offsets is not None:
        k, v, visible = unpack_keys(k, v, offsets)
    if backend == "sdpa":
        return sdpa.latent_attention(q, k, v, visible, scale), None
    return eager.latent_attention(q, k, v, visible, scale, dropout_p, seed, return_lse)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_mask: Tensor | None,
    dropout_p: float,
) -> None:
    """Raise an error that says what came and what is supported."""
    packed = cu_seqlens_k is not None
    # Each is asked once: a small call takes as long as the questions about it.
    sizes, k_sizes, v_sizes, dtype, device = q.shape, k.shape, v.shape, q.dtype, q.device
    if len(sizes) != 4 or len(k_sizes) != 4 - packed or len(v_sizes) != 4 - packed:
        raise ValueError(
            f"{NAME}: q must be [B, M, h, dqk] and k, v {'[total' if packed else '[B, N'}, h_kv, d] "
            f"{'with' if packed else 'without'} cu_seqlens_k; {_shapes(q, k, v)}"
        )
    if dtype not in DTYPES or k.dtype != dtype or v.dtype != dtype:
        raise TypeError(
            f"{NAME}: q, k, v must have one dtype of float64, float32, float16, bfloat16; "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if k.device != device or v.device != device:
        name, tensor = ("k", k) if k.device != device else ("v", v)
        raise ValueError(f"{NAME}: {name} must be on q's device {device}, got {tensor.device}")
    batch, _, heads, dqk = sizes
    kv_heads, dv = k_sizes[-2], v_sizes[-1]
    if k_sizes[:-1] != v_sizes[:-1] or k_sizes[-1] != dqk or (not packed and k_sizes[0] != batch):
        raise ValueError(
            f"{NAME}: k and v must agree in all but dv, and q in batch and dqk with k; {_shapes(q, k, v)}"
        )
    if 0 in (heads, dqk, kv_heads, dv) or heads % kv_heads:
        raise ValueError(
            f"{NAME}: h must be a multiple of h_kv, and heads and head_dim not empty; {_shapes(q, k, v)}"
        )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{NAME}: dropout_p must be in [0, 1), got {dropout_p}")
    if key_lengths is None and cu_seqlens_k is None and key_mask is None:
        return
    visibility = _named(key_lengths, cu_seqlens_k, key_mask)
    if len(visibility) > 1:
        raise ValueError(
            f"{NAME}: at most one of key_lengths, cu_seqlens_k, key_mask; "
            f"got {', '.join(name for name, _ in visibility)}"
        )
    for name, tensor in visibility:
        if tensor.device != device:
            raise ValueError(f"{NAME}: {name} must be on q's device {device}, got {tensor.device}")
        _check_visibility(name, tensor, batch, k_sizes[-3])


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"


def _named(
    key_lengths: Tensor | None, cu_seqlens_k: Tensor | None, key_mask: Tensor | None
) -> list[tuple[str, Tensor]]:
    given = {"key_lengths": key_lengths, "cu_seqlens_k": cu_seqlens_k, "key_mask": key_mask}
    return [(name, tensor) for name, tensor in given.items() if tensor is not None]


def _check_visibility(name: str, tensor: Tensor, batch: int, keys: int) -> None:
    """One of the three ways to say which keys are visible; `keys` is N, or the total of packed keys."""
    dtypes = [torch.bool] if name == "key_mask" else [torch.int32, torch.int64]
    match name:
        case "key_mask":
            shape, kind = [batch, keys], "bool [B, N]"
        case "key_lengths":
            shape, kind = [batch], "int32 or int64 [B]"
        case _:
            shape, kind = [batch + 1], "int32 or int64 [B + 1]"
    if list(tensor.shape) != shape or tensor.dtype not in dtypes:
        raise ValueError(f"{NAME}: {name} must be {kind} = {shape}, got {tensor.dtype} {list(tensor.shape)}")
    # Values are read where that costs nothing: not from another device, and not while compiling.
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if name == "key_lengths" and batch and not (0 <= int(tensor.min()) and int(tensor.max()) <= keys):
        raise ValueError(f"{NAME}: key_lengths must be from 0 to N = {keys}, got {tensor.tolist()}")
    if name == "cu_seqlens_k":
        offsets = tensor.tolist()
        if offsets[0] != 0 or offsets[-1] != keys or sorted(offsets) != offsets:
            raise ValueError(
                f"{NAME}: cu_seqlens_k must rise from 0 to the {keys} packed keys, got {offsets}"
            )
