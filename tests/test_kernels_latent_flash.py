"""latent_attention by FlashAttention: the adapter against the reference in float64, on stand-ins for the packages (flash.py),
and on a GPU with the package itself.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import flash
import pytest
import torch
from latents import HALF, check, run, some
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import LatentAttention, accelerate, explain, latent_attention, merge_attention, window_attention
from kernels.backend import BackendError
from kernels.latent_attention import flash_ops, op

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BFLOAT = torch.bfloat16
SMALL: dict[str, Any] = {"dqk": 16, "dv": 16, "dtype": HALF}
CALLS: dict[str, dict[str, Any]] = {
    "dense": {"queries": 17, "keys": 97, "heads": 2, "batch": 2},
    "grouped": {"queries": 9, "keys": 33, "heads": 4, "kv_heads": 2, "batch": 2, "dqk": 24, "dv": 24},
    "one-query": {"queries": 1, "keys": 40, "heads": 4, "kv_heads": 1},
    "one-query-lengths": {"queries": 1, "keys": 40, "heads": 4, "kv_heads": 1, "lengths": (40, 0, 7)},
    "one-query-packed": {"queries": 1, "keys": 40, "heads": 4, "kv_heads": 2, "offsets": (0, 13, 13, 40)},
    "lengths": {"queries": 5, "keys": 97, "heads": 2, "kv_heads": 2, "lengths": (97, 0, 33)},
    "grouped-lengths": {"queries": 5, "keys": 50, "heads": 4, "kv_heads": 2, "lengths": (1, 50, 0, 49)},
    "all-empty": {"queries": 3, "keys": 8, "lengths": (0, 0)},
    "packed": {"queries": 17, "keys": 200, "heads": 2, "kv_heads": 1, "offsets": (0, 90, 90, 200)},
    "packed-ends": {"queries": 2, "keys": 30, "offsets": (0, 0, 30, 30)},
    "wide": {"queries": 6, "keys": 21, "dqk": 256, "dv": 256},
}


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-2's stand-in, on the CPU."""
    for name, module in flash.second().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flash_ops, "MISSING_2", None)
    monkeypatch.setattr(flash_ops, "capability_refusal", lambda device: None)


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-3's, on what is taken for a Hopper GPU."""
    for name, module in flash.third().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flash_ops, "MISSING_3", None)
    monkeypatch.setattr(flash_ops, "capability_refusal", lambda device: None)
    monkeypatch.setattr(flash_ops, "is_hopper", lambda device: True)


# ---- numbers
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", CALLS)
def test_exact(name: str, dtype: torch.dtype) -> None:
    """Out, lse, and gradients through both, by the rule; a scale that is not the default one."""
    tensors, more = some(**CALLS[name], dtype=dtype)
    first = check(tensors, more, "flash_attn")
    again = run(tensors, more, "flash_attn")
    for key, value in first.items():
        assert torch.equal(value, again[key].masked_fill(again[key] == -float("inf"), 0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(flash_ops.MISSING_2 is not None, reason=f"flash-attn: {flash_ops.MISSING_2}")
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", CALLS)
def test_exact_with_the_package(name: str, dtype: torch.dtype) -> None:
    tensors, more = some(**CALLS[name], dtype=dtype, device="cuda")
    first = check(tensors, more, "flash_attn")
    again = run(tensors, more, "flash_attn")
    assert all(torch.equal(first[key], again[key]) for key in ("out", "q", "k", "v"))


@pytest.mark.skipif(flash_ops.MISSING_2 is not None, reason=f"flash-attn: {flash_ops.MISSING_2}")
def test_the_stand_in_has_the_packages_signatures() -> None:
    theirs = pytest.importorskip(
        "flash_attn.flash_attn_interface", reason="flash-attn cannot be imported here"
    )
    for name, mine in vars(flash.second()["flash_attn.flash_attn_interface"]).items():
        if callable(mine):
            own = getattr(theirs, name)
            signature = inspect.signature(getattr(own, "_init_fn", own))
            assert list(inspect.signature(mine).parameters) == list(signature.parameters), name


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize(("dtype", "size"), [(HALF, 1e-3), (HALF, 1e3), (BFLOAT, 1e-7), (BFLOAT, 1e6)])
@pytest.mark.parametrize("name", ["grouped", "lengths"])
def test_gradient_through_lse_alone(name: str, dtype: torch.dtype, size: float) -> None:
    """Which FlashAttention drops; as small and as large as the gradients' type can hold."""
    tensors, more = some(**CALLS[name], dtype=dtype)
    shown = more.get("key_lengths", torch.ones(2)) > 0
    found = []
    for backend, kind in (("flash_attn", dtype), ("reference", torch.float64)):
        leaves = [tensor.to(kind).requires_grad_() for tensor in tensors.values()]
        _, lse = latent_attention(*leaves, **more, return_lse=True, backend=backend)
        weights = size * torch.linspace(-1, 1, lse[shown].numel()).view(lse[shown].shape)
        loss = (lse[shown] * weights.to(lse)).sum()
        found.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    relative = torch.finfo(dtype).eps
    for mine, exact in zip(*found, strict=True):
        error = (mine.double() - exact).square().mean().sqrt()
        assert error <= relative * exact.square().mean().sqrt() + 2.0**-24 * (dtype == HALF)


@pytest.mark.usefixtures("second")
def test_merged_parts_equal_the_whole() -> None:
    tensors, more = some(7, 60, 4, 2, batch=2, **SMALL)
    q, k, v = (tensor.requires_grad_() for tensor in tensors.values())
    parts = [slice(0, 13), slice(13, 60)]
    split = [
        latent_attention(q, k[:, p], v[:, p], **more, return_lse=True, backend="flash_attn") for p in parts
    ]
    out, lse = merge_attention(*zip(*split, strict=True))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    want, want_lse = latent_attention(*wide, **more, return_lse=True, backend="reference")
    torch.testing.assert_close(out.double(), want, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(want)
    grads = torch.autograd.grad(out, (q, k, v), direction.half()), torch.autograd.grad(want, wide, direction)
    for mine, exact in zip(*grads, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=5e-3, atol=5e-3)


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize("how", ["dense", "lengths", "packed"])
def test_views(how: str) -> None:
    """A transposed q, k and v as halves of one projection, rows of an odd size, an odd address."""
    for width, first in ((64, 0), (68, 0), (72, 1)):
        both = torch.randn(2, 40, width, dtype=HALF)
        k, v = (both[..., i * 32 + first : i * 32 + 32 + first].unflatten(-1, (2, 16)) for i in range(2))
        q = torch.randn(2, 4, 5, 16, dtype=HALF).transpose(1, 2)
        more: dict[str, Any] = {"backend": "flash_attn"}
        if how == "lengths":
            more["key_lengths"] = torch.tensor([40, 3])
        if how == "packed":
            k, v, more["cu_seqlens_k"] = k[0], v[0], torch.tensor([0, 11, 40], dtype=torch.int32)
        want = latent_attention(q.contiguous(), k.contiguous(), v.contiguous(), **more)
        assert torch.equal(latent_attention(q, k, v, **more), want)


@pytest.mark.usefixtures("second")
def test_edges() -> None:
    """No samples, no queries, no keys; offsets of a device that were not looked at."""
    for shapes in (
        ((0, 3, 2, 16), (0, 5, 2, 16)),
        ((2, 0, 2, 16), (2, 5, 2, 16)),
        ((2, 3, 2, 16), (2, 0, 2, 16)),
    ):
        q, k, v = (torch.randn(shape, dtype=HALF, requires_grad=True) for shape in (*shapes, shapes[1]))
        lengths = torch.full((len(q),), k.shape[1])
        for more in ({}, {"key_lengths": lengths}):
            out, lse = latent_attention(q, k, v, return_lse=True, backend="flash_attn", **more)
            assert out.shape == q.shape and not out.any() and (lse == float("-inf")).all()
            assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))
    q, k = torch.randn(1, 3, 2, 16, dtype=HALF), torch.randn(9, 1, 16, dtype=HALF, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_check", lambda *_: None)
        more = {"cu_seqlens_k": torch.tensor([2, 7]), "backend": "flash_attn"}
        out = latent_attention(q, k, k, **more)
        beyond = latent_attention(q, k, k, **more | {"cu_seqlens_k": torch.tensor([0, 99])})
    torch.testing.assert_close(out, latent_attention(q, k[None, 2:7], k[None, 2:7], backend="flash_attn"))
    torch.testing.assert_close(beyond, latent_attention(q, k[None], k[None], backend="flash_attn"))
    (grad,) = torch.autograd.grad(out.sum(), k)
    assert grad[2:7].all() and not grad[:2].any() and not grad[7:].any()  # never memory that nobody wrote


# ---- how it is used
# ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize("name", ["grouped", "lengths", "packed"])
def test_is_part_of_torch(name: str) -> None:
    """Compiled without a break; recomputed; under autocast; not differentiable twice."""
    tensors, more = some(**CALLS[name], dtype=HALF)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def attend(*args: Tensor) -> tuple[Tensor, Tensor]:
        return latent_attention(*args, **more, return_lse=True, backend="flash_attn")

    def loss(out: Tensor, lse: Tensor) -> Tensor:
        return out.float().sin().sum() + lse.masked_fill(lse == float("-inf"), 0).sin().sum()

    want = attend(*leaves)
    grads = torch.autograd.grad(loss(*want), leaves)
    torch.compiler.reset()
    for function in (
        torch.compile(attend, fullgraph=True, backend="aot_eager"),
        lambda *args: checkpoint(attend, *args, use_reentrant=False),
    ):
        out = function(*leaves)
        assert all(map(torch.equal, out, want))
        assert all(map(torch.equal, torch.autograd.grad(loss(*out), leaves), grads))
    with torch.autocast("cpu", BFLOAT):
        assert attend(*(leaf.detach().float() for leaf in leaves))[0].dtype == BFLOAT
    (grad,) = torch.autograd.grad(loss(*attend(*leaves)), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(grad.float().sum(), leaves[0])


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize("packed", [False, True])
def test_operators_keep_their_contracts(packed: bool) -> None:
    tensors, _ = some(5, 40, 4, 2, **SMALL, batch=2)
    q, k, v = tensors.values()
    cu_q = cu_k = None
    if packed:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        cu_q = torch.tensor([0, 5, 5, 10, 10], dtype=torch.int32)
        cu_k = torch.tensor([0, 13, 40, 60, 80], dtype=torch.int32)
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(flash_ops._forward, (*inputs, cu_q, cu_k, None, 0.3, False))
    out, lse = flash_ops._forward(q, k, v, cu_q, cu_k, None, 0.3, False)
    for grad_lse in (None, torch.randn_like(lse)):
        call = (torch.randn_like(out), grad_lse, out, lse, q, k, v, cu_q, cu_k, 0.3)
        torch.library.opcheck(flash_ops._backward, call)


@pytest.mark.usefixtures("second")
def test_module_takes_it() -> None:
    module = LatentAttention(32, 2, input_dim=16, backend="flash_attn").half()
    assert module(torch.randn(1, 3, 32).half(), torch.randn(1, 9, 16).half()).isfinite().all()


# ---- FlashAttention-3
# -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("third")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dims", [None, (16, 40), (192, 128)], ids=str)
def test_third_without_gradients(name: str, dims: tuple[int, int] | None) -> None:
    dqk, dv = dims or (CALLS[name].get("dqk", 16), CALLS[name].get("dv", 16))
    tensors, more = some(**CALLS[name] | {"dqk": dqk, "dv": dv}, dtype=HALF)
    assert explain(latent_attention, **tensors, **more, backend="flash_attn").backend == "flash_attn"
    out, lse = latent_attention(**tensors, **more, return_lse=True, backend="flash_attn")
    wide = {key: tensor.double() for key, tensor in tensors.items()}
    want, want_lse = latent_attention(**wide, **more, return_lse=True, backend="reference")
    torch.testing.assert_close(out.double(), want, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("third")
def test_third_never_with_gradients(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    tensors, more = some(3, 9, **SMALL)
    q, k, v = (tensor.requires_grad_() for tensor in tensors.values())
    monkeypatch.setattr(flash_ops, "MISSING_2", "it is not installed: pip install flash-attn")
    with pytest.raises(
        BackendError,
        match="FlashAttention-2: it is not installed.*FlashAttention-3: it is taken without gradients alone",
    ):
        latent_attention(q, k, v, **more, backend="flash_attn")
    with torch.no_grad():
        latent_attention(q, k, v, **more, backend="flash_attn")
    request.getfixturevalue("second")
    monkeypatch.setattr(sys.modules["flash_attn_interface"], "flash_attn_func", None)
    latent_attention(q, k, v, **more, backend="flash_attn").sum().backward()
    assert q.grad is not None


# ---- what it cannot do
# ------------------------------------------------------------------------------------------------


def refusal_of(dqk: int = 16, dv: int = 16, dtype: torch.dtype = HALF, **more: Any) -> str:
    q, k, v = (torch.zeros(2, n, 2, d, dtype=dtype) for n, d in ((3, dqk), (5, dqk), (5, dv)))
    with pytest.raises(BackendError) as raised:
        latent_attention(q, k, v, **more, backend="flash_attn")
    assert explain(latent_attention, q, k, v, **more, backend="flash_attn").backend is None
    return str(raised.value)


@pytest.mark.usefixtures("second")
def test_refusals_name_every_reason() -> None:
    assert "it takes float16 and bfloat16, got torch.float32. These can: reference" in refusal_of(
        dtype=torch.float32
    )
    assert (
        "FlashAttention-2: dqk and dv must be equal, got 16 and 32; FlashAttention-3: it is not"
        in refusal_of(16, 32)
    )
    assert "head_dim must be a multiple of 8 up to 256, got 59;" in refusal_of(59, 59)
    assert "head_dim must be a multiple of 8 up to 256, got 264;" in refusal_of(264, 264)
    message = refusal_of(12, 16, torch.float64, dropout_p=0.1, key_mask=torch.ones(2, 5).bool())
    for part in (
        "got torch.float64",
        "it takes no key_mask; key_lengths and cu_seqlens_k",
        "dropout_p=0.1 could not be",
    ):
        assert part in message
    assert (
        "dqk and dv must be equal, got 12 and 16, head_dim must be a multiple of 8 up to 256, got 12 and 16"
        in message
    )


def test_refusals_without_the_package_or_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if flash_ops.MISSING_2 and flash_ops.MISSING_3:
        assert "FlashAttention is not installed: pip install" in refusal_of()
    assert "it runs on CUDA devices, got cpu" in refusal_of()
    with pytest.raises(
        BackendError, match="window_attention: backend 'flash_attn' .* neither windows nor a position bias"
    ):
        window_attention(torch.zeros(1, 4, 4, 3, 1, 8), window=2, backend="flash_attn")
    # A package that is there and broken, as after an update of torch.
    monkeypatch.setattr(flash_ops, "MISSING_2", None)
    monkeypatch.setattr(flash_ops, "capability_refusal", lambda device: None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    q = torch.zeros(1, 3, 1, 16, dtype=HALF)
    with pytest.raises(BackendError, match="flash-attn is installed, but its import fails"):
        latent_attention(q, q, q, backend="flash_attn")


@pytest.mark.parametrize(
    ("version", "message"),
    [("2.7.4.post1", "version 2.7.4.post1 is installed, 2.8 or newer"), ("2.8.3", None), ("3.0", None)],
)
def test_old_versions_are_refused(version: str, message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_ops.importlib.metadata, "version", lambda name: version)
    found = flash_ops._missing()
    assert found is None if message is None else message in str(found)


@pytest.mark.usefixtures("second")
def test_auto_never_takes_it() -> None:
    """Nobody has measured it."""
    q = torch.zeros(1, 64, 2, 64, dtype=BFLOAT)
    choice = explain(latent_attention, q, q, q)
    assert choice.backend == "sdpa" and choice.others["flash_attn"] == "able, but auto prefers sdpa"


@pytest.mark.usefixtures("second")
def test_accelerate_refuses_it_for_windows_alone() -> None:
    timm = pytest.importorskip("timm", reason="needs timm: pip install timm")
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1,), num_heads=(1,), embed_dim=8)
    with pytest.raises(BackendError, match="accelerate: backend 'flash_attn' .* neither windows"):
        accelerate(model, backend="flash_attn")
