"""The Triton kernels of latent attention; see interpreter.py for where they run.

The rule is the benchmark's (bench/numerics.py): against the reference in float64, an output may be off by twice what
plain PyTorch is in the same dtype, a gradient by three times that.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from interpreter import interpreter as interpreter
from interpreter import on_each_device
from latents import HALF, SINGLE, run, some
from latents import check as check_backend
from torch import Tensor

from kernels import explain, latent_attention, merge_attention
from kernels.backend import BackendError
from kernels.latent_attention import launch

triton = pytest.importorskip("triton", reason="needs Triton, which is for Linux: pip install 'triton>=3.6'")
pytestmark = pytest.mark.usefixtures("interpreter")


def check(tensors: dict[str, Tensor], more: dict[str, Any]) -> None:
    check_backend(tensors, more, "triton")


CALLS: dict[str, dict[str, Any]] = {
    "one-query": {"queries": 1, "keys": 97},
    "two-keys": {"queries": 9, "keys": 2, "heads": 2, "kv_heads": 2},
    "1025-keys": {"queries": 3, "keys": 1025},
    "many-queries": {"queries": 200, "keys": 10, "heads": 2},
    "lengths": {"queries": 5, "keys": 97, "heads": 2, "dqk": 24, "dv": 40, "lengths": (97, 0, 33)},
    "packed": {"queries": 17, "keys": 200, "heads": 2, "kv_heads": 2, "offsets": (0, 90, 90, 200)},
    "mask": {"queries": 8, "keys": 70, "heads": 4, "kv_heads": 2, "batch": 2, "masked": True},
    "dropout": {"queries": 70, "keys": 97, "heads": 2, "kv_heads": 1, "dropout_p": 0.3, "lengths": (97, 13)},
    "head-dim-59": {"queries": 4, "keys": 40, "dqk": 59, "dv": 59},
    "head-dim-128": {"queries": 65, "keys": 66, "dqk": 128, "dv": 64},
    "head-dim-256": {"queries": 33, "keys": 34, "dqk": 200, "dv": 256},
}


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", CALLS)
@on_each_device
def test_exact(device: str, name: str, dtype: torch.dtype, parts: int) -> None:
    """Out, lse and gradients by the rule, with one part of the keys (and of the queries) and with several."""
    with mock.patch("kernels.latent_attention.forward.splits", lambda programs, steps, slots: parts):
        check(*some(**CALLS[name], dtype=dtype, device=device))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: the interpreter has no true bfloat16"
)
@pytest.mark.parametrize("name", CALLS)
def test_exact_in_bf16(name: str) -> None:
    check(*some(**CALLS[name], dtype=torch.bfloat16, device="cuda"))


@on_each_device
def test_exact_with_the_tiles_of_sm_90(device: str) -> None:
    """The interpreter takes sm_80's configurations; Hopper's have a code of its own for steps that are full."""
    with mock.patch("kernels.latent_attention.forward.processor", lambda _: (90, 2)):
        for name in ("many-queries", "lengths", "packed", "mask", "dropout", "head-dim-128"):
            check(*some(**CALLS[name], dtype=HALF, device=device))
        check(*some(130, 200, 2, 1, 32, 32, dtype=HALF, device=device))


@on_each_device
def test_any_scale(device: str) -> None:
    """Negative: the largest logit is that of the smallest product. Zero: an average, with hidden keys too."""
    for scale in (-0.3, 0.0):
        for call in (CALLS["lengths"], CALLS["mask"]):
            tensors, more = some(**call, dtype=HALF, device=device)
            check(tensors, more | {"scale": scale})


@on_each_device
def test_any_shape(device: str) -> None:
    """What hypothesis draws."""
    pytest.importorskip("hypothesis", reason="needs hypothesis: pip install hypothesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    @st.composite
    def calls(draw: Any) -> dict[str, Any]:
        keys, group = draw(st.integers(1, 80)), draw(st.integers(1, 2))
        kv_heads = draw(st.integers(1, 2))
        call = {
            "queries": draw(st.integers(1, 40)), "keys": keys, "heads": group * kv_heads, "kv_heads": kv_heads,
            "dqk": draw(st.sampled_from([1, 8, 16, 40])), "dv": draw(st.sampled_from([1, 16, 24])),
            "dropout_p": draw(st.sampled_from([0.0, 0.5])), "dtype": draw(st.sampled_from([SINGLE, HALF])),
        }  # fmt: skip
        kind = draw(st.sampled_from(["all", "lengths", "packed", "mask"]))
        if kind == "lengths":
            call["lengths"] = tuple(draw(st.lists(st.integers(0, keys), min_size=1, max_size=3)))
        elif kind == "packed":
            call["offsets"] = (0, *sorted(draw(st.lists(st.integers(0, keys), max_size=2))), keys)
        return call | {"masked": kind == "mask"}

    @settings(
        max_examples=15 if device == "cpu" else 100, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(calls())
    def draw_and_check(call: dict[str, Any]) -> None:
        torch.manual_seed(0)
        check(*some(**call, device=device))

    draw_and_check()


@on_each_device
def test_same_bits_every_time_and_merged(device: str) -> None:
    """Split or not, run again or not; and parts of the keys merge to the whole."""
    tensors, more = some(9, 130, heads=2, kv_heads=2, dtype=HALF, device=device)
    with mock.patch("kernels.latent_attention.forward.splits", lambda programs, steps, slots: 2):
        first, again = (run(tensors, more, "triton") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    q, k, v = tensors.values()
    halves = [
        latent_attention(q, k[:, some], v[:, some], scale=more["scale"], return_lse=True, backend="triton")
        for some in (slice(0, 57), slice(57, None))
    ]
    out, lse = merge_attention(*zip(*halves, strict=True))
    torch.testing.assert_close(out, first["out"], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, first["lse"], rtol=1e-5, atol=1e-5)


@on_each_device
def test_one_key(device: str) -> None:
    """Its weight is 1 whatever the logit, so nothing of out depends on q and k."""
    tensors, more = some(9, 1, heads=2, kv_heads=2, device=device)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    out = latent_attention(*leaves, **more, backend="triton")
    assert torch.equal(out, tensors["v"].expand_as(out))
    d_q, d_k, d_v = torch.autograd.grad(out.sin().sum(), leaves)
    assert max(float(d_q.abs().max()), float(d_k.abs().max())) < 1e-5
    torch.testing.assert_close(d_v, 9 * tensors["v"].detach().cos(), rtol=1e-5, atol=1e-5)


@on_each_device
def test_views_are_not_copied_into_wrong_places(device: str) -> None:
    """k and v as halves of one projection, transposed q, rows of an odd size."""
    q = torch.randn(2, 3, 5, 16, device=device, dtype=HALF).transpose(1, 2)
    for width in (64, 66):
        both = torch.randn(2, 40, width, device=device, dtype=HALF)
        k, v = (both[..., i * 32 : i * 32 + 32].unflatten(-1, (2, 16)) for i in range(2))
        q_, more = q[:, :, :2], {"backend": "triton"}
        want = latent_attention(q_.contiguous(), k.contiguous(), v.contiguous(), **more)
        assert torch.equal(latent_attention(q_, k, v, **more), want)


@on_each_device
def test_is_part_of_torch(device: str) -> None:
    """The operators' contracts; compiled without a break; recomputed; under autocast."""
    from torch.utils.checkpoint import checkpoint

    from kernels.latent_attention import triton_ops

    tensors, more = some(5, 40, heads=2, offsets=(0, 13, 40), dropout_p=0.2, device=device)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def attend(*args: Tensor) -> Tensor:
        return latent_attention(*args, **more, backend="triton")

    want = attend(*leaves)
    grads = torch.autograd.grad(want.sin().sum(), leaves)
    for function in (
        torch.compile(attend, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager"),
        lambda *args: checkpoint(attend, *args, use_reentrant=False),
    ):
        out = function(*leaves)
        assert torch.equal(out, want)
        for got, expected in zip(torch.autograd.grad(out.sin().sum(), leaves), grads, strict=True):
            assert torch.equal(got, expected)
    with torch.autocast(device, HALF):
        assert attend(*leaves).dtype == HALF

    starts, lengths = torch.tensor([0, 13], device=device), torch.tensor([13, 27], device=device)
    call = (*leaves, starts, lengths, None, torch.tensor(5, device=device), 40, False, 0.3, 0.2)
    torch.library.opcheck(triton_ops._forward, call)
    out, lse = (result.detach() for result in triton_ops._forward(*call))
    still = [arg.detach() if isinstance(arg, Tensor) else arg for arg in call]
    torch.library.opcheck(
        triton_ops._backward, (torch.randn_like(out), torch.randn_like(lse), out, lse, *still)
    )


@on_each_device
def test_edges(device: str) -> None:
    """No samples, no queries, no keys; lengths of a device that were not looked at; a second derivative."""
    for shapes in (
        ((0, 3, 2, 16), (0, 5, 2, 16)),
        ((2, 0, 2, 16), (2, 5, 2, 16)),
        ((2, 3, 2, 16), (2, 0, 2, 16)),
    ):
        q, k, v = (torch.randn(shape, device=device, requires_grad=True) for shape in (*shapes, shapes[1]))
        out, lse = latent_attention(q, k, v, return_lse=True, backend="triton")
        assert out.shape == q.shape and not out.any() and (lse == float("-inf")).all()
        assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))
    q, k = (
        torch.randn(1, 3, 1, 16, device=device, requires_grad=True),
        torch.randn(1, 5, 1, 16, device=device),
    )
    with mock.patch("kernels.latent_attention.op._check"):
        far = latent_attention(q, k, k, key_lengths=torch.tensor([99], device=device), backend="triton")
    assert torch.equal(far, latent_attention(q, k, k, backend="triton"))
    (grad,) = torch.autograd.grad(far.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(grad.sum(), q)


@on_each_device
def test_refuses_what_it_cannot_do(device: str) -> None:
    q, k = torch.zeros(1, 3, 1, 16, device=device), torch.zeros(1, 5, 1, 16, device=device)
    assert explain(latent_attention, q, k, k, backend="triton").backend == "triton"
    with pytest.raises(BackendError, match="computes in float32 at most, got float64"):
        latent_attention(q.double(), k.double(), k.double(), backend="triton")
    wide = torch.zeros(1, 5, 1, 257, device=device)
    with pytest.raises(BackendError, match="dqk and dv must be from 1 to 256, got 16 and 257"):
        latent_attention(q, k, wide, backend="triton")


@pytest.mark.parametrize("backend", ["auto", "reference", "eager", "sdpa"])
def test_vmap_is_refused_everywhere(backend: str) -> None:
    one = torch.zeros(2, 1, 4, 1, 8)
    with pytest.raises(NotImplementedError, match="latent_attention: torch.func.vmap is not supported"):
        torch.func.vmap(lambda q: latent_attention(q, q, q, backend=backend))(one)


def test_splits_fill_whole_waves() -> None:
    """FlashAttention-2's dead band: 128 programs for 216 slots, and 24 heads of 512 latents (96 programs)."""
    for programs, steps, slots in (
        (128, 1024, 216),
        (96, 1024, 216),
        (8, 4096, 132),
        (1, 10_000, 108),
        (200, 64, 216),
    ):
        parts = launch.splits(programs, steps, slots)
        waves = -(-programs * parts // slots)
        assert programs * parts / (waves * slots) > 0.85, (programs, parts)
    assert launch.splits(8, 3, 216) == 1  # too few keys to share out
    assert launch.splits(10_000, 1024, 216) == 1  # many waves: nothing to win
    for steps in (1, 4, 9, 100):
        assert 1 <= launch.splits(3, steps, 132) <= max(1, steps // 4)
