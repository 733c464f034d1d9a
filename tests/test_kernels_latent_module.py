"""kernels.LatentAttention against torch's own attention module, and against a softmax that is written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import LatentAttention
from kernels.backend import BackendError

BACKENDS = ["auto", "reference", "eager", "sdpa"]


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def module_of(*sizes: int, **options: Any) -> LatentAttention:
    """In float64, with biases that are not 0."""
    torch.manual_seed(0)
    module = LatentAttention(*sizes, dtype=torch.float64, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def written_out(module: LatentAttention, latents: Tensor, inputs: Tensor, visible: Tensor) -> Tensor:
    """The definition, head by head: visible [B, N]."""
    group, made = module.heads // module.kv_heads, []
    q, k, v = module.q(latents), module.k(inputs), module.v(inputs)
    for head in range(module.heads):
        key_head = head // group
        own = slice(head * module.qk_dim, (head + 1) * module.qk_dim)
        key = slice(key_head * module.qk_dim, (key_head + 1) * module.qk_dim)
        value = slice(key_head * module.v_dim, (key_head + 1) * module.v_dim)
        logits = q[..., own] @ k[..., key].mT / module.qk_dim**0.5
        logits = logits.masked_fill(~visible[:, None], -torch.inf)
        made.append(logits.softmax(-1) @ v[..., value])
    return module.proj(torch.cat(made, -1))


def assert_same(got: Tensor, want: Tensor, mine: list[Tensor], other: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(want)
    grads = torch.autograd.grad(got, mine, direction), torch.autograd.grad(want, other, direction)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_torchs_multihead_attention(backend: str, bias: bool, masked: bool) -> None:
    ours = module_of(12, 3, input_dim=10, bias=bias, backend=backend)
    theirs = nn.MultiheadAttention(12, 3, bias=bias, kdim=10, vdim=10, batch_first=True, dtype=torch.float64)
    pairs = [(ours.q.weight, theirs.q_proj_weight), (ours.k.weight, theirs.k_proj_weight),
             (ours.v.weight, theirs.v_proj_weight), (ours.proj.weight, theirs.out_proj.weight)]  # fmt: skip
    if bias:
        pairs.append((ours.proj.bias, theirs.out_proj.bias))
        theirs.in_proj_bias.data = torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]).detach()
    for mine, other in pairs:
        other.data = mine.detach().clone()
    latents, inputs, seen = rand(2, 5, 12), rand(2, 7, 10), None
    if masked:
        seen = torch.rand(2, 7) < 0.6
        seen[:, 0] = True
    got = ours(latents, inputs, key_mask=seen)
    want, _ = theirs(latents, inputs, inputs, key_padding_mask=None if seen is None else ~seen)
    assert_same(
        got, want, [latents, inputs, *(a for a, _ in pairs)], [latents, inputs, *(b for _, b in pairs)]
    )
    if bias:
        got = ours(latents, inputs, key_mask=seen).square().sum()
        want = theirs(latents, inputs, inputs, key_padding_mask=None if seen is None else ~seen)[0]
        biases = torch.autograd.grad(got, [ours.q.bias, ours.k.bias, ours.v.bias])
        (whole,) = torch.autograd.grad(want.square().sum(), [theirs.in_proj_bias])
        torch.testing.assert_close(torch.cat(biases), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads", "qk_dim", "v_dim"), [(4, 2, 3, 5), (6, 1, 8, 2), (2, 2, 5, 4)])
def test_grouped_heads_and_other_widths(
    backend: str, heads: int, kv_heads: int, qk_dim: int, v_dim: int
) -> None:
    """Keys of different lengths, told in three ways, and packed without padding."""
    module = module_of(
        9, heads, input_dim=7, kv_heads=kv_heads, qk_dim=qk_dim, v_dim=v_dim, out_dim=11, backend=backend
    )
    latents, inputs, lengths = rand(3, 4, 9), rand(3, 6, 7), torch.tensor([6, 1, 4])
    seen = torch.arange(6) < lengths[:, None]
    everything = [latents, inputs, *module.parameters()]
    offsets = torch.tensor([0, 6, 7, 11], dtype=torch.int32)
    for got in (
        module(latents, inputs, key_lengths=lengths),
        module(latents, inputs, key_mask=seen),
        module(latents, inputs[seen], cu_seqlens_k=offsets),
    ):
        assert got.shape == (3, 4, 11)
        assert_same(got, written_out(module, latents, inputs, seen), everything, everything)


def test_self_attention_and_nothing_visible() -> None:
    module = module_of(8, 2)
    x = rand(2, 5, 8)
    assert torch.equal(module(x), module(x, x))
    assert_same(module(x), written_out(module, x, x, torch.ones(2, 5, dtype=torch.bool)), [x], [x])
    blind = module(x, key_lengths=torch.tensor([5, 0]))[1]
    assert torch.equal(blind, module.proj.bias.expand(5, 8))
    assert module(x[:0]).shape == (0, 5, 8) and module(x[:, :0], x).shape == (2, 0, 8)
    assert torch.equal(module(x, x[:, :0]), module.proj.bias.expand(2, 5, 8))


def test_dropout_only_in_training() -> None:
    module = module_of(8, 2, dropout_p=0.4)
    x = rand(2, 5, 8)
    plain = module_of(8, 2)
    assert not torch.equal(module(x), module(x))
    torch.manual_seed(3)
    first = module(x)
    torch.manual_seed(3)
    assert torch.equal(module(x), first)
    mean = torch.stack([module(x).detach() for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, plain(x), rtol=0, atol=0.15)
    assert torch.equal(module.eval()(x), plain(x))
    with pytest.raises(BackendError, match="sdpa.*dropout_p=0.4"):
        module_of(8, 2, dropout_p=0.4, backend="sdpa")(x)
    assert module_of(8, 2, dropout_p=0.4, backend="sdpa").eval()(x).shape == x.shape


@pytest.mark.parametrize("visible", ["key_lengths", "key_mask", "cu_seqlens_k", None])
def test_compiles_without_a_graph_break(visible: str | None) -> None:
    module = module_of(8, 2, input_dim=6, kv_heads=1, backend="eager")
    latents, inputs, seen = rand(2, 3, 8), rand(2, 5, 6), torch.arange(5) < torch.tensor([[4], [2]])
    told: dict[str, Tensor] = {}
    match visible:
        case "key_lengths":
            told = {visible: torch.tensor([4, 2])}
        case "key_mask":
            told = {visible: seen}
        case "cu_seqlens_k":
            told, inputs = {visible: torch.tensor([0, 4, 6])}, inputs[seen].detach()
    torch.compiler.reset()
    got = torch.compile(module, fullgraph=True, backend="eager")(latents, inputs, **told)
    parameters = [latents, *module.parameters()]
    assert_same(got, module(latents, inputs, **told), parameters, parameters)


def test_compiles_with_dropout() -> None:
    module = module_of(8, 2, dropout_p=0.5)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    x = rand(2, 5, 8)
    assert not torch.equal(compiled(x), compiled(x))


def test_half_precision_and_autocast() -> None:
    module = LatentAttention(16, 4, kv_heads=2)
    x = torch.randn(2, 9, 16)
    want = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
    assert got.dtype == torch.bfloat16 and (got.float() - want).abs().max() < 0.03
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_initial_values() -> None:
    """Normal, cut at two standard deviations, variance 1 / fan_in: cut at 2 / 0.8796 of the result's own."""
    module = LatentAttention(64, 4, input_dim=100, kv_heads=2, v_dim=48, device="meta")
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data.fill_(float("nan"))
    module.reset_parameters()
    sizes = {"q": (64, 64), "k": (32, 100), "v": (96, 100), "proj": (64, 192)}
    assert dict(module.named_children()).keys() == sizes.keys()
    for name, shape in sizes.items():
        layer = module.get_submodule(name)
        assert layer.weight.shape == shape and not layer.bias.any()
        std = shape[1] ** -0.5
        assert layer.weight.std().item() == pytest.approx(std, rel=0.06)
        assert 2.1 * std < layer.weight.abs().max() < 2.2738 * std
    assert "64, heads=4, input_dim=100, kv_heads=2, qk_dim=16, v_dim=48, out_dim=64, dropout" in repr(module)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"heads": 5}, ValueError, "dim must be a multiple of heads where qk_dim is not given, got dim 16, heads 5"),
        ({"heads": 0}, ValueError, "heads must be a multiple of kv_heads, got heads 0, kv_heads 0"),
        ({"kv_heads": 3}, ValueError, "heads must be a multiple of kv_heads, got heads 4, kv_heads 3"),
        ({"kv_heads": 8}, ValueError, "got heads 4, kv_heads 8"),
        ({"dim": 0}, ValueError, "dim, input_dim and out_dim must be at least 1, got 0, 0, 0"),
        ({"input_dim": -1}, ValueError, "got 16, -1, 16"),
        ({"qk_dim": 0}, ValueError, "qk_dim and v_dim must be at least 1, got 0, 0"),
        ({"v_dim": 0}, ValueError, "qk_dim and v_dim must be at least 1, got 4, 0"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"backend": "fast"}, ValueError, "LatentAttention: unknown backend 'fast'; supported: 'auto'"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"dim": 16, "heads": 4} | change
    with pytest.raises(error, match=message):
        LatentAttention(**arguments)


@pytest.mark.parametrize(
    ("latents", "inputs", "told", "message"),
    [
        ((2, 12), (2, 5, 6), {}, r"latents must be \[B, M, 8\], got \[2, 12\]"),
        ((2, 3, 6), (2, 5, 6), {}, r"latents must be \[B, M, 8\], got \[2, 3, 6\]"),
        ((2, 3, 8), (2, 5, 8), {}, r"inputs must be \[B, N, 6\] without cu_seqlens_k, got \[2, 5, 8\]"),
        ((2, 3, 8), None, {}, r"inputs must be \[B, N, 6\] without cu_seqlens_k, got \[2, 3, 8\]"),
        ((2, 3, 8), (5, 6), {}, r"inputs must be \[B, N, 6\] without cu_seqlens_k, got \[5, 6\]"),
        ((2, 3, 8), (1, 5, 6), {}, r"must agree in batch, got latents \[2, 3, 8\], inputs \[1, 5, 6\]"),
        ((2, 3, 8), (2, 5, 6), {"cu_seqlens_k": [0, 5, 10]}, r"\[total, 6\] with cu_seqlens_k, got \[2, 5, 6\]"),
        ((2, 3, 8), None, {"cu_seqlens_k": [0, 5, 10]}, "cu_seqlens_k is for packed inputs, got no inputs"),
        ((2, 3, 8), (5, 6), {"cu_seqlens_k": [0, 2, 4]}, "must rise from 0 to the 5 packed keys"),
        ((2, 3, 8), (2, 5, 6), {"key_lengths": [6, 1]}, "key_lengths must be from 0 to N = 5"),
        ((2, 3, 8), (5, 6), {"cu_seqlens_k": [0, 2, 5], "key_lengths": [2, 3]}, "at most one of"),
    ],
)  # fmt: skip
def test_errors_of_a_call(
    latents: tuple[int, ...], inputs: tuple[int, ...] | None, told: dict[str, list[int]], message: str
) -> None:
    module = LatentAttention(8, 2, input_dim=6)
    given = None if inputs is None else torch.zeros(inputs)
    with pytest.raises(ValueError, match=message):
        module(torch.zeros(latents), given, **{name: torch.tensor(value) for name, value in told.items()})
