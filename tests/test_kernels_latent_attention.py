"""latent_attention and merge_attention: against a float64 softmax, torch's own attention, and each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import latent_attention, merge_attention
from kernels.backend import BackendError
from kernels.latent_attention.dropout import keep_mask, philox

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BACKENDS = ("reference", "eager", "sdpa")


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """The usual way, in the dtype that comes in; every row must see a key."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = (q * scale) @ k.mT
    if visible is not None:
        logits = logits.masked_fill(~visible[:, None, None], float("-inf"))
    return (logits.softmax(-1) @ v).transpose(1, 2)


# ---- against independent code
# ---------------------------------------------------------------------------------------

# batch, M, N, heads, kv heads, dqk, dv
SHAPES = [
    (2, 5, 1, 2, 2, 32, 32),
    (2, 16, 97, 4, 2, 64, 48),
    (1, 3, 1025, 2, 1, 128, 128),
    (2, 1, 64, 4, 4, 96, 96),
    (1, 70, 70, 2, 2, 32, 59),
    (0, 4, 6, 2, 2, 16, 16),
    (2, 0, 6, 2, 2, 16, 16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_by_the_rule(shape: tuple, backend: str) -> None:
    check_by_the_rule(shape, backend, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 33, 4, 2, 32, 16), (2, 64, 70, 1, 1, 16, 16)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types_by_the_rule(dtype: torch.dtype, shape: tuple, backend: str) -> None:
    check_by_the_rule(shape, backend, dtype)


def check_by_the_rule(shape: tuple, backend: str, dtype: torch.dtype) -> None:
    """Error at most 2x (gradients 3x) that of plain PyTorch in the same dtype, against a float64 softmax."""
    batch, queries, keys, heads, kv_heads, dqk, dv = shape
    # Permuted, so not contiguous.
    inputs = [
        torch.randn(batch, h, n, d).transpose(1, 2).to(dtype)
        for h, n, d in ((heads, queries, dqk), (kv_heads, keys, dqk), (kv_heads, keys, dv))
    ]
    direction = torch.randn(batch, queries, heads, dv).to(dtype)

    def run(function, kind: torch.dtype, **options: object) -> list[Tensor]:  # type: ignore[no-untyped-def]
        leaves = [t.detach().to(kind).requires_grad_() for t in inputs]
        out = function(*leaves, scale=0.23, **options)
        return [out, *torch.autograd.grad(out, leaves, direction.to(kind))]

    exact = run(plain_attention, torch.float64)
    plain = run(plain_attention, dtype)
    got = run(latent_attention, dtype, backend=backend)
    largest = max((t.abs().max().item() for t in exact if t.numel()), default=0.0)
    assert [t.dtype for t in got] == [dtype] * 4
    for index, (ours, theirs, truth) in enumerate(zip(got, plain, exact, strict=True)):
        assert ours.shape == truth.shape
        if truth.numel() == 0:
            continue
        rounded = truth.to(dtype)
        atol = 2 * ((rounded + 0.3 - 0.3) - rounded).abs().max().item()
        if backend == "sdpa":  # torch's fused attention takes a shorter exponential, and computes it twice
            atol += 8 * torch.finfo(torch.float32).eps * largest
        error, allowed = ((t.double() - truth).abs().max().item() for t in (ours, theirs))
        assert error <= (2 if index == 0 else 3) * allowed + atol, "out q k v".split()[index]
        if dtype == torch.bfloat16:
            assert (ours.double() - truth).square().mean().sqrt() < 0.005 * truth.square().mean().sqrt()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_multihead_attention(backend: str) -> None:
    """torch.nn.MultiheadAttention by weight mapping, with a key padding mask."""
    theirs = torch.nn.MultiheadAttention(24, 3, kdim=10, vdim=14, batch_first=True).double()
    latents = torch.randn(2, 5, 24, dtype=torch.float64)
    keys, values = torch.randn(2, 9, 10, dtype=torch.float64), torch.randn(2, 9, 14, dtype=torch.float64)
    hidden = torch.rand(2, 9) > 0.6
    want, _ = theirs(latents, keys, values, key_padding_mask=hidden)
    weights = (theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (3, 8))
        for x, w, b in zip((latents, keys, values), weights, theirs.in_proj_bias.chunk(3), strict=True)
    )
    got = theirs.out_proj(latent_attention(q, k, v, key_mask=~hidden, backend=backend).flatten(2))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def ragged(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [B 3, ...] and lengths, one of them 0."""
    q, k, v = (torch.randn(3, n, h, d, dtype=dtype) for n, h, d in ((4, 4, 6), (7, 2, 6), (7, 2, 5)))
    return q, k, v, torch.tensor([7, 0, 3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["key_lengths", "key_mask", "cu_seqlens_k"])
def test_visible_keys(backend: str, how: str) -> None:
    """Each sample alone, over the keys that it may see; an empty one gives 0 and no gradient."""
    q, k, v, lengths = ragged()
    shown = torch.arange(7) < lengths[:, None]
    if how == "key_mask":  # not only the first ones
        shown = torch.stack([shown[0], shown[1], torch.tensor([0, 1, 0, 0, 1, 1, 0]).bool()])
    packed_k, packed_v = k[shown], v[shown]
    leaves = [q, packed_k, packed_v] if how == "cu_seqlens_k" else [q, k, v]
    leaves = [t.clone().requires_grad_() for t in leaves]
    options = {
        "key_lengths": lengths,
        "key_mask": shown,
        "cu_seqlens_k": torch.tensor([0, 7, 7, 10], dtype=torch.int32),
    }
    got = latent_attention(*leaves, **{how: options[how]}, backend=backend)
    direction = torch.randn_like(got)
    grads = torch.autograd.grad(got, leaves, direction)
    row = 0
    for b in range(3):
        own = [
            t.clone().requires_grad_() for t in (q[b : b + 1], k[b : b + 1, shown[b]], v[b : b + 1, shown[b]])
        ]
        count = int(shown[b].sum())
        if count == 0:
            assert torch.equal(got[b], torch.zeros_like(got[b])) and torch.equal(
                grads[0][b], torch.zeros_like(q[b])
            )
            continue
        want = plain_attention(*own, scale=6**-0.5)
        torch.testing.assert_close(got[b : b + 1], want)
        expected = torch.autograd.grad(want, own, direction[b : b + 1])
        torch.testing.assert_close(grads[0][b], expected[0][0])
        for grad, wanted in zip(grads[1:], expected[1:], strict=True):
            mine = grad[row : row + count] if how == "cu_seqlens_k" else grad[b, shown[b]]
            torch.testing.assert_close(mine, wanted[0])
        row += count
    assert all(grad.isfinite().all() for grad in grads)
    if how != "cu_seqlens_k":
        assert not grads[1][~shown].any() and not grads[2][~shown].any()


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_log_sum_exp(backend: str) -> None:
    q, k, v, lengths = ragged()
    q.requires_grad_(), k.requires_grad_()
    _, lse = latent_attention(q, k, v, key_lengths=lengths, scale=0.5, return_lse=True, backend=backend)
    assert lse.shape == (3, 4, 4) and torch.isneginf(lse[1]).all()
    logits = 0.5 * torch.einsum("mhd,nhd->hmn", q[2], k[2, :3].repeat_interleave(2, 1))
    torch.testing.assert_close(lse[2], logits.logsumexp(-1))
    direction = torch.randn(4, 4, dtype=torch.float64)
    got = torch.autograd.grad((lse[2] * direction).sum(), (q, k), retain_graph=True)
    want = torch.autograd.grad((logits.logsumexp(-1) * direction).sum(), (q, k))
    torch.testing.assert_close(got, want)
    assert (
        latent_attention(q.float(), k.float(), v.float(), return_lse=True, backend=backend)[1].dtype
        == torch.float32
    )
    half = [t.detach().bfloat16() for t in (q, k, v)]
    assert latent_attention(*half, return_lse=True, backend=backend)[1].dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_no_keys_at_all(backend: str) -> None:
    q, k, v = (torch.randn(2, n, 2, 3, requires_grad=True) for n in (4, 0, 0))
    out, lse = latent_attention(q, k, v, return_lse=True, backend=backend)
    assert not out.any() and torch.isneginf(lse).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert not grads[0].any() and grads[1].shape == k.shape
    assert not latent_attention(q, k, v).any()  # auto finds one that can


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_gradcheck(backend: str) -> None:
    inputs = [t[:, :3].clone().requires_grad_() for t in ragged()[:3]]  # 3 queries, 3 keys
    lengths = torch.tensor([3, 0, 2])

    def both(*args: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = latent_attention(
            *args, key_lengths=lengths, scale=0.7, dropout_p=0.3, seed=11, return_lse=True, backend=backend
        )
        return out, lse[lengths > 0]

    assert torch.autograd.gradcheck(both, inputs, fast_mode=True)


# ---- merge
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merged_parts_equal_the_whole(dtype: torch.dtype) -> None:
    """Over uneven parts of the keys, one of which is hidden from a sample and one from all."""
    q, k, v = (torch.randn(2, n, 2, 8, dtype=dtype, requires_grad=True) for n in (5, 12, 12))
    visible = torch.rand(2, 12) > 0.3
    visible[0, :4], visible[:, 9:] = False, False
    want, want_lse = latent_attention(q, k, v, key_mask=visible, return_lse=True)
    parts = [slice(0, 4), slice(4, 9), slice(9, 12)]
    split = [latent_attention(q, k[:, p], v[:, p], key_mask=visible[:, p], return_lse=True) for p in parts]
    got, got_lse = merge_attention([out for out, _ in split], [lse for _, lse in split])
    assert got.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got_lse, want_lse, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(want)
    expected = torch.autograd.grad(want, (q, k, v), direction)
    for mine, theirs in zip(torch.autograd.grad(got, (q, k, v), direction), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=5 * tolerance, atol=5 * tolerance)


def test_merge_of_nothing_visible_is_nothing() -> None:
    q, k, v = (torch.randn(1, 3, 1, 4, requires_grad=True) for _ in range(3))
    hidden = torch.zeros(1, 3, dtype=torch.bool)
    parts = [latent_attention(q, k, v, key_mask=hidden, return_lse=True) for _ in range(2)]
    out, lse = merge_attention([out for out, _ in parts], [lse for _, lse in parts])
    assert not out.any() and torch.isneginf(lse).all()
    assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_merge_errors() -> None:
    out, lse = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="got 0 and 0"):
        merge_attention([], [])
    with pytest.raises(TypeError, match="lse must be a torch.Tensor, got NoneType"):
        merge_attention([out], [None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="got 2 and 1"):
        merge_attention([out, out], [lse])
    with pytest.raises(ValueError, match=r"got \[1, 3, 2, 4\] and \[1, 3, 2\]"):
        merge_attention([out], [lse.mT])


# ---- dropout
# ----------------------------------------------------------------------------------------------------------


def test_philox_known_answers() -> None:
    """The three known-answer vectors of Random123 for philox4x32-10."""

    def words(*numbers: int) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(number) for number in numbers)

    full = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, want in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((full,) * 4, (full, full), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        assert tuple(int(w) for w in philox(words(*counter), words(*key))) == want  # type: ignore[arg-type]


def test_dropout_depends_on_seed_and_places_only() -> None:
    q, k, v, lengths = ragged()
    shown = torch.arange(7) < lengths[:, None]

    def run(**options: object) -> Tensor:
        return latent_attention(q, k, v, key_lengths=lengths, dropout_p=0.4, **({"seed": 3} | options))

    want = run(backend="reference")
    torch.testing.assert_close(run(backend="eager"), want)
    assert torch.equal(run(), run()) and torch.equal(run(seed=torch.tensor(3)), run())
    assert not torch.equal(run(seed=4), run())
    assert not torch.equal(run(seed=3 + (1 << 32)), run())  # all 64 bits count
    packed = latent_attention(
        q,
        k[shown],
        v[shown],
        cu_seqlens_k=torch.tensor([0, 7, 7, 10], dtype=torch.int32),
        dropout_p=0.4,
        seed=3,
    )
    torch.testing.assert_close(packed, want)


def test_dropout_without_a_seed_follows_torch_manual_seed() -> None:
    q, k, v, _ = ragged()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(latent_attention(q, k, v, dropout_p=0.5))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    q.requires_grad_()

    def run(q: Tensor) -> Tensor:
        return latent_attention(q, k, v, dropout_p=0.5)

    torch.manual_seed(1)
    checkpointed = checkpoint(run, q, use_reentrant=False)
    torch.manual_seed(1)
    (want,) = torch.autograd.grad(run(q).square().sum(), q)
    torch.testing.assert_close(torch.autograd.grad(checkpointed.square().sum(), q)[0], want)


def test_dropout_is_unbiased() -> None:
    """Kept shares lie within five standard deviations, overall and along every axis; the mean over seeds is
    exact."""
    keep = keep_mask(torch.tensor(123), 0.3, 4, 4, 64, 61).double()
    for dims in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        share = keep.mean(dims)
        count = keep.numel() / share.numel()
        assert ((share - 0.7).abs() < 5 * (0.21 / count) ** 0.5).all()
    q, k, v = (torch.randn(1, 2, 1, 4, dtype=torch.float64) for _ in range(3))
    mean = torch.stack([latent_attention(q, k, v, dropout_p=0.3, seed=s) for s in range(150)]).mean(0)
    torch.testing.assert_close(mean, latent_attention(q, k, v), rtol=0, atol=0.25)


# ---- how it is used
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_under_checkpointing_and_autocast(backend: str) -> None:
    q, k, v, lengths = (t.float().requires_grad_() if t.is_floating_point() else t for t in ragged())

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return latent_attention(q, k, v, key_lengths=lengths, backend=backend)

    want = torch.autograd.grad(run(q, k, v).square().sum(), (q, k, v))
    again = torch.autograd.grad(run(q, k, v).square().sum(), (q, k, v))
    got = torch.autograd.grad(checkpoint(run, q, k, v, use_reentrant=False).square().sum(), (q, k, v))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(want, again, got, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        low = run(q, k, v.bfloat16())  # mixed, as a norm in float32 makes it
        low.float().square().sum().backward()
    assert low.dtype == torch.bfloat16 and q.grad is not None
    torch.testing.assert_close(q.grad, want[0], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("how", ["plain", "whole heads", "key_lengths", "cu_seqlens_k"])
def test_compiles_without_a_graph_break(backend: str, how: str) -> None:
    q, k, v, lengths = ragged(torch.float32)
    options: dict[str, object] = {}
    if how == "whole heads":  # none shared
        k, v = (t[:, :, :1].repeat(1, 1, q.shape[2], 1) for t in (k, v))
    if how == "key_lengths":
        options = {"key_lengths": lengths}
    elif how == "cu_seqlens_k":
        k, v, options = k.flatten(0, 1), v.flatten(0, 1), {"cu_seqlens_k": torch.tensor([0, 9, 9, 21])}
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def run(*args: Tensor) -> Tensor:
        return latent_attention(*args, **options, backend=backend)

    torch.compiler.reset()  # what other tests compiled must not make these sizes dynamic
    out, want = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves), run(*leaves)
    torch.testing.assert_close(out, want)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    torch.testing.assert_close(grads, torch.autograd.grad(want.square().sum(), leaves), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("told", [False, True], ids=["dense", "key_lengths"])
def test_half_types_compile_without_a_graph_break(how: str, told: bool) -> None:
    q, k, v, lengths = ragged(torch.float32 if how == "autocast" else getattr(torch, how))
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def run(*args: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return latent_attention(*args, key_lengths=lengths if told else None)

    torch.compiler.reset()
    out, want = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves), run(*leaves)
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    wanted = torch.autograd.grad(want.float().square().sum(), leaves)
    torch.testing.assert_close(grads, wanted, rtol=3e-2, atol=3e-2)


# ---- errors
# -----------------------------------------------------------------------------------------------------------

Z = torch.zeros


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Z(2, 3, 8)}, ValueError, r"k, v \[B, N, h_kv, d\] without cu_seqlens_k; got q \[2, 3, 8\]"),
        ({"cu_seqlens_k": Z(3).int()}, ValueError, r"k, v \[total, h_kv, d\] with cu_seqlens_k; got q"),
        ({"k": Z(2, 5, 2, 4)}, ValueError, "k and v must agree in all but dv, and q in batch and dqk with k"),
        ({"v": Z(2, 4, 2, 8)}, ValueError, "k and v must agree"),
        ({"q": Z(1, 3, 4, 8)}, ValueError, "k and v must agree"),
        ({"q": Z(2, 3, 3, 8)}, ValueError, r"h must be a multiple of h_kv.*got q \[2, 3, 3, 8\]"),
        ({"v": Z(2, 5, 2, 0)}, ValueError, "not empty"),
        (
            {"k": Z(2, 5, 2, 8).double()},
            TypeError,
            "one dtype of .* got torch.float32, torch.float64, torch.float32",
        ),
        (
            {"q": Z(2, 3, 4, 8).int(), "k": Z(2, 5, 2, 8).int(), "v": Z(2, 5, 2, 8).int()},
            TypeError,
            "torch.int32",
        ),
        ({"v": Z(2, 5, 2, 8, device="meta")}, ValueError, "v must be on q's device cpu, got meta"),
        ({"dropout_p": 1.0}, ValueError, r"in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "got -0.1"),
        (
            {"key_lengths": Z(2).int(), "key_mask": Z(2, 5).bool()},
            ValueError,
            "at most one .* got key_lengths, key_mask",
        ),
        ({"v": None}, TypeError, r"v must be a torch.Tensor, got NoneType"),
        ({"key_lengths": [5, 1]}, TypeError, r"key_lengths must be a torch.Tensor, got list"),
        ({"key_lengths": Z(3).int()}, ValueError, r"int32 or int64 \[B\] = \[2\], got torch.int32 \[3\]"),
        ({"key_lengths": Z(2)}, ValueError, "got torch.float32"),
        ({"key_lengths": torch.tensor([6, 1])}, ValueError, r"from 0 to N = 5, got \[6, 1\]"),
        ({"key_mask": Z(2, 5)}, ValueError, r"bool \[B, N\] = \[2, 5\], got torch.float32"),
        (
            {"backend": "sdpa", "return_lse": True},
            BackendError,
            "returns no log-sum-exp.*These can: reference, eager",
        ),
        ({"backend": "sdpa", "dropout_p": 0.1}, BackendError, "takes no seed"),
        ({"backend": "flash_attn"}, BackendError, "it runs on CUDA devices, got cpu"),
        ({"backend": "flash"}, ValueError, "unknown backend 'flash'; supported: 'auto'"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    call = {"q": Z(2, 3, 4, 8), "k": Z(2, 5, 2, 8), "v": Z(2, 5, 2, 8)} | change
    with pytest.raises(error, match=message):
        latent_attention(**call)


@pytest.mark.parametrize("offsets", [[0, 4, 9], [1, 4, 10], [0, 11, 10]])
def test_offsets_must_cover_the_packed_keys(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="must rise from 0 to the 10 packed keys, got"):
        latent_attention(Z(2, 3, 2, 8), Z(10, 2, 8), Z(10, 2, 8), cu_seqlens_k=torch.tensor(offsets))
