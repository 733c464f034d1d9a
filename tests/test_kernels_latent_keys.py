"""latent_attention over many keys, or many samples, on a CPU: in pieces, and without the work on what nobody sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from bench.measure import peak_memory
from kernels import latent_attention, products
from kernels.latent_attention import eager, sdpa

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("how", ["key_lengths", "cu_seqlens_k", "all"])
def test_keys_a_piece_at_a_time(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as at once, with hidden keys, an empty sample, shared key heads, dropout and lse, and every gradient."""
    sizes = ((2, 5, 4, 8), (2, 46, 2, 8), (2, 46, 2, 6))
    q, k, v = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
    more: dict[str, Any] = {"scale": 0.4, "dropout_p": 0.2, "seed": 3, "return_lse": True, "backend": "eager"}
    if how == "key_lengths":
        more["key_lengths"] = torch.tensor([30, 0])
    args = (q, k.flatten(0, 1), v.flatten(0, 1)) if how == "cu_seqlens_k" else (q, k, v)
    if how == "cu_seqlens_k":
        more["cu_seqlens_k"] = torch.tensor([0, 17, 92], dtype=torch.int32)

    def run() -> tuple[Tensor, ...]:
        out, lse = latent_attention(*args, **more)
        seen = lse.masked_fill(torch.isneginf(lse), 0)
        grads = torch.autograd.grad(out.sin().sum() + seen.cos().sum(), (q, k, v))
        return out.detach(), lse.detach(), *grads

    want = run()
    monkeypatch.setattr(eager, "LARGE", 0)
    monkeypatch.setattr(eager, "PIECE", 2 * 4 * 5 * 16)  # 16 keys of both samples
    for mine, theirs in zip(run(), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("backend", "dv", "piece"),
    [("sdpa", 16, 2 * 16 * 20), ("sdpa", 16, 97 * 2 * 16 * 2), ("eager", 24, 0)],
    ids=["twenty keys", "two samples", "eager"],
)
def test_half_types_a_piece_at_a_time(
    backend: str, dv: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that are widened in pieces give what those that are widened at once give, but for the order of sums."""
    sizes = ((5, 5, 4, 16), (5, 97, 2, 16), (5, 97, 2, dv))
    q, k, v = (torch.randn(size[::-1]).permute(3, 2, 1, 0).bfloat16().requires_grad_() for size in sizes)
    direction = torch.randn(5, 5, 4, dv)

    def run() -> tuple[Tensor, ...]:
        out = latent_attention(q, k, v, scale=0.3, backend=backend)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), direction.bfloat16())

    want = run()
    monkeypatch.setattr(eager, "LARGE", 0)
    monkeypatch.setattr(eager, "PIECE", 2 * 4 * 5 * 16)
    monkeypatch.setattr(sdpa, "_room", lambda: piece)
    for mine, theirs in zip(run(), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("able", "queries", "heads", "gradients", "read_in"),
    [
        (True, 40, 2, False, torch.bfloat16),
        (True, 40, 2, True, torch.float32),  # its backward is slower for so few
        (True, 3000, 2, True, torch.bfloat16),
        (True, 600, 2, False, torch.float32),  # many queries of many keys
        (False, 40, 4, False, torch.bfloat16),
        (False, 100, 2, False, torch.bfloat16),
        (False, 100, 4, False, torch.float32),
        (False, 3000, 2, True, torch.float32),
    ],
    ids=[
        "as they are", "gradients", "many with gradients", "many", "no instructions", "no instructions, few heads",
        "no instructions, many", "no instructions, gradients",
    ],
)  # fmt: skip
def test_bfloat16_is_read_as_it_is_where_that_is_faster(
    able: bool,
    queries: int,
    heads: int,
    gradients: bool,
    read_in: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And either way as exactly as a float64 softmax, rounded, and what the weights lose by rounding."""
    monkeypatch.setattr(products, "CPU_HAS_BFLOAT16", able)
    monkeypatch.setattr(sdpa, "_room", lambda: 2**12)
    monkeypatch.setattr(sdpa, "MANY_KEYS", 50)
    seen, wide = [], sdpa._FORWARD

    def spy(q: Tensor, *others: Any, **options: Any) -> Any:
        seen.append(q.dtype)
        return wide(q, *others, **options)

    monkeypatch.setattr(sdpa, "_FORWARD", spy)  # the kernel, where pieces are widened
    q, k, v = (
        torch.randn(2, n, h, 32).bfloat16() for n, h in ((queries, 2 * heads), (97, heads), (97, heads))
    )
    q.requires_grad_(gradients)
    out = latent_attention(q, k, v, scale=0.3, backend="sdpa").detach()
    assert set(seen) <= {read_in} and (seen or read_in == torch.bfloat16)
    truth = latent_attention(*(t.detach().double() for t in (q, k, v)), scale=0.3, backend="reference")
    error, size = ((t.square().mean().sqrt().item()) for t in (out.double() - truth, truth))
    assert error < 0.005 * size


@pytest.mark.parametrize(("queries", "keys"), [(40, 2**14), (2**13, 40)], ids=["keys", "queries"])
@pytest.mark.parametrize("last", [True, False], ids=["side by side", "apart"])
def test_gradients_of_many_are_not_summed_in_bfloat16(
    queries: int, keys: int, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own backward has errors of .6% and more here, which grow with the number of blocks. `last`: whether the numbers
    of a row lie side by side."""
    monkeypatch.setattr(products, "CPU_HAS_BFLOAT16", True)
    monkeypatch.setattr(sdpa, "LARGE_BLOCKS", 0)
    monkeypatch.setattr(sdpa, "MANY_KEYS", 2**20)
    q, k, v, d_out = (torch.randn(1, n, 1, 16).bfloat16() for n in (queries, keys, keys, queries))
    if not last:
        q, k, v, d_out = (t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v, d_out))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    seen, whole = [], sdpa._BACKWARD

    def spy(*args: Any, **options: Any) -> Any:
        seen.append((args[1].dtype, args[1].shape[2], args[2].shape[2]))
        return whole(*args, **options)

    monkeypatch.setattr(sdpa, "_BACKWARD", spy)
    out = latent_attention(*inputs, backend="sdpa")
    found = (out.detach(), *torch.autograd.grad(out, inputs, d_out))
    assert seen == [(torch.bfloat16, min(queries, 2048), min(keys, 4096))] * 4
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = latent_attention(*exact, backend="reference")
    wanted = (truth.detach(), *torch.autograd.grad(truth, exact, d_out.double()))
    for mine, true in zip(found, wanted, strict=True):
        assert (mine.double() - true).square().mean().sqrt() < 0.005 * true.square().mean().sqrt()


@pytest.mark.parametrize(("batch", "queries"), [(2, 0), (0, 5)])
def test_many_keys_that_nobody_asks_for(batch: int, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No queries, or no samples: nothing comes out, and gradients are 0; torch's own kernel would end the process."""
    monkeypatch.setattr(sdpa, "_room", lambda: 2**17)
    q, k, v = (
        torch.randn(batch, n, 2, 64, dtype=torch.bfloat16, requires_grad=True) for n in (queries, 4096, 4096)
    )
    out = latent_attention(q, k, v)
    assert out.shape == q.shape
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dv", [64, 32])
def test_memory_of_many_keys(dtype: torch.dtype, dv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward in at most 1.2 x the bytes of the inputs and their gradients."""
    monkeypatch.setattr(eager, "LARGE", 0)
    monkeypatch.setattr(eager, "PIECE", 2**14)
    monkeypatch.setattr(sdpa, "_room", lambda: 2**17)
    sizes = ((1, 8, 2, 64), (1, 2**14, 2, 64), (1, 2**14, 2, dv))
    inputs = [torch.randn(size).to(dtype).requires_grad_() for size in sizes]
    size = sum(t.numel() * t.element_size() for t in inputs)
    peak = peak_memory(lambda: torch.autograd.grad(latent_attention(*inputs).sum(), inputs), "cpu")
    assert size + peak <= 1.2 * 2 * size, (size + peak) / (2 * size)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_million_keys_take_no_room_for_all_logits(backend: str) -> None:
    """Forward and backward, dqk != dv; eager with the log-sum-exp."""
    queries, keys = 128, 2**20
    q, k, v = (torch.randn(1, n, 1, d, requires_grad=True) for n, d in ((queries, 8), (keys, 8), (keys, 16)))

    def run() -> object:
        found = latent_attention(q, k, v, backend=backend, return_lse=backend == "eager")
        return torch.autograd.grad((found[0] if backend == "eager" else found).sum(), (q, k, v))

    assert peak_memory(run, "cpu") < 0.6 * 4 * queries * keys  # of the logits' bytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["key_lengths", "cu_seqlens_k"])
def test_samples_of_one_length_are_read_at_once(
    how: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one call of torch's and without a mask, with the numbers and gradients of the reference."""
    monkeypatch.setattr(sdpa, "LEAST_WORK", 0)
    sizes = ((3, 5, 4, 8), (3, 9, 2, 8), (3, 9, 2, 8))
    q, k, v = (torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes)
    args, more = (q, k, v), {"key_lengths": torch.full((3,), 6)}
    if how == "cu_seqlens_k":
        args, more = (q, k.flatten(0, 1), v.flatten(0, 1)), {"cu_seqlens_k": torch.arange(0, 28, 9)}
    direction = torch.randn(3, 5, 4, 8).to(dtype)

    def run(backend: str) -> tuple[Tensor, ...]:
        out = latent_attention(*args, **more, scale=0.3, backend=backend)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), direction)

    want = run("reference")
    calls: list[int] = []
    real = sdpa.F.scaled_dot_product_attention

    def counted(*tensors: Tensor | None, **options: Any) -> Tensor:
        calls.append(1)
        assert tensors[3] is None
        return real(*tensors, **options)

    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", counted)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for mine, theirs in zip(run("sdpa"), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    assert calls == [1]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_trace_of_full_samples_holds_for_empty_ones(backend: str, mode: str) -> None:
    """Whether a sample has a visible key is asked of values where nobody records what is done."""
    tensors = [torch.randn(2, n, 2, 16) for n in (3, 40, 40)]

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return latent_attention(q, k, v, key_mask=mask, backend=backend)

    full = torch.ones(2, 40, dtype=torch.bool)
    traced = make_fx(attend, tracing_mode=mode)(*tensors, full)
    part = full.clone()
    part[1] = False
    for mask in (full, part):
        want = latent_attention(*tensors, key_mask=mask, backend="reference")
        for found in (attend(*tensors, mask), traced(*tensors, mask)):
            torch.testing.assert_close(found, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("able", [True, False], ids=["instructions", "none"])
def test_queries_that_overlap(able: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel for CPUs gives its result their order of strides, and wrote rows over one another."""
    monkeypatch.setattr(products, "CPU_HAS_BFLOAT16", able)
    k, v = (torch.randn(1, 40, 4, 32).to(dtype) for _ in range(2))
    row, heads, line = (torch.randn(size).to(dtype) for size in ((32, 1), (4, 32, 1), (36,)))
    overlapping = (
        row.t()[:, None, None],
        heads.permute(2, 0, 1)[:, None],
        line.unfold(0, 32, 1)[None, :, None],
    )
    for q in (t.expand(1, 5, 4, 32) for t in overlapping):
        found = latent_attention(q, k, v, backend="sdpa")
        torch.testing.assert_close(found, latent_attention(q.contiguous(), k, v, backend="sdpa"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("able", [True, False], ids=["instructions", "none"])
def test_keys_whose_numbers_lie_apart(
    able: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps with their channels first, which torch's kernel for CPUs leaves to one that holds all logits: 64 MB here."""
    monkeypatch.setattr(products, "CPU_HAS_BFLOAT16", able)
    q = torch.randn(1, 256, 4, 16).to(dtype)
    k, v = (torch.randn(1, 4, 16, 2**14).to(dtype).permute(0, 3, 1, 2) for _ in range(2))
    peak = peak_memory(lambda: latent_attention(q, k, v, backend="sdpa"), "cpu")
    assert peak < 3 * (k.nbytes + v.nbytes)
    hidden = torch.rand(1, 2**14) > 0.5
    peak = peak_memory(lambda: latent_attention(q, k, v, key_mask=hidden, backend="sdpa"), "cpu")
    assert peak < 1.3 * 4 * (k.numel() + v.numel())  # a copy in float32
    found = latent_attention(q, k, v, backend="sdpa").float()
    want = latent_attention(*(t.float().contiguous() for t in (q, k, v)), backend="reference")
    assert (found - want).square().mean().sqrt() < 0.005 * want.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_latents_of_all_samples_are_not_copied(dtype: torch.dtype) -> None:
    """A parameter that is expanded over the batch, as in Perceiver: no memory but the result's."""
    q = torch.randn(512, 8, 64).to(dtype).expand(16, 512, 8, 64)
    k, v = (torch.randn(16, 64, 8, 64).to(dtype) for _ in range(2))
    with torch.no_grad():
        peak = peak_memory(lambda: latent_attention(q, k, v, backend="sdpa"), "cpu")
        found, want = (latent_attention(t, k, v, backend="sdpa") for t in (q, q.contiguous()))
    assert peak < 1.2 * q.numel() * dtype.itemsize
    assert torch.equal(found, want)
