"""window_attention: the reference against timm and against brute force, the other backends against the
reference."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import window_attention
from kernels.backend import BackendError
from kernels.window_attention import geometry, packing

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BACKENDS = ("reference", "eager", "sdpa")
FAST = ("eager", "sdpa")


# ---- the reference against independent code
# -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((14, 14), (7, 7), (3, 3)),
        ((14, 14), (7, 7), (0, 0)),
        ((13, 9), (7, 7), (3, 3)),
        ((13, 9), (7, 7), (0, 0)),
        ((10, 12), (4, 6), (2, 0)),
        ((5, 16), (4, 3), (1, 2)),
        ((12, 12), (12, 12), (0, 0)),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_timm_block(
    timm: ModuleType,
    version: int,
    backend: str,
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
) -> None:
    """timm's Swin block pads its input; so the padding's keys and values are the qkv layer's bias."""
    block, ours = (swin_v1, swin_v2)[version - 1](size, window, shift, backend)
    weights = [p for p in block.attn.parameters() if not p.grad_fn and p.requires_grad]
    x = torch.randn(2, *size, 24, dtype=torch.float64, requires_grad=True)
    theirs, mine = block._attn(x), ours(x)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(theirs)
    expected = torch.autograd.grad(theirs, [x, *weights], direction)
    for got, want in zip(torch.autograd.grad(mine, [x, *weights], direction), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def swin_v1(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], backend: str):  # type: ignore[no-untyped-def]
    from timm.models.swin_transformer import SwinTransformerBlock

    block = SwinTransformerBlock(
        24, size, 3, window_size=window, shift_size=shift, always_partition=True
    ).double()
    attn = block.attn
    randomize(attn)

    def ours(x: Tensor) -> Tensor:
        qkv = attn.qkv(x).unflatten(-1, (3, 3, 8))
        pad_kv = attn.qkv.bias.view(3, 3, 8)[1:]
        table = attn.relative_position_bias_table
        return attn.proj(
            window_attention(qkv, table, window=window, shift=shift, pad_kv=pad_kv, backend=backend)
        )

    return block, ours


def swin_v2(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], backend: str):  # type: ignore[no-untyped-def]
    from timm.models.swin_transformer_v2 import SwinTransformerV2Block

    block = SwinTransformerV2Block(
        24, size, 3, window_size=window, shift_size=shift, always_partition=True
    ).double()
    attn = block.attn
    randomize(attn)
    attn.logit_scale.data.flatten()[0] = 5.0  # over ln 100: clamped

    def ours(x: Tensor) -> Tensor:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        qkv = F.linear(x, attn.qkv.weight, bias).unflatten(-1, (3, 3, 8))
        pad_kv = bias.view(3, 3, 8)[1:]
        table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).view(-1, 3))
        out = window_attention(
            qkv,
            table,
            window=window,
            shift=shift,
            logit_scale=attn.logit_scale.flatten(),
            pad_kv=pad_kv,
            backend=backend,
        )
        return attn.proj(out)

    return block, ours


def randomize(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [(0, 0), (1, 2)])
def test_masked_padding_equals_brute_force(backend: str, shift: tuple[int, int]) -> None:
    """Token by token: which others it may see follows from where the roll put both."""
    height, width, (wy, wx), heads, dim = 7, 5, (3, 4), 2, 6
    qkv = torch.randn(1, height, width, 3, heads, dim, dtype=torch.float64)
    table = torch.randn(2 * wy - 1, 2 * wx - 1, heads, dtype=torch.float64)
    got = window_attention(qkv, table.flatten(0, 1), window=(wy, wx), shift=shift, scale=0.4, backend=backend)

    def group(place: int, window: int, size: int, offset: int) -> tuple[int, bool]:
        padded = math.ceil(size / window) * window
        return place // window, place >= padded - offset

    places = {
        (y, x): ((y - shift[0]) % height, (x - shift[1]) % width) for y in range(height) for x in range(width)
    }
    groups = {
        token: (group(py, wy, height, shift[0]), group(px, wx, width, shift[1]))
        for token, (py, px) in places.items()
    }
    for token, (py, px) in places.items():
        seen = [other for other in places if groups[other] == groups[token]]
        for head in range(heads):
            q = qkv[0, token[0], token[1], 0, head]
            logits = []
            for other in seen:
                k = qkv[0, other[0], other[1], 1, head]
                oy, ox = places[other]
                logits.append(0.4 * q @ k + table[py - oy + wy - 1, px - ox + wx - 1, head])
            weights = torch.stack(logits).softmax(0)
            want = sum(w * qkv[0, o[0], o[1], 2, head] for w, o in zip(weights, seen, strict=True))
            torch.testing.assert_close(got[0, token[0], token[1]].view(heads, dim)[head], want)


def test_one_window_equals_torch_attention() -> None:
    """A window as large as the map, without bias, is plain attention."""
    qkv = torch.randn(2, 6, 5, 3, 2, 8)
    q, k, v = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4)
    want = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 6, 5, 16)
    for backend in BACKENDS:
        torch.testing.assert_close(window_attention(qkv, window=(6, 5), backend=backend), want)


def test_gradcheck() -> None:
    qkv = torch.randn(1, 5, 4, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 9, 9, dtype=torch.float64, requires_grad=True)
    logit_scale = torch.tensor([0.3, 6.0], dtype=torch.float64, requires_grad=True)
    pad_kv = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    for backend in ("reference", "eager"):

        def cosine(*args: Tensor) -> Tensor:
            return window_attention(
                args[0],
                args[1],
                window=3,
                shift=1,
                logit_scale=args[2],
                pad_kv=args[3],
                backend=backend,  # noqa: B023
            )

        def dot(*args: Tensor) -> Tensor:
            return window_attention(*args, window=3, shift=(0, 2), scale=0.7, backend=backend)  # noqa: B023

        assert torch.autograd.gradcheck(cosine, (qkv, bias, logit_scale, pad_kv), fast_mode=True)
        assert torch.autograd.gradcheck(dot, (qkv, bias), fast_mode=True)


# ---- how it is used
# ---------------------------------------------------------------------------------------------------


def example(requires_grad: bool = True) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 9, 8, 3, 2, 8, requires_grad=requires_grad), torch.randn(
        49, 2, requires_grad=requires_grad
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_table_and_expanded_bias_agree(backend: str) -> None:
    from timm.models.swin_transformer import get_relative_position_index

    qkv, table = example()
    expanded = table[get_relative_position_index(4, 4)].permute(2, 0, 1)
    got = window_attention(qkv, table, window=4, shift=2, backend=backend)
    torch.testing.assert_close(got, window_attention(qkv, expanded, window=4, shift=2, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic(backend: str) -> None:
    qkv, table = example()

    def once() -> list[Tensor]:
        out = window_attention(qkv, table, window=4, shift=1, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), (qkv, table))]

    first = once()
    for again in (once(), once()):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_and_autocast(backend: str) -> None:
    qkv, table = example()

    def run(qkv: Tensor, table: Tensor) -> Tensor:
        return window_attention(qkv, table, window=4, shift=2, backend=backend)

    want = torch.autograd.grad(run(qkv, table).square().sum(), (qkv, table))
    got = torch.autograd.grad(checkpoint(run, qkv, table, use_reentrant=False).square().sum(), (qkv, table))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        low = run(qkv, table)
        low.float().square().sum().backward()  # inside autocast, as some people do
    assert low.dtype == torch.bfloat16
    direct = run(qkv.bfloat16(), table)
    assert torch.equal(low, direct)
    assert qkv.grad is not None and table.grad is not None
    torch.testing.assert_close(table.grad, want[1], rtol=0.05, atol=0.5)
    assert run(qkv.double(), table.double()).dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cosine", [False, True])
def test_compiles_without_a_graph_break(backend: str, cosine: bool) -> None:
    qkv, table = example()
    logit_scale = torch.tensor([1.0, 5.0], requires_grad=True) if cosine else None

    def run(qkv: Tensor, table: Tensor) -> Tensor:
        return window_attention(qkv, table, window=4, shift=(1, 2), logit_scale=logit_scale, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    out, want = compiled(qkv, table), run(qkv, table)
    torch.testing.assert_close(out, want)
    grads = torch.autograd.grad(out.square().sum(), (qkv, table))
    expected = torch.autograd.grad(want.square().sum(), (qkv, table))
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-4)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_once_with_batch_and_scale_left_open() -> None:
    table = example()[1]

    def run(qkv: Tensor, scale: float) -> Tensor:
        return window_attention(qkv, table, window=4, shift=(1, 2), scale=scale, backend="eager")

    torch.compiler.reset()
    compiled = torch.compile(run, dynamic=True, fullgraph=True, backend="aot_eager")
    for batch, scale in ((5, 0.3), (7, 0.4)):  # two sizes that are equal in the first call are taken for one
        qkv = torch.randn(batch, 9, 8, 3, 2, 6, requires_grad=True)
        out, want = compiled(qkv, scale), run(qkv, scale)
        torch.testing.assert_close(out, want)
        grads, expected = (torch.autograd.grad(t.square().sum(), (qkv, table)) for t in (out, want))
        torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", FAST)
def test_a_first_call_in_inference_mode_leaves_training_possible(backend: str) -> None:
    """What is cached there must be usable in a backward pass: sizes that no other test has."""
    window = (5, 2) if backend == "eager" else (2, 5)
    with torch.inference_mode():
        window_attention(torch.randn(1, 11, 6, 3, 1, 4), torch.randn(27, 1), window=window, backend=backend)
    qkv, table = torch.randn(1, 11, 6, 3, 1, 4, requires_grad=True), torch.randn(27, 1, requires_grad=True)
    window_attention(qkv, table, window=window, backend=backend).square().sum().backward()
    for leaf in (qkv, table):
        assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_only_the_reference_differentiates_twice() -> None:
    qkv, table = example()

    def twice(backend: str) -> Tensor:
        out = window_attention(qkv, table, window=4, backend=backend)
        (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
        grad.square().sum().backward()
        return qkv.grad

    assert twice("reference").isfinite().all()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        twice("eager")


# ---- errors
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"qkv": torch.zeros(2, 8, 8, 3, 16)},
            ValueError,
            r"\[B, H, W, 3, heads, head_dim\], got \[2, 8, 8, 3, 16\]",
        ),
        ({"qkv": torch.zeros(2, 8, 8, 2, 2, 8)}, ValueError, r"got \[2, 8, 8, 2, 2, 8\]"),
        ({"qkv": torch.zeros(2, 0, 8, 3, 2, 8)}, ValueError, "only the batch may be empty"),
        (
            {"qkv": torch.zeros(2, 8, 8, 3, 2, 8).long()},
            TypeError,
            "float64, float32, float16 or bfloat16, got torch.int64",
        ),
        ({"window": 9}, ValueError, "from 1 to the map's 8 x 8, got 9 x 9"),
        ({"window": (4, 0)}, ValueError, "from 1 to the map's 8 x 8, got 4 x 0"),
        ({"window": (4, 4, 4)}, ValueError, r"an int or \(y, x\) of ints, got \(4, 4, 4\)"),
        ({"shift": True}, ValueError, r"shift must be an int or \(y, x\) of ints, got True"),
        ({"window": 4.0}, ValueError, r"an int or \(y, x\) of ints, got 4.0"),
        ({"qkv": None}, TypeError, "qkv must be a torch.Tensor, got NoneType"),
        ({"bias": [1.0]}, TypeError, "bias must be a torch.Tensor, got list"),
        ({"shift": 4}, ValueError, "from 0 to less than the window's 4 x 4, got 4 x 4"),
        ({"shift": (0, -1)}, ValueError, "got 0 x -1"),
        ({"bias": torch.zeros(25, 2)}, ValueError, r"a table \[49, 2\] or \[2, 16, 16\], got \[25, 2\]"),
        (
            {"bias": torch.zeros(49, 2).half()},
            TypeError,
            "bias must have qkv's dtype torch.float32 or float32",
        ),
        (
            {"bias": torch.zeros(49, 2, device="meta")},
            ValueError,
            "bias must be on qkv's device cpu, got meta",
        ),
        ({"logit_scale": torch.zeros(2, 1, 1)}, ValueError, r"\[heads\] = \[2\], got \[2, 1, 1\]"),
        ({"logit_scale": torch.zeros(2), "scale": 1.0}, ValueError, "scale must be None with logit_scale"),
        ({"scale": torch.ones(())}, TypeError, r"scale must be a number, got a tensor \[\]"),
        ({"pad_kv": torch.zeros(2, 8)}, ValueError, r"\[2, heads, head_dim\] = \[2, 2, 8\], got \[2, 8\]"),
        (
            {"backend": "fast"},
            ValueError,
            "unknown backend 'fast'; supported: 'auto', 'reference', 'eager', 'sdpa'",
        ),
        (
            {"backend": "triton"},
            BackendError,
            "it runs on CUDA devices, got cpu .*These can: reference, eager, sdpa",
        ),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    call = {"qkv": torch.zeros(2, 8, 8, 3, 2, 8), "window": 4} | change
    with pytest.raises(error, match=message):
        window_attention(**call)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_big_batches_ask_the_host_for_indices_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above REMEMBERED_ROWS only the samples' offsets are made anew; the numbers are those of the small path."""
    qkv, bias = torch.randn(3, 13, 11, 3, 2, 8, requires_grad=True), torch.randn(2, 16, 16)
    options: dict = {"window": 4, "shift": 1, "backend": backend}
    pad_kv = torch.randn(2, 2, 8)

    def outcome() -> tuple[torch.Tensor, torch.Tensor]:
        out = window_attention(qkv, bias, pad_kv=pad_kv, **options)
        return out.detach(), torch.autograd.grad(out.square().sum(), qkv)[0]

    small = outcome()
    monkeypatch.setattr(packing, "REMEMBERED_ROWS", 0)
    first = outcome()
    built: list[object] = []
    plane = geometry._plane
    monkeypatch.setattr(geometry, "_plane", lambda *args: (built.append(args), plane(*args))[1])
    second = outcome()
    assert built == []
    for found in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(found, small, strict=True))
