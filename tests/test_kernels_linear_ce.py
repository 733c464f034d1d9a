"""Linear cross-entropy against torch.nn.functional.cross_entropy over all logits: values, gradients, edges, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreter, on_each_device  # noqa: F401
from torch import Tensor

import kernels
from bench.numerics import judge
from kernels import linear_cross_entropy, products
from kernels.backend import BackendError
from kernels.linear_cross_entropy import eager, fused, liger
from kernels.linear_cross_entropy.reference import Settings

CHUNKED = ("eager",)
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"label_smoothing": 0.3, "z_loss": 0.05, "ignore_index": 7},
]


def some(
    tokens: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float64,
    ignore: int = -100,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (not contiguous), weight, targets of which every fifth is ignored."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(width, tokens, generator=g, dtype=torch.float64).T.to(dtype)
    weight = (torch.randn(vocabulary, width, generator=g, dtype=torch.float64) * 0.7).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=g)
    targets[::5] = ignore
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def textbook(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean", **options: Any
) -> Tensor:
    """F.cross_entropy and the definition of the z-loss, on all logits."""
    ignore = options.get("ignore_index", -100)
    logits = hidden @ weight.T
    if logits.dtype not in (torch.float64, torch.float32):
        logits = logits.float()
    losses = F.cross_entropy(
        logits,
        targets,
        ignore_index=ignore,
        label_smoothing=options.get("label_smoothing", 0.0),
        reduction="none",
    )
    wanted = targets != ignore
    losses = losses + options.get("z_loss", 0.0) * logits.logsumexp(-1).square() * wanted
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / wanted.sum()


def gradients(
    out: Tensor, leaves: tuple[Tensor, ...], seed: int = 3, keep: bool = False
) -> tuple[Tensor, ...]:
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)) * 1.7
    return torch.autograd.grad(out, leaves, cotangent.to(out), retain_graph=keep)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows at a time."""
    monkeypatch.setattr(eager, "CHUNK", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(eager, "FEWEST_ROWS", {"cpu": 3, "cuda": 3})


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_torchs_cross_entropy(options: dict, reduction: str, backend: str, small_chunks: None) -> None:
    """In float64, with the gradients of both inputs, twice from one graph."""
    hidden, weight, targets = some(23, 6, 11, ignore=options.get("ignore_index", -100))
    expected = textbook(hidden, weight, targets, reduction, **options)
    found = linear_cross_entropy(hidden, weight, targets, reduction=reduction, backend=backend, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = gradients(expected, (hidden, weight))
    for keep in (True, True, False):
        torch.testing.assert_close(
            gradients(found, (hidden, weight), keep=keep), wanted, rtol=1e-11, atol=1e-12
        )


def test_its_mean_is_torchs_own() -> None:
    """F.cross_entropy's own mean, not one that was put together here."""
    hidden, weight, targets = some(23, 6, 11)
    expected = F.cross_entropy(hidden @ weight.T, targets, label_smoothing=0.2)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, label_smoothing=0.2), expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 40), width=st.integers(1, 9), vocabulary=st.integers(1, 40),
    rows=st.integers(1, 50), reduction=st.sampled_from(["sum", "none"]), option=st.sampled_from(OPTIONS[:3]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_shapes_and_chunks(
    tokens: int, width: int, vocabulary: int, rows: int, reduction: str, option: dict, seed: int
) -> None:
    hidden, weight, targets = some(tokens, width, vocabulary, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "CHUNK", {"cpu": 1, "cuda": 1})
        patch.setattr(eager, "FEWEST_ROWS", {"cpu": rows, "cuda": rows})
        found = linear_cross_entropy(hidden, weight, targets, reduction=reduction, backend="eager", **option)
        got = gradients(found, (hidden, weight))
    expected = textbook(hidden, weight, targets, reduction, **option)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got, gradients(expected, (hidden, weight)), rtol=1e-10, atol=1e-11)


def check_rule(
    dtype: torch.dtype,
    backend: str,
    device: str,
    reduction: str,
    options: dict,
    tokens: int = 70,
    quiet: bool = False,
) -> None:
    """The rule of error: twice (gradients three times) that of plain PyTorch, against float64. Logits are up to 20, those of a
    `quiet` call up to 5."""
    tensors = [t.detach().to(device) for t in some(tokens, 33, 129, dtype)]
    if quiet:
        tensors[1] = tensors[1] / 4

    def run(kind: torch.dtype, function: Any) -> dict[str, Tensor]:
        hidden, weight = (t.to(kind).requires_grad_() for t in tensors[:2])
        out = function(hidden, weight, tensors[2], reduction=reduction, **options)
        d_hidden, d_weight = gradients(out, (hidden, weight))
        return {"out": out.detach(), "hidden": d_hidden, "weight": d_weight}

    exact = run(torch.float64, textbook)
    found = run(dtype, lambda *args, **kwargs: linear_cross_entropy(*args, backend=backend, **kwargs))
    # A CPU that multiplies bfloat16 rounds logits to it, as it does for plain PyTorch, whose own relative error is 0.8% for
    # logits of 20, beyond the usual bound of 0.75%.
    rounded = (
        not quiet
        and device == "cpu"
        and products.product_dtype(dtype, torch.device(device)) == torch.bfloat16
    )
    verdicts = judge(found, [run(dtype, textbook)], exact, dtype, depth=1.5 if rounded else 1.0)
    bad = [v for v in verdicts if not v.good]
    assert not bad, bad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_types_obey_the_rule_of_error(dtype: torch.dtype, reduction: str, small_chunks: None) -> None:
    for quiet in {False, dtype.itemsize == 2}:
        check_rule(dtype, "eager", "cpu", reduction, OPTIONS[3] | {"ignore_index": -100}, quiet=quiet)


def test_logits_far_from_zero() -> None:
    """Targets of probability 1 and of probability 0: no infinity, no cancellation beyond torch's own."""
    hidden = torch.tensor([[500.0], [500.0], [-500.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    targets = torch.tensor([0, 1, 2])
    found = linear_cross_entropy(hidden, weight, targets, reduction="none")
    torch.testing.assert_close(found, F.cross_entropy(hidden @ weight.T, targets, reduction="none"))
    assert found.tolist() == [0.0, 1000.0, 750.0]
    expected = torch.autograd.grad(textbook(hidden, weight, targets, "sum"), (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(found.sum(), (hidden, weight)), expected)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("tokens", [0, 4])
def test_nothing_to_predict(backend: str, tokens: int) -> None:
    """No tokens, or none with a target: as F.cross_entropy, nan for a mean, else 0; gradients 0."""
    for reduction in ("mean", "sum", "none"):
        hidden, weight = torch.randn(tokens, 3).requires_grad_(), torch.randn(5, 3).requires_grad_()
        targets = torch.full((tokens,), -100)
        found = linear_cross_entropy(hidden, weight, targets, reduction=reduction, backend=backend)
        expected = F.cross_entropy(hidden @ weight.T, targets, reduction=reduction)
        torch.testing.assert_close(found, expected, equal_nan=True)
        found.sum().backward()
        assert torch.equal(weight.grad, torch.zeros(5, 3)) and torch.equal(
            hidden.grad, torch.zeros(tokens, 3)
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_asked_for(reduction: str) -> None:
    """Gradients for one input, or none at all; a frozen input gets none and costs no product."""
    hidden, weight, targets = some(9, 4, 6)
    both = gradients(textbook(hidden, weight, targets, reduction), (hidden, weight))
    one = linear_cross_entropy(hidden, weight.detach(), targets, reduction=reduction)
    torch.testing.assert_close(gradients(one, (hidden,))[0], both[0])
    other = linear_cross_entropy(hidden.detach(), weight, targets, reduction=reduction)
    torch.testing.assert_close(gradients(other, (weight,))[0], both[1])
    assert not linear_cross_entropy(
        hidden.detach(), weight.detach(), targets, reduction=reduction
    ).requires_grad
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets, reduction=reduction).requires_grad


def test_it_is_the_same_every_time() -> None:
    hidden, weight, targets = some(64, 16, 50, torch.float32)
    results = [gradients(linear_cross_entropy(hidden, weight, targets), (hidden, weight)) for _ in range(3)]
    for again in results[1:]:
        assert all(map(torch.equal, results[0], again))


def test_all_logits_never_exist() -> None:
    """The largest allocation, and all of them together, stay far below the logits of all tokens."""
    from bench.measure import peak_memory

    tokens, width, vocabulary = 4096, 16, 4096
    hidden, weight, targets = some(tokens, width, vocabulary, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "CHUNK", {"cpu": 2**21, "cuda": 2**21})
        ours = peak_memory(lambda: linear_cross_entropy(hidden, weight, targets).backward(), "cpu")
    assert ours < 0.15 * tokens * vocabulary * 4
    assert (
        peak_memory(lambda: textbook(hidden, weight, targets).backward(), "cpu")
        > 1.9 * tokens * vocabulary * 4
    )


def test_gradients_are_not_there_twice() -> None:
    """Their factor is multiplied in where they lie; not where the graph lives on (see the test of torch's own)."""
    hidden, weight, targets = some(6, 4, 5, torch.float32)
    out = linear_cross_entropy(hidden, weight, targets)
    kept = out.grad_fn.next_functions[0][0]  # of where(count > 0, total / count, nan)
    while "linear_cross_entropy_sum" not in type(kept).__name__.lower() and kept.next_functions:
        kept = next(fn for fn, _ in kept.next_functions if fn is not None)
    addresses = {t.data_ptr() for t in kept.saved_tensors}
    found = torch.autograd.grad(out, (hidden, weight))
    assert {g.data_ptr() for g in found} == addresses


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low: torch.dtype) -> None:
    """Products in autocast's dtype or wider, the loss in float32, gradients in the inputs' own dtypes; mixed inputs too."""
    hidden, weight, targets = some(40, 8, 30, torch.float32)
    with torch.autocast("cpu", dtype=low):
        found = linear_cross_entropy(hidden, weight, targets)
        mixed = linear_cross_entropy(hidden.to(low), weight, targets)
        expected = F.cross_entropy(F.linear(hidden, weight).float(), targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(mixed, found, rtol=1e-2, atol=1e-2)
    got = torch.autograd.grad(found, (hidden, weight))
    assert [g.dtype for g in got] == [torch.float32] * 2
    torch.testing.assert_close(got, torch.autograd.grad(expected, (hidden, weight)), rtol=5e-2, atol=2e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_whole(reduction: str) -> None:
    hidden, weight, targets = some(30, 8, 20, torch.float32)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(2 * hidden, weight, targets, reduction=reduction, z_loss=0.1).sin()

    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = loss(hidden, weight), whole(hidden, weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, (hidden, weight)), gradients(expected, (hidden, weight)))


@pytest.mark.parametrize("backend", CHUNKED)
def test_operators_are_well_made(backend: str) -> None:
    hidden, weight, targets = some(8, 4, 6, torch.float32)
    numbers = (-100, 0.1, 0.01, torch.float32)
    torch.library.opcheck(fused._sum, (hidden, weight, targets, *numbers, True, True, backend))
    torch.library.opcheck(fused._rows, (hidden, weight, targets, *numbers, backend))
    plain = (torch.ones(8), hidden.detach(), weight.detach(), targets)
    torch.library.opcheck(fused._rows_gradients, (*plain, *numbers, True, True, backend))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_second_derivative_is_refused_and_never_wrong(reduction: str) -> None:
    hidden, weight, targets = some(6, 4, 5)
    with pytest.raises(RuntimeError, match="differentiated"):
        first = torch.autograd.grad(
            linear_cross_entropy(hidden, weight, targets, reduction=reduction).square().sum(), hidden,
            create_graph=True,
        )[0]  # fmt: skip
        torch.autograd.grad(first.sum(), weight)
    loss = linear_cross_entropy(hidden, weight, targets, reduction="sum", backend="reference")
    assert torch.autograd.grad(torch.autograd.grad(loss, hidden, create_graph=True)[0].square().sum(), weight)


GOOD = {
    "hidden": torch.zeros(3, 4),
    "weight": torch.zeros(5, 4),
    "targets": torch.zeros(3, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"hidden": torch.zeros(3, 1, 4)}, ValueError, r"hidden must be \[M, H\].*got \[3, 1, 4\]"),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"weight \[V, H\], got \[3, 4\] and \[5, 3\]"),
        ({"weight": torch.zeros(0, 4)}, ValueError, "rows may be none"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, ValueError, r"\[M\] = \[3\], got \[4\]"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, TypeError, "int64, got torch.int32"),
        ({"targets": [0, 1, 2]}, TypeError, "targets must be a torch.Tensor, got list"),
        ({"hidden": torch.zeros(3, 4).int()}, TypeError, "hidden must be float64"),
        ({"weight": torch.zeros(5, 4).bfloat16()}, TypeError, "hidden's dtype torch.float32, got torch.bfloat16"),
        ({"weight": torch.zeros(5, 4, device="meta")}, ValueError, "on one device"),
        ({"targets": torch.tensor([0, 5, 1])}, IndexError, "from 0 to 4, or ignore_index -100; got 5"),
        ({"targets": torch.tensor([0, -1, 1])}, IndexError, "got -1"),
        ({"label_smoothing": 1.5}, ValueError, "from 0 to 1, got 1.5"),
        ({"z_loss": -1.0}, ValueError, "0 or positive, got -1"),
        ({"z_loss": float("nan")}, ValueError, "got nan"),
        ({"reduction": "max"}, ValueError, "unknown reduction 'max'"),
        ({"backend": "sdpa"}, ValueError, "unknown backend 'sdpa'; supported: 'auto', 'reference', 'eager', 'liger'"),
        ({"backend": "liger"}, BackendError, "liger.*CUDA devices, got cpu. These can: reference, eager"),
    ],
)  # fmt: skip
def test_wrong_calls_are_refused(changes: dict, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        linear_cross_entropy(**GOOD | changes)


def test_which_backend_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a GPU: a meta tensor that says it is on one."""
    assert kernels.explain(linear_cross_entropy, **GOOD).backend == "eager"

    class OnGpu:
        device = torch.device("cuda")

    from kernels.linear_cross_entropy import op

    assert op.plan(OnGpu(), torch.bfloat16).preferred == "liger"
    exact = op.plan(OnGpu(), torch.float64)
    assert exact.preferred == "eager" and "float32" in exact.refusals["liger"]
    monkeypatch.setattr(liger, "HAS_LIGER", False)
    bare = op.plan(OnGpu(), torch.bfloat16)
    assert bare.preferred == "eager" and "auroraio[liger]" in bare.refusals["liger"]


def test_half_types_are_multiplied_where_the_cpu_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for able, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(products, "CPU_HAS_BFLOAT16", able)
        assert products.product_dtype(torch.bfloat16, torch.device("cpu")) == expected
        assert products.product_dtype(torch.float16, torch.device("cpu")) == torch.float32
    assert products.product_dtype(torch.float16, torch.device("cuda")) == torch.float16
    hidden, weight, targets = (t.detach() for t in some(9, 4, 6, torch.bfloat16))
    kind = Settings(-100, 0.0, 0.0, torch.bfloat16)
    wanted = {"scale": None, "want_hidden": True, "want_weight": True}
    wide = eager.sweep(hidden, weight, targets, kind, **wanted)
    monkeypatch.setattr(products, "CPU_HAS_BFLOAT16", True)
    for a, b in zip(eager.sweep(hidden, weight, targets, kind, **wanted), wide, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2, check_dtype=False)


@pytest.mark.usefixtures("interpreter")
@on_each_device
def test_liger_obeys_the_rule_of_error(device: str) -> None:
    """Liger's kernel under our autograd, in Triton's interpreter and on a GPU; and twice from one graph."""
    pytest.importorskip("liger_kernel", reason="needs Liger-Kernel: pip install 'auroraio[liger]'")
    torch.use_deterministic_algorithms(False)
    halves = (torch.float16, torch.bfloat16) if device == "cuda" else ()
    for dtype in (torch.float32, *halves):
        for reduction in ("mean", "none"):
            check_rule(dtype, "liger", device, reduction, {"label_smoothing": 0.1, "z_loss": 0.01}, tokens=15)
    hidden, weight, targets = some(0, 4, 5, torch.float32)
    hidden, weight, targets = (t.detach().to(device) for t in (hidden, weight, targets))
    assert linear_cross_entropy(hidden, weight, targets, reduction="sum", backend="liger") == 0
    hidden, weight, targets = (t.detach().to(device) for t in some(12, 8, 9, torch.float32))
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, backend="liger")
    first = gradients(loss, (hidden, weight), keep=True)
    assert all(map(torch.equal, first, gradients(loss, (hidden, weight))))


def test_a_large_sum_does_not_overflow_float16() -> None:
    """20,000 tokens that want the same piece: the mean's gradient is 7, that of the sum beyond float16."""
    hidden = torch.full((20_000, 1), 8.0, dtype=torch.float16)
    weight = torch.zeros(8, 1, dtype=torch.float16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(20_000, dtype=torch.int64)).backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float16
    expected = torch.tensor([-7.0] + [1.0] * 7)[:, None]
    torch.testing.assert_close(weight.grad.float(), expected, rtol=1e-3, atol=0)
