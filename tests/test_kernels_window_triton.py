"""The Triton kernels of window attention; see interpreter.py for where they run.

The rule is the benchmark's (bench/numerics.py): against the reference in float64, an output may be off by twice what
plain PyTorch is in the same dtype, a gradient by three times that.
"""

from __future__ import annotations

import importlib
import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from interpreter import interpreter as interpreter
from interpreter import is_rounding, on_each_device
from torch import Tensor

from bench.numerics import FEW, RELATIVE, judge
from kernels import WindowAttention, explain, window_attention
from kernels.backend import BackendError
from kernels.window_attention import launch, reference

triton = pytest.importorskip("triton", reason="needs Triton, which is for Linux: pip install 'triton>=3.6'")
pytestmark = pytest.mark.usefixtures("interpreter")
backward_walking = importlib.import_module("kernels.window_attention.backward_walking")  # needs Triton

HALF, SINGLE = torch.float16, torch.float32


def some(
    map_size: tuple[int, int],
    heads: int,
    head_dim: int,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    *,
    batch: int = 1,
    bias: str = "table",
    cosine: bool = False,
    pads: bool = False,
    dtype: torch.dtype = SINGLE,
    device: str = "cpu",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and numbers of one call."""
    wy, wx = (window, window) if isinstance(window, int) else window
    qkv = 1.3 * torch.randn(batch, *map_size, 3, heads, head_dim)
    tensors = {"qkv": qkv.to(dtype)}
    if bias != "none":
        shape = ((2 * wy - 1) * (2 * wx - 1), heads) if bias == "table" else (heads, wy * wx, wy * wx)
        tensors["bias"] = torch.randn(shape)
    if cosine:
        tensors["logit_scale"] = math.log(10) + 0.3 * torch.randn(heads)
    if pads:
        tensors["pad_kv"] = torch.randn(2, heads, head_dim).to(dtype)
    numbers: dict[str, Any] = {"window": window, "shift": shift}
    if not cosine:
        numbers["scale"] = 0.7 / math.sqrt(head_dim)  # not the default: a forgotten scale would show
    return {name: tensor.to(device) for name, tensor in tensors.items()}, numbers


def run(tensors: dict[str, Tensor], numbers: dict[str, Any], grad: Tensor, backend: str) -> dict[str, Tensor]:
    """The output and every gradient."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    out = window_attention(**leaves, **numbers, backend=backend)
    grads = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


def check(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> dict[str, Tensor]:
    """Hold Triton to the rule; its results."""
    batch, height, width, _, heads, head_dim = tensors["qkv"].shape
    grad = torch.randn(batch, height, width, heads * head_dim).to(tensors["qkv"])
    mine = run(tensors, numbers, grad, "triton")
    exact = run(
        {name: tensor.double() for name, tensor in tensors.items()}, numbers, grad.double(), "reference"
    )
    with (  # half types stay half; only the norms are taken in float32, where fp16 would overflow
        mock.patch.object(reference, "compute_dtype", lambda tensor: tensor.dtype),
        mock.patch.object(reference, "unit", lambda x: F.normalize(x.float(), dim=-1).to(x.dtype)),
    ):
        plain = run(tensors, numbers, grad, "reference")
    bad = []
    for verdict in judge(mine, [plain], exact, tensors["qkv"].dtype):
        # What plain PyTorch's largest error is among a few numbers is luck; the relative error decides, and where one or
        # two long sums are all that there is, generously.
        numbers_in = exact[verdict.name].numel()
        factor = 10 if numbers_in < 4 else 1.5
        few = numbers_in < FEW and verdict.relative <= factor * RELATIVE[tensors["qkv"].dtype]
        if not (verdict.good or few or is_rounding(verdict.relative, tensors["qkv"])):
            bad.append(str(verdict))
    assert not bad, "\n".join(bad)
    return mine


# Whole windows (N <= 64; fp32: 32) and tiled ones; shifts along y, x and both; padding at the bottom, the right, both;
# one window; windows that are lines; head_dims that are padded; several steps, with tails of 16 and 32.
CALLS: dict[str, dict[str, Any]] = {
    "plain": {"map_size": (8, 8), "heads": 2, "head_dim": 16, "window": 4},
    "shifted": {"map_size": (8, 12), "heads": 1, "head_dim": 16, "window": 4, "shift": 2},
    "many-heads": {"map_size": (4, 4), "heads": 12, "head_dim": 16, "window": 4, "cosine": True},
    "shift-y": {"map_size": (14, 7), "heads": 1, "head_dim": 32, "window": 7, "shift": (3, 0)},
    "shift-x": {"map_size": (7, 14), "heads": 1, "head_dim": 32, "window": 7, "shift": (0, 5), "cosine": True},
    "one-window": {"map_size": (5, 3), "heads": 3, "head_dim": 24, "window": (5, 3), "bias": "full"},
    "no-bias": {"map_size": (6, 9), "heads": 2, "head_dim": 16, "window": (3, 4), "shift": (1, 2), "bias": "none"},
    "hidden-pads": {"map_size": (9, 7), "heads": 2, "head_dim": 24, "window": (4, 3), "shift": (1, 2)},
    "pads-are-keys": {
        "map_size": (9, 7), "heads": 2, "head_dim": 20, "window": (4, 3), "shift": (1, 2), "pads": True, "cosine": True,
    },
    "more-pads-than-shift": {"map_size": (9, 13), "heads": 1, "head_dim": 16, "window": 8, "shift": 2, "cosine": True},
    "line": {"map_size": (3, 40), "heads": 1, "head_dim": 16, "window": (1, 20), "shift": (0, 7), "bias": "full"},
    "two-slots": {"map_size": (2, 3), "heads": 1, "head_dim": 16, "window": (1, 2)},
    "head-dim-59": {"map_size": (8, 6), "heads": 1, "head_dim": 59, "window": 4, "shift": 1},
    "head-dim-64": {"map_size": (13, 9), "heads": 1, "head_dim": 64, "window": 7, "shift": 3, "cosine": True},
    "head-dim-128": {"map_size": (7, 8), "heads": 1, "head_dim": 128, "window": 7, "shift": 3, "pads": True},
    "window-9": {"map_size": (9, 10), "heads": 1, "head_dim": 32, "window": 9, "shift": (0, 4), "cosine": True},
    "window-12": {"map_size": (12, 13), "heads": 1, "head_dim": 16, "window": 12, "shift": (0, 6), "pads": True},
    "window-14": {"map_size": (14, 14), "heads": 1, "head_dim": 32, "window": 14, "bias": "full", "cosine": True},
}  # fmt: skip


BIG = (
    "head-dim-128",
    "window-12",
    "window-14",
)  # in fp32 the same code in smaller tiles: slow where it is interpreted


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in CALLS for dtype in (SINGLE, HALF) if dtype == HALF or name not in BIG],
)
@on_each_device
def test_exact(device: str, name: str, dtype: torch.dtype) -> None:
    """Output and every gradient, by the rule; uninitialised memory holds NaN."""
    check(*some(**CALLS[name], dtype=dtype, device=device))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: the interpreter has no true bfloat16"
)
@pytest.mark.parametrize("name", CALLS)
def test_exact_in_bf16(name: str) -> None:
    check(*some(**CALLS[name], dtype=torch.bfloat16, device="cuda"))


@on_each_device
def test_any_shape(device: str) -> None:
    """What hypothesis draws: maps, windows, shifts, heads, dtypes and flags in any combination."""
    pytest.importorskip("hypothesis", reason="needs hypothesis: pip install hypothesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    @st.composite
    def calls(draw: Any) -> dict[str, Any]:
        wy, wx = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        height, width = draw(st.integers(wy, 2 * wy)), draw(st.integers(wx, 2 * wx))  # at most four windows
        return {
            "map_size": (height, width),
            "heads": draw(st.integers(1, 2)),
            "head_dim": draw(st.sampled_from([1, 8, 16, 40])),
            "window": (wy, wx),
            "shift": (draw(st.integers(0, wy - 1)), draw(st.integers(0, wx - 1))),
            "bias": draw(st.sampled_from(["table", "full", "none"])),
            "cosine": draw(st.booleans()),
            "pads": draw(st.booleans()),
            "dtype": draw(st.sampled_from([SINGLE, HALF])),
        }

    @settings(
        max_examples=8 if device == "cpu" else 100,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # shrinking takes minutes in the interpreter
        suppress_health_check=list(HealthCheck),
    )
    @given(calls())
    def draw_and_check(call: dict[str, Any]) -> None:
        torch.manual_seed(0)
        check(*some(**call, device=device))

    draw_and_check()


@on_each_device
def test_exact_with_the_tiles_of_sm_90(device: str) -> None:
    """The interpreter takes sm_80's configurations; those of Hopper are other code (LATE) and other tiles."""
    with mock.patch.object(launch, "processor", lambda _: (90, 2)):
        for name in ("shifted", "many-heads", "hidden-pads", "two-slots"):
            check(*some(**CALLS[name], dtype=HALF, device=device))
        check(*some((8, 8), 2, 32, 4, 2, cosine=True, dtype=HALF, device=device))
        for cosine in (False, True):  # the bias by a product, in fp16, and large
            tensors, numbers = some((8, 8), 1, 64, 4, 2, cosine=cosine, dtype=HALF, device=device)
            check(tensors | {"bias": 8 * tensors["bias"] + 30}, numbers)


# Pieces of 64 + 64, 64 + 16, 64 + 64 + 64; one kind of window and four; a table, all pairs and none.
WALKS: dict[str, dict[str, Any]] = {
    "one-window": {"map_size": (10, 10), "heads": 2, "head_dim": 32, "window": 10, "bias": "full", "cosine": True},
    "shifted": {"map_size": (18, 18), "heads": 1, "head_dim": 32, "window": 9, "shift": (4, 2)},
    "three-pieces": {"map_size": (12, 28), "heads": 1, "head_dim": 64, "window": (12, 14), "shift": (0, 7), "cosine": True},
    "no-bias": {"map_size": (9, 9), "heads": 1, "head_dim": 64, "window": 9, "bias": "none"},
}  # fmt: skip


@pytest.mark.parametrize("name", WALKS)
@on_each_device
def test_exact_where_the_backward_walks(device: str, name: str) -> None:
    """As it does on Hopper, where the window divides the map."""
    with mock.patch.object(launch, "processor", lambda _: (90, 2)):
        tensors, numbers = some(**WALKS[name], dtype=HALF, device=device)
        with mock.patch.object(backward_walking, "backward", wraps=backward_walking.backward) as walked:
            check(tensors, numbers)
            assert walked.called
            # Biases far from 0, and large ones, as fp16 could not hold them: what all logits of a query have is taken off.
            for change in (lambda bias: bias + 30, lambda bias: 8 * bias) if "bias" in tensors else ():
                check(tensors | {"bias": change(tensors["bias"])}, numbers)


@on_each_device
def test_a_scale_too_small_to_walk_with(device: str) -> None:
    """The bias, divided by it, would leave fp16's range: the kernels in tiles do such a call."""
    tensors, numbers = some((9, 9), 1, 32, 9, dtype=HALF, device=device)
    with (
        mock.patch.object(launch, "processor", lambda _: (90, 2)),
        mock.patch.object(backward_walking, "backward", side_effect=AssertionError),
    ):
        check(tensors, numbers | {"scale": 1e-3})


@on_each_device
def test_a_full_bias_of_any_strides(device: str) -> None:
    """Of a size that needs no padding: what a permuted table lookup, or a transpose, gives."""
    for dtype, window in ((HALF, 4), (SINGLE, 8)):
        tensors, numbers = some((window, window), 2, 16, window, bias="full", dtype=dtype, device=device)
        permuted = tensors["bias"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
        for bias in (permuted, tensors["bias"].mT):
            check(tensors | {"bias": bias}, numbers)


@on_each_device
def test_a_query_that_may_see_nothing(device: str) -> None:
    """A row of -inf in the bias gives 0 and gradients 0, whole or in tiles."""
    for dtype in (HALF, SINGLE):
        tensors, numbers = some((6, 6), 1, 16, 6, bias="full", dtype=dtype, device=device)
        tensors["bias"][:, 3] = float("-inf")
        results = run(tensors, numbers, torch.randn(1, 6, 6, 16, device=device), "triton")
        assert all(part.isfinite().all() for part in results.values())
        assert not results["out"].view(36, 16)[3].any() and not results["qkv"].view(36, 3, 16)[3, 0].any()


@on_each_device
def test_padding_that_a_map_does_not_need(device: str) -> None:
    """pad_kv where the window divides the map: a gradient of zeros, not none."""
    tensors, numbers = some((8, 4), 1, 16, 4, 2, pads=True, dtype=HALF, device=device)
    results = run(tensors, numbers, torch.randn(1, 8, 4, 16, device=device), "triton")
    assert not results["pad_kv"].any() and results["pad_kv"].dtype == HALF


@on_each_device
def test_a_model_learns_the_same(device: str) -> None:
    """Two layers, shifted and not, trained by Triton and by the reference: losses agree, then weights."""
    losses, weights = [], []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        layers = [
            WindowAttention(
                16, 1, window=4, shift=shift, position_bias="continuous", cosine=True, backend=backend
            )
            for shift in (0, 2)
        ]
        model = torch.nn.Sequential(*layers).to(device)
        x, y = torch.randn(2, 1, 6, 8, 16, device=device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(4):
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    assert losses[3] < losses[0]
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-4)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


@on_each_device
def test_same_bits_every_time(device: str) -> None:
    """For whole windows and for tiled ones, with every partial sum that there is."""
    for dtype, name in ((HALF, "more-pads-than-shift"), (HALF, "pads-are-keys")):
        tensors, numbers = some(**CALLS[name], dtype=dtype, device=device)
        grad = torch.randn(*tensors["qkv"].shape[:3], math.prod(tensors["qkv"].shape[-2:]), device=device)
        first, *others = (run(tensors, numbers, grad, "triton") for _ in range(2 if device == "cpu" else 20))
        for other in others:
            assert all(torch.equal(first[part], other[part]) for part in first), name


@on_each_device
def test_any_number_of_groups(device: str) -> None:
    """One window to a program, several of one kind, all of one kind: the work is cut elsewhere, the result is the same."""
    tensors, numbers = some((6, 9), 1, 16, 4, 2, batch=4, dtype=HALF, cosine=False, device=device)
    grad = torch.randn(4, 6, 9, 16, device=device)
    results = []
    for processors in (1, 3, 1000):
        with mock.patch.object(launch, "processor", lambda _, n=processors: (80, n)):
            results.append(run(tensors, numbers, grad, "triton"))
    for result in results[1:]:
        assert torch.equal(result["out"], results[0]["out"]) and torch.equal(result["qkv"], results[0]["qkv"])
        torch.testing.assert_close(result["bias"], results[0]["bias"], rtol=1e-5, atol=1e-5)


@on_each_device
def test_views(device: str) -> None:
    """qkv and its gradient that are permuted, strided, or start at an odd address."""
    tensors, numbers = some((6, 5), 2, 16, 3, 1, dtype=HALF, device=device)
    grad = torch.randn(1, 6, 5, 32, device=device)
    want = run(tensors, numbers, grad, "triton")
    qkv = tensors["qkv"]
    odd = torch.empty(qkv.numel() + 1, dtype=HALF, device=device)[1:].view(qkv.shape).copy_(qkv)
    wide = torch.zeros(*qkv.shape[:-1], 40, dtype=HALF, device=device)
    wide[..., :16] = qkv
    permuted = qkv.permute(3, 4, 1, 0, 2, 5).contiguous().permute(3, 2, 4, 0, 1, 5)
    assert odd.data_ptr() % 16 and not permuted.is_contiguous()
    for view in (odd, wide[..., :16], permuted):
        leaf = view.detach().requires_grad_()
        out = window_attention(leaf, tensors["bias"], **numbers, backend="triton")
        strange = grad.to(HALF).transpose(1, 2).contiguous().transpose(1, 2)
        assert not strange.is_contiguous()
        (got,) = torch.autograd.grad(out, leaf, strange)
        assert torch.equal(out, want["out"]) and torch.equal(got, want["qkv"])


@on_each_device
def test_is_part_of_torch(device: str) -> None:
    """The operators' contracts; compiled without a break; recomputed; under autocast."""
    from torch.utils.checkpoint import checkpoint

    from kernels.window_attention import triton_ops

    tensors, numbers = some((5, 3), 1, 16, (4, 3), (2, 0), cosine=True, pads=True, device=device)
    grad = torch.randn(1, 5, 3, 16, device=device)
    want = run(tensors, numbers, grad, "triton")
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def attend(*args: Tensor) -> Tensor:
        return window_attention(**dict(zip(tensors, args, strict=True)), **numbers, backend="triton")

    for function in (
        torch.compile(attend, fullgraph=True),
        lambda *args: checkpoint(attend, *args, use_reentrant=False),
    ):
        out = function(*leaves)
        assert torch.equal(out, want["out"])
        for got, name in zip(torch.autograd.grad(out, leaves, grad), tensors, strict=True):
            assert torch.equal(got, want[name])
    with torch.autocast(device, torch.float16):
        out = attend(*leaves)
    assert out.dtype == HALF
    assert [g.dtype for g in torch.autograd.grad(out.float().sum(), leaves)] == [SINGLE] * 4

    call = (*leaves, 4, 3, 2, 0, 1.0, True)
    torch.library.opcheck(triton_ops._forward, call)
    out, lse = triton_ops._forward(*call)
    assert lse.numel()
    rest = [tensor.detach() for tensor in (grad, leaves[0], out, lse, *leaves[1:])]
    torch.library.opcheck(triton_ops._backward, (*rest, *call[4:-1], True))


@on_each_device
def test_edges(device: str) -> None:
    """No samples, no gradient wanted, a gradient for some inputs only, a second derivative."""
    for dtype in (HALF, SINGLE):
        tensors, numbers = some(
            (6, 5), 2, 16, 4, 2, batch=0, cosine=True, pads=True, dtype=dtype, device=device
        )
        results = run(tensors, numbers, torch.empty(0, 6, 5, 32, device=device), "triton")
        assert results["out"].shape == (0, 6, 5, 32)
        for name, tensor in tensors.items():
            assert results[name].dtype == tensor.dtype and torch.equal(
                results[name], torch.zeros_like(tensor)
            )

    tensors, numbers = some((8, 8), 1, 16, 4, 2, dtype=HALF, device=device)
    want = window_attention(**tensors, **numbers, backend="triton")
    assert not want.requires_grad
    for name in tensors:
        leaf = tensors[name].clone().requires_grad_()
        out = window_attention(**tensors | {name: leaf}, **numbers, backend="triton")
        (grad,) = torch.autograd.grad(out.float().square().sum(), leaf, create_graph=True)
        assert torch.equal(out, want) and grad.shape == leaf.shape
        with pytest.raises(RuntimeError, match="cannot be differentiated"):
            torch.autograd.grad(grad.float().sum(), leaf)


@on_each_device
def test_refuses_what_it_cannot_do(device: str) -> None:
    qkv = torch.zeros(1, 4, 4, 3, 1, 16, device=device)
    assert explain(window_attention, qkv, window=4, backend="triton").backend == "triton"
    with pytest.raises(
        BackendError, match="computes in float32 at most, got float64.*These can: reference, eager"
    ):
        window_attention(qkv.double(), window=4, backend="triton")
    with pytest.raises(BackendError, match="head_dim must be from 1 to 128, got 129"):
        window_attention(torch.zeros(1, 4, 4, 3, 1, 129, device=device), window=4, backend="triton")
    huge = torch.zeros((), device=device).expand(2, 4096, 4096, 3, 1, 64)
    with pytest.raises(BackendError, match=r"fewer than 2\^31 numbers, got 3,221,225,472"):
        window_attention(huge, window=4, backend="triton")
    with pytest.raises(BackendError, match=r"a window's bias must have fewer than 2\^31 numbers, got 2,"):
        window_attention(
            torch.zeros((), device=device).expand(1, 232, 200, 3, 1, 1), window=(232, 200), backend="triton"
        )


@on_each_device
def test_transforms_are_refused(device: str) -> None:
    """torch.func.vmap by every backend, over any argument and at any depth; its derivatives and forward mode by all but
    the reference."""
    qkv, table = torch.randn(2, 1, 4, 4, 3, 1, 16, device=device), torch.randn(2, 49, 1, device=device)
    for backend in ("auto", "reference", "eager", "sdpa", "triton"):

        def attend(qkv: Tensor, table: Tensor, backend: str = backend) -> Tensor:
            return window_attention(qkv, table, window=4, backend=backend).sum()

        with pytest.raises(NotImplementedError, match="window_attention: torch.func.vmap is not supported"):
            torch.func.vmap(attend, in_dims=(0, None))(qkv, table[0])
        with pytest.raises(NotImplementedError, match="window_attention: torch.func.vmap is not supported"):
            torch.func.vmap(attend, in_dims=(None, 0))(qkv[0], table)
        with pytest.raises(
            NotImplementedError, match="not supported|are supported by backend 'reference' only"
        ):
            torch.func.vmap(torch.func.grad(attend), in_dims=(0, None))(qkv, table[0])
        if backend == "reference":
            assert torch.func.grad(attend)(qkv[0], table[0]).shape == qkv[0].shape
            continue
        with pytest.raises(
            NotImplementedError, match="derivatives are supported by backend 'reference' only"
        ):
            torch.func.grad(attend)(qkv[0], table[0])
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(qkv[0], torch.ones_like(qkv[0]))
            with pytest.raises(
                NotImplementedError, match="forward-mode derivatives are supported by backend"
            ):
                attend(dual, table[0])


def test_a_machine_without_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without the interpreter, and no Triton at all."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    qkv = torch.zeros(1, 4, 4, 3, 1, 16)
    with pytest.raises(BackendError, match="'triton' cannot run this call: it runs on CUDA devices, got cpu"):
        window_attention(qkv, window=4, backend="triton")
    monkeypatch.setattr("kernels.backend.HAS_TRITON", False)
    choice = explain(window_attention, qkv, window=4)
    assert choice.backend == "eager" and "needs Triton" in choice.others["triton"]
