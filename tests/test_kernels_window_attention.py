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


# ---- the other backends against the reference, by the numerics rule
# --------------------------------------------------

# batch, map, window, shift, heads, head_dim
SHAPES = [
    (2, (14, 14), 7, 3, 3, 32),
    (1, (24, 13), 12, (5, 0), 2, 64),
    (1, (13, 13), 13, 0, 1, 128),
    (1, (15, 29), 14, 7, 1, 96),
    (1, (28, 28), 28, 0, 1, 32),
    (2, (9, 5), (4, 3), (0, 2), 2, 59),
    (3, (1, 1), 1, 0, 2, 16),
    (0, (8, 8), 4, 2, 2, 32),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("pads", ["masked", "pad_kv"])
@pytest.mark.parametrize("backend", FAST)
def test_float32_by_the_rule(shape: tuple, cosine: bool, pads: str, backend: str) -> None:
    check_by_the_rule(shape, cosine, pads, backend, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cosine", [False, True], ids=["dot", "cosine"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types_by_the_rule(dtype: torch.dtype, cosine: bool, backend: str) -> None:
    check_by_the_rule((2, (7, 9), 4, (2, 1), 2, 32), cosine, "pad_kv", backend, dtype)


def check_by_the_rule(shape: tuple, cosine: bool, pads: str, backend: str, dtype: torch.dtype) -> None:
    """Error at most 2x (gradients 3x) that of plain PyTorch in the same dtype, measured against float64."""
    batch, (height, width), window, shift, heads, dim = shape
    wy, wx = (window, window) if isinstance(window, int) else window
    # Permuted, so not contiguous.
    qkv = torch.randn(3, batch, heads, height, width, dim).permute(1, 3, 4, 0, 2, 5).to(dtype)
    table = torch.randn((2 * wy - 1) * (2 * wx - 1), heads).to(dtype)
    options = {"logit_scale": torch.linspace(0.5, 3.0, heads).to(dtype)} if cosine else {}
    if pads == "pad_kv":
        options["pad_kv"] = torch.randn(2, heads, dim).to(dtype)
    inputs = {"qkv": qkv, "bias": table, **options}
    scale = None if cosine else 0.31
    direction = torch.randn(batch, height, width, heads * dim).to(dtype)

    def run(function, kind: torch.dtype, **fixed: object) -> list[Tensor]:  # type: ignore[no-untyped-def]
        leaves = {name: t.detach().to(kind).requires_grad_() for name, t in inputs.items()}
        out = function(**leaves, window=(wy, wx), shift=shift, scale=scale, **fixed)
        grads = torch.autograd.grad(out, list(leaves.values()), direction.to(kind), allow_unused=True)
        return [
            out,
            *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves.values(), strict=True)),
        ]

    exact = run(window_attention, torch.float64, backend="reference")
    plain = run(plain_window_attention, dtype)
    got = run(window_attention, dtype, backend=backend)
    assert [t.dtype for t in got] == [dtype] * len(got)
    # Gradients of a few numbers, each a sum over the whole map, cannot do better than such a sum in float32.
    of_sums = 3 * 1.2e-7 * exact[1].square().sum().sqrt().item()
    for name, ours, theirs, truth in zip(["out", *inputs], got, plain, exact, strict=True):
        floor = of_sums if name in ("logit_scale", "pad_kv") else 0.0
        assert within_the_rule(ours, theirs, truth, 2 if name == "out" else 3, floor), name


def within_the_rule(ours: Tensor, plain: Tensor, truth: Tensor, factor: float, floor: float) -> bool:
    if truth.numel() == 0:
        return ours.shape == truth.shape
    rounded = truth.to(ours.dtype)
    atol = 2 * ((rounded + 0.3 - 0.3) - rounded).abs().max().item()
    error, allowed = ((t.double() - truth).abs().max().item() for t in (ours, plain))
    close = error <= factor * allowed + atol + floor
    if ours.dtype == torch.bfloat16:
        rms_error, rms = (t.square().mean().sqrt() for t in (ours.double() - truth, truth))
        close &= bool(rms_error < 0.005 * rms)
    return close


def plain_window_attention(
    qkv: Tensor,
    bias: Tensor,
    window: tuple[int, int],
    shift: int | tuple[int, int],
    scale: float | None,
    logit_scale: Tensor | None = None,
    pad_kv: Tensor | None = None,
) -> Tensor:
    """The usual way: roll, pad, partition, attend with a mask, reverse. All in the dtype that comes in."""
    batch, height, width, _, heads, dim = qkv.shape
    (wy, wx), (sy, sx) = window, (shift, shift) if isinstance(shift, int) else shift
    pad_y, pad_x = -height % wy, -width % wx
    x = torch.roll(qkv, (-sy, -sx), (1, 2))
    x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, pad_x, 0, pad_y))
    region = torch.zeros(height + pad_y, width + pad_x)
    if sy:
        region[-sy:] += 1
    if sx:
        region[:, -sx:] += 2
    is_pad = torch.zeros(height + pad_y, width + pad_x, dtype=torch.bool)
    is_pad[height:], is_pad[:, width:] = True, True
    if pad_kv is not None:
        fill = torch.cat([torch.ones_like(pad_kv[:1]), pad_kv])  # a query of zeros has no direction
        x = torch.where(is_pad[:, :, None, None, None], fill, x)

    def cut(t: Tensor) -> Tensor:  # [B, H, W, ...] -> [B, windows, N, ...]
        t = t.unflatten(2, (-1, wx)).unflatten(1, (-1, wy)).transpose(2, 3)
        return t.flatten(3, 4).flatten(1, 2)

    q, k, v = cut(x).permute(3, 0, 1, 4, 2, 5)
    if logit_scale is not None:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        logits = q @ k.mT * logit_scale.clamp(max=math.log(100)).exp()[:, None, None]
    else:
        logits = (q * scale) @ k.mT
    offsets = torch.stack(torch.meshgrid(torch.arange(wy), torch.arange(wx), indexing="ij")).flatten(1)
    dy, dx = offsets[:, :, None] - offsets[:, None, :]
    logits = logits + bias.view(2 * wy - 1, 2 * wx - 1, heads)[dy + wy - 1, dx + wx - 1].permute(2, 0, 1)
    regions, pads = cut(region[None])[0], cut(is_pad[None])[0]
    hidden = regions[:, :, None] != regions[:, None, :]
    if pad_kv is None:
        hidden = hidden | pads[:, None, :]
    hidden = hidden & ~pads[:, :, None]
    out = logits.masked_fill(hidden[:, None], float("-inf")).softmax(-1) @ v
    out = out.transpose(2, 3).flatten(3)  # [B, windows, N, C]
    out = out.unflatten(2, (wy, wx)).unflatten(1, (-1, (width + pad_x) // wx)).transpose(2, 3)
    out = out.flatten(3, 4).flatten(1, 2)[:, :height, :width]
    return torch.roll(out, (sy, sx), (1, 2))


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
        ({"window": 4.0}, ValueError, r"an int or \(y, x\) of ints, got 4.0"),
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
