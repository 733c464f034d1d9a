"""contrastive_loss: the definition against open_clip's losses, the chunks against the definition, alone and over ranks."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Launch
from torch import Tensor

import kernels
from bench import numerics
from kernels import contrastive_loss
from kernels.contrastive_loss import eager

KINDS = ("sigmoid", "softmax")
NAMES = ("image", "text", "logit_scale", "logit_bias")


def inputs(
    pairs: int,
    width: int,
    captions: int = 1,
    dtype: torch.dtype = torch.float32,
    scale: float = 2.3,
    seed: int = 0,
) -> list[Tensor]:
    """Unit rows whose texts resemble their images a little (a loss of 1e-12 would be judged by luck); scale and bias in fp32
    (fp64 with fp64 rows)."""
    g = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(pairs, width, generator=g, dtype=torch.float64), dim=-1)
    noise = torch.randn(pairs * captions, width, generator=g, dtype=torch.float64)
    text = F.normalize(image.repeat_interleave(captions, 0) + 4 * F.normalize(noise, dim=-1), dim=-1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scalars = [torch.tensor(x, dtype=wide) for x in (scale, -3.1)]
    return [image.to(dtype), text.to(dtype), *scalars]


def results(function: Any, given: list[Tensor], factor: float = 1.7) -> dict[str, Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in given]
    out = function(*leaves)
    grads = torch.autograd.grad(out * factor, leaves)
    return {"out": out.detach(), **dict(zip(NAMES, grads, strict=True))}


def ours(kind: str, backend: str) -> Any:
    return lambda *given: contrastive_loss(*given, kind=kind, backend=backend)  # type: ignore[arg-type]


def check(given: list[Tensor], kind: str, backend: str) -> dict[str, Tensor]:
    """The rule of CONTRIBUTING.md; what the backend gave. Plain PyTorch reads half types in fp32 here, and is written in three
    ways. On a GPU tensor cores add up half types with fewer bits than fp32 has: there one of the ways is their own product."""
    reference = ours(kind, "reference")
    ways = (reference, lambda i, t, s, b: reference(i.flip(0), t.flip(0), s, b), textbook(kind))
    found = variations(ours(kind, backend), given)
    given = [t.cpu() for t in given]
    exact = variations(reference, [t.double() for t in given])
    plain = [variations(way, given) for way in ways]
    if found["out"].is_cuda and given[0].dtype == torch.float16:
        by_tensor_cores = variations(half_textbook(kind), [t.cuda() for t in given])
        plain.append({name: t.cpu() for name, t in by_tensor_cores.items()})
    verdicts = numerics.judge({n: t.cpu() for n, t in found.items()}, plain, exact, given[0].dtype)
    assert all(v.good for v in verdicts), [v for v in verdicts if not v.good]
    return found


def variations(function: Any, given: list[Tensor]) -> dict[str, Tensor]:
    """Results at four scales, stacked: a loss is a single number, whose error in plain PyTorch is a matter of luck."""
    image, text, scale, bias = given
    each = [results(function, [image, text, scale - 0.25 * i, bias + 0.5 * i]) for i in range(4)]
    return {name: torch.stack([found[name] for found in each]) for name in each[0]}


def textbook(kind: str) -> Any:
    """As people write it, one product for each direction."""

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        image, text = image.float(), text.float()
        captions = len(text) // len(image)
        own = torch.eye(len(image)).repeat_interleave(captions, 1)
        logits = scale.exp() * image @ text.T
        if kind == "sigmoid":
            return -F.logsigmoid((2 * own - 1) * (logits + bias)).sum() / len(text)
        to_image = scale.exp() * text @ image.T
        return (F.cross_entropy(logits, own / captions) + F.cross_entropy(to_image, own.T)) / 2 + 0 * bias

    return loss


def half_textbook(kind: str) -> Any:
    """As a GPU does it in a half type: rounded logits."""

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        captions = len(text) // len(image)
        own = torch.eye(len(image), device=image.device).repeat_interleave(captions, 1)
        logits = scale.exp() * (image @ text.T).float()
        if kind == "sigmoid":
            return -F.logsigmoid((2 * own - 1) * (logits + bias)).sum() / len(text)
        return (F.cross_entropy(logits, own / captions) + F.cross_entropy(logits.T, own.T)) / 2 + 0 * bias

    return loss


@pytest.fixture(scope="module")
def open_clip() -> Any:
    return importlib.import_module("open_clip.loss")


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("pairs", [1, 5, 97])
def test_equals_open_clip(open_clip: Any, pairs: int, backend: str) -> None:
    """Losses and all gradients of ClipLoss and SigLipLoss, in fp64. open_clip takes the multiplier, ours its log."""
    losses = {"softmax": open_clip.ClipLoss(), "sigmoid": open_clip.SigLipLoss()}
    given = inputs(pairs, 33, dtype=torch.float64)
    for kind, theirs in losses.items():
        found = results(ours(kind, backend), given)
        expected = results(lambda i, t, s, b, theirs=theirs: theirs(i, t, s.exp(), b), given)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=f"{kind} {name}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pairs", "width", "captions"), [(1, 1, 1), (4, 3, 3), (3, 5, 1)])
def test_gradients_of_the_definition(kind: str, pairs: int, width: int, captions: int) -> None:
    leaves = [t.requires_grad_() for t in inputs(pairs, width, captions, torch.float64)]
    for backend in ("reference", "eager"):
        assert torch.autograd.gradcheck(ours(kind, backend), leaves, rtol=1e-5)
    assert torch.autograd.gradgradcheck(ours(kind, "reference"), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("pairs", "width", "captions", "scale"),
    [(1, 1, 1, 0.3), (97, 59, 1, 2.3), (31, 64, 5, 3.0), (1025, 96, 1, 4.605)],
)
def test_chunks_are_exact(
    pairs: int,
    width: int,
    captions: int,
    scale: float,
    kind: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several chunks with an uneven last one, the first of them kept; multiplier up to CLIP's 100."""
    monkeypatch.setattr(eager, "CHUNK_BYTES", {"cpu": 7 * pairs * captions * dtype.itemsize})
    monkeypatch.setattr(eager, "KEPT_BYTES", {"cpu": 15 * pairs * captions * dtype.itemsize})
    check(inputs(pairs, width, captions, dtype, scale), kind, "eager")


@settings(max_examples=40, deadline=None)
@given(
    pairs=st.integers(1, 40), width=st.integers(1, 70), captions=st.integers(1, 3),
    scale=st.floats(-2.0, 4.7), kind=st.sampled_from(KINDS), rows=st.integers(1, 9), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_size(
    pairs: int, width: int, captions: int, scale: float, kind: str, rows: int, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "CHUNK_BYTES", {"cpu": rows * pairs * captions * 8})
        given = inputs(pairs, width, captions, torch.float64, scale, seed)
        exact = results(ours(kind, "reference"), given)
        for name, value in results(ours(kind, "eager"), given).items():
            torch.testing.assert_close(value, exact[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [30.0, 1e-3, 3e4])
def test_rows_that_have_no_unit_length(kind: str, factor: float) -> None:
    """Logits beyond what exponentials hold: as torch's own log-softmax and log-sigmoid."""
    given = inputs(41, 16, dtype=torch.float64)
    given[0] *= factor
    given[1][::2] *= -factor
    exact = results(ours(kind, "reference"), given)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        found = results(ours(kind, "eager"), [t.to(dtype) for t in given])
        for name, value in found.items():
            scale = exact[name].abs().max().item() + 1e-12
            assert (value.double() - exact[name]).abs().max().item() <= tolerance * scale, (name, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_rows_and_the_same_bits_twice(kind: str) -> None:
    image, text, *scalars = inputs(53, 20)
    strided = [image.T.contiguous().T, text.repeat(1, 2)[:, :20], *scalars]
    assert not strided[0].is_contiguous() and not strided[1].is_contiguous()
    first, second = (results(ours(kind, "eager"), strided) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    check(strided, kind, "eager")


@pytest.mark.parametrize("kind", KINDS)
def test_memory_grows_with_the_rows_not_the_pairs(kind: str) -> None:
    """No more than the gradients twice, and the chunks: 4,096 pairs have 64 MB of logits."""
    from bench.measure import peak_memory

    leaves = [t.requires_grad_() for t in inputs(4096, 16)]
    used = peak_memory(lambda: torch.autograd.grad(ours(kind, "eager")(*leaves), leaves), "cpu")
    gradients = sum(t.numel() * 4 for t in leaves)
    assert used < 3 * gradients + eager.KEPT_BYTES["cpu"] + 3 * eager.CHUNK_BYTES["cpu"]


@pytest.mark.parametrize("kind", KINDS)
def test_half_gradients_do_not_underflow(kind: str) -> None:
    """fp16 with a loss scale, as torch.amp.GradScaler has: small gradients come back as large as they should."""
    given = inputs(512, 16, dtype=torch.float16, scale=0.0)
    small = results(ours(kind, "eager"), given, factor=2.0**10)
    exact = results(ours(kind, "reference"), [t.double() for t in given], factor=2.0**10)
    error = (small["image"].double() - exact["image"]).norm() / exact["image"].norm()
    assert error < 1e-3


def test_only_the_gradients_that_are_asked_for() -> None:
    image, text, scale, bias = inputs(9, 8)
    text.requires_grad_()
    loss = contrastive_loss(image, text, scale, bias)
    loss.backward()
    assert text.grad is not None and image.grad is None and scale.grad is None
    assert not contrastive_loss(image, text.detach(), scale).requires_grad
    with torch.no_grad():
        assert torch.equal(contrastive_loss(image, text, scale, bias), loss)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_no_pairs_give_zero(kind: str, backend: str) -> None:
    image, text, *scalars = inputs(3, 8)
    found = results(ours(kind, backend), [image[:0], text[:0], *scalars])
    assert found["out"] == 0 and found["image"].shape == (0, 8)
    assert found["logit_scale"] == 0 and found["logit_bias"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_opcheck(kind: str, training: bool) -> None:
    image, text, scale, bias = (t.requires_grad_(training) for t in inputs(6, 5, 2))
    op = torch.ops.auroraio.contrastive_loss.default
    torch.library.opcheck(op, (image, text, scale, bias, kind == "sigmoid", "", False, training))
    torch.library.opcheck(op, (image, text, scale, None, kind == "sigmoid", "", False, training))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_in_one_graph(kind: str) -> None:
    given = inputs(17, 12)
    compiled = torch.compile(ours(kind, "auto"), fullgraph=True, backend="aot_eager")
    plain, found = results(ours(kind, "auto"), given), results(compiled, given)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)


def test_autocast_casts_rows_alone() -> None:
    given = inputs(33, 24)
    low = [given[0].bfloat16(), given[1].bfloat16(), *given[2:]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = contrastive_loss(*given)
    assert found.dtype == torch.float32 and torch.equal(found, contrastive_loss(*low))


def test_activation_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    given = inputs(21, 8)
    plain = results(ours("softmax", "auto"), given)
    again = results(lambda *a: checkpoint(ours("softmax", "auto"), *a, use_reentrant=False), given)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda i, t, s, b: ((i, t[:2], s), {}), ValueError, "2 texts cannot belong to 3 images"),
        (lambda i, t, s, b: ((i[:0], t, s), {}), ValueError, "3 texts cannot belong to 0 images"),
        (lambda i, t, s, b: ((i, t[:, :4], s), {}), ValueError, r"got \[3, 8\] and \[3, 4\]"),
        (lambda i, t, s, b: ((i[None], t, s), {}), ValueError, r"must be \[N, D\]"),
        (lambda i, t, s, b: ((i, t.half(), s), {}), TypeError, "float32 and torch.float16"),
        (lambda i, t, s, b: ((i.int(), t.int(), s), {}), TypeError, "got torch.int32"),
        (lambda i, t, s, b: ((i, None, s), {}), TypeError, "text must be a torch.Tensor, got NoneType"),
        (lambda i, t, s, b: ((i, t, s[None]), {}), ValueError, r"logit_scale .* got \[1\]"),
        (lambda i, t, s, b: ((i, t, 2.3), {}), ValueError, "logit_scale .* got 2.3"),
        (lambda i, t, s, b: ((i, t, s, b.int()), {}), TypeError, "logit_bias must be floating point"),
        (lambda i, t, s, b: ((i, t, s), {"kind": "hinge"}), ValueError, "'sigmoid' or 'softmax', got 'hinge'"),
        (lambda i, t, s, b: ((i, t.to("meta"), s), {}), ValueError, "text must be on image's device cpu, got meta"),
        (lambda i, t, s, b: ((i, t, s), {"backend": "sdpa"}), ValueError, "unknown backend 'sdpa'"),
        (lambda i, t, s, b: ((i, t, s), {"backend": "fast"}), ValueError, "unknown backend 'fast'"),
    ],
)  # fmt: skip
def test_refusals(change: Any, error: type[Exception], said: str) -> None:
    arguments, options = change(*inputs(3, 8))
    with pytest.raises(error, match=said):
        contrastive_loss(*arguments, **options)


def test_explained() -> None:
    choice = kernels.explain(contrastive_loss, *inputs(3, 8))
    assert choice.backend == "eager" and set(choice.others) == {"reference", "triton"}
    assert set(kernels.available_backends()["contrastive_loss"]) == {"reference", "eager", "triton"}
    assert kernels.available_backends()["window_attention"]["sdpa"] is None


def test_second_derivatives_are_refused() -> None:
    image, text, scale, _ = inputs(4, 8)
    image.requires_grad_()
    loss = contrastive_loss(image, text, scale) + image.square().sum()
    with pytest.raises(RuntimeError, match="only backend 'reference' can be differentiated twice"):
        torch.autograd.grad(loss, image, create_graph=True)


def test_many_pairs_that_pull_at_one_text_do_not_overflow_float16() -> None:
    """N times the gradient would: kept in float32, it is divided by N first."""
    image = torch.nn.functional.normalize(torch.ones(2048, 16), dim=1).half()
    text = image.clone().requires_grad_()
    scale = torch.tensor(100.0).log()
    contrastive_loss(image, text, scale, torch.tensor(0.0), kind="sigmoid").backward()
    wide = text.detach().double().requires_grad_()
    contrastive_loss(
        image.double(), wide, scale.double(), torch.tensor(0.0).double(), kind="sigmoid", backend="reference"
    ).backward()
    assert text.grad is not None and text.grad.isfinite().all() and text.grad.dtype == torch.float16
    torch.testing.assert_close(text.grad.double(), wide.grad, rtol=2e-3, atol=1e-4)


# ---- over ranks


def over_ranks() -> dict[str, Any]:
    """What each process does: its part of the batch; then batches of different numbers."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}
    for kind in KINDS:
        for captions in (1, 2):
            image, text, scale, bias = inputs(6, 9, captions, torch.float64)
            mine = [image.chunk(size)[rank], text.chunk(size)[rank], scale, bias]
            found[f"{kind}{captions}"] = results(
                lambda *a, kind=kind: contrastive_loss(*a, kind=kind, group=dist.group.WORLD), mine, 1.0
            )
    group = dist.group.WORLD
    compiled = torch.compile(
        lambda *a: contrastive_loss(*a, group=group), fullgraph=True, backend="aot_eager"
    )
    found["compiled"] = results(compiled, mine, 1.0)
    found["called"] = results(lambda *a: contrastive_loss(*a, group=group), mine, 1.0)
    messages = []
    image, text, scale, bias = inputs(4, 8)
    for images, texts in (
        (4 - (rank == 0), 4 - (rank == 0)),
        (4, 4 - (rank == 0)),
        (0 if rank == 0 else 4,) * 2,
    ):
        try:
            contrastive_loss(image[:images], text[:texts], scale, group=dist.group.WORLD)
        except ValueError as error:
            messages.append(str(error))
    found["messages"] = messages
    dist.barrier()
    dist.destroy_process_group()
    return {n: {k: v.tolist() for k, v in r.items()} if isinstance(r, dict) else r for n, r in found.items()}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_together_are_one_process(size: int) -> None:
    """The mean of the losses, the gradients at embeddings over the number of ranks, the mean of the others'."""
    every = Launch(size, over_ranks).results()
    for kind in KINDS:
        for captions in (1, 2):
            whole = results(ours(kind, "reference"), inputs(6, 9, captions, torch.float64), 1.0)
            parts = [
                {n: torch.tensor(v, dtype=torch.float64) for n, v in every[rank][f"{kind}{captions}"].items()}
                for rank in range(size)
            ]
            for name, value in whole.items():
                rows = name in ("image", "text")
                found = [part[name] for part in parts]
                mean = torch.cat(found) / size if rows else torch.stack(found).mean(0)
                torch.testing.assert_close(
                    mean, value, rtol=1e-10, atol=1e-12, msg=f"{kind} {captions} {name}"
                )
    for rank in range(size):
        assert every[rank]["compiled"] == every[rank]["called"]
        told = every[rank]["messages"]
        assert len(told) == (3 if size > 1 else 1)
        assert size == 1 or all(
            "every rank must bring as many pairs of one kind" in message for message in told
        )
        assert size == 1 or "[3, 8], float32, sigmoid, without gradients; rank 1: image [4, 8]" in told[0]
