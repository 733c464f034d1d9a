"""Norms, gates and rotary positions: torch's side against formulas in float64, Liger's in the interpreter and on a GPU, and
which of them would run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreter import interpreter, on_each_device  # noqa: F401
from torch import Tensor

from kernels import fused
from kernels.backend import BackendError
from models import AURORA_SIZES, Aurora
from models.layers import RMSNorm, rotary_angles

Formula = Callable[..., Tensor]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + 1e-6) ** -0.5 * weight


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def gelu_gate(gate: Tensor, up: Tensor) -> Tensor:
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + (torch.exp(2 * inner) - 1) / (torch.exp(2 * inner) + 1)) * up


def turned(q: Tensor, k: Tensor) -> Tensor:
    """As complex numbers: the pair (x[i], x[i + d/2]) times e^(i position frequency)."""
    half = q.shape[-1] // 2
    position = torch.arange(q.shape[1], dtype=torch.float64)[:, None, None]
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    factor = torch.polar(torch.ones(q.shape[1], 1, half, dtype=torch.float64), position * frequency)
    pairs = [
        torch.complex(x[..., :half], x[..., half:]) * factor for x in (q.double().cpu(), k.double().cpu())
    ]
    return torch.cat([part for pair in pairs for part in (pair.real, pair.imag)], -1)


def rotary(backend: str) -> Formula:
    def run(q: Tensor, k: Tensor) -> Tensor:
        cos, sin = (part.to(q.dtype) for part in rotary_angles(q.shape[1], q.shape[-1], q.device))
        return torch.cat(fused.rotary(q, k, cos, sin, backend=backend), -1)

    return run


def pairs(backend: str) -> dict[str, tuple[Formula, Formula, tuple[tuple[int, ...], ...]]]:
    """name -> (ours, the formula, shapes of the inputs)."""
    return {
        "rms_norm": (lambda x, w: fused.rms_norm(x, w, 1e-6, backend=backend), rms, ((3, 5, 12), (12,))),
        "swiglu": (lambda a, b: fused.swiglu(a, b, backend=backend), silu_gate, ((3, 5, 12), (3, 5, 12))),
        "geglu": (lambda a, b: fused.geglu(a, b, backend=backend), gelu_gate, ((3, 5, 12), (3, 5, 12))),
        "rotary": (rotary(backend), turned, ((2, 5, 3, 8), (2, 5, 3, 8))),
    }


def compare(name: str, backend: str, device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Values and gradients, the latter twice from one graph, and the inputs as they were."""
    ours, formula, shapes = pairs(backend)[name]
    exact = [torch.randn(shape).to(dtype).double().requires_grad_() for shape in shapes]
    mine = [t.detach().to(device, dtype).requires_grad_() for t in exact]
    before = [t.detach().clone() for t in mine]
    expected, found = formula(*exact), ours(*mine)
    cotangent = torch.randn(expected.shape).to(dtype)
    close: dict[str, Any] = {
        "rtol": tolerance,
        "atol": tolerance,
        "check_dtype": False,
        "check_device": False,
    }
    torch.testing.assert_close(found, expected, **close)
    wanted = torch.autograd.grad(expected, exact, cotangent.double())
    for keep in (True, False):
        got = torch.autograd.grad(found, mine, cotangent.to(found), retain_graph=keep)
        torch.testing.assert_close(got, wanted, **close)
        if keep:
            assert all(torch.equal(a, b) for a, b in zip(mine, before, strict=True))


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "geglu", "rotary"])
def test_torchs_side_is_the_formula(name: str) -> None:
    compare(name, "torch", "cpu", torch.float32, 1e-5)


@pytest.mark.usefixtures("interpreter")
@on_each_device
def test_ligers_side_is_the_formula(device: str) -> None:
    """On a GPU alone: RMSNorm, whose backward asks for the number of multiprocessors, and the gates, whose kernels need
    more of numbers and of tanh than the interpreter has."""
    pytest.importorskip("liger_kernel", reason="needs Liger-Kernel: pip install 'auroraio[liger]'")
    torch.use_deterministic_algorithms(False)
    names = ["rotary"] + (["rms_norm", "swiglu", "geglu"] if device == "cuda" else [])
    for name in names:
        compare(name, "liger", device, torch.float32, 1e-5)
        if device == "cuda":
            compare(name, "liger", device, torch.bfloat16, 3e-2)


class OnGpu:
    """What `choose` asks of a tensor."""

    device, is_cuda = torch.device("cuda"), True

    def __init__(self, dtype: torch.dtype = torch.bfloat16, size: int = 4) -> None:
        self.dtype, self.size = dtype, size

    def numel(self) -> int:
        return self.size


def test_which_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "HAS_LIGER", True)
    assert fused.choose(OnGpu())[0] == "liger"  # type: ignore[arg-type]
    assert fused.choose(OnGpu(torch.float64))[0] == fused.choose(OnGpu(size=0))[0] == "torch"  # type: ignore[arg-type]
    assert fused.choose(OnGpu(), "torch") == ("torch", "asked for by name")  # type: ignore[arg-type]
    assert fused.choose(torch.zeros(3))[0] == "torch"
    with pytest.raises(BackendError, match="CUDA devices, got cpu. This can: torch"):
        fused.swiglu(torch.zeros(3), torch.zeros(3), backend="liger")
    with pytest.raises(ValueError, match="unknown backend 'triton'; supported: 'auto', 'torch', 'liger'"):
        fused.rms_norm(torch.zeros(3), torch.ones(3), 1e-6, backend="triton")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "compiler" in fused.choose(OnGpu())[1]  # type: ignore[arg-type]
    monkeypatch.setattr(fused, "HAS_LIGER", False)
    assert "auroraio[liger]" in fused.choose(OnGpu())[1]  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"auroraio\[liger\]"):
        fused.choose(OnGpu(), "liger")  # type: ignore[arg-type]


def test_a_gate_that_overwrites_its_inputs_is_right_twice() -> None:
    """The wrapper around Liger's gates, with a stand-in whose gradients overwrite its inputs as theirs do."""
    overwritten = []

    def forward(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gate, up, gate * up

    def backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        old = gate.clone()
        overwritten.append(gate.data_ptr())
        gate.copy_(grad * up)
        return gate, up.copy_(grad * old)

    leaves = [torch.randn(3, 4, requires_grad=True) for _ in range(2)]
    gate, up = (leaf * 1 for leaf in leaves)
    out = fused._gated(gate, up, forward, backward)
    wanted = (2 * leaves[1], 2 * leaves[0])
    for keep in (True, True, False):
        got = torch.autograd.grad(out, leaves, torch.full((3, 4), 2.0), retain_graph=keep)
        torch.testing.assert_close(got, wanted)
    assert [address == gate.data_ptr() for address in overwritten] == [False, False, True]


def test_the_models_norms_and_gates_go_through_here(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = Aurora(AURORA_SIZES["tiny"])
    kinds = {type(m) for m in model.modules() if isinstance(m, torch.nn.RMSNorm)}
    assert kinds == {RMSNorm}
    called = []
    for name in ("rms_norm", "swiglu", "rotary"):
        real = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, real=real, name=name: (called.append(name), real(*a))[1])
    from models.layers import Block

    Block(16, 8)(torch.randn(2, 3, 16), rotary=rotary_angles(3, 8, torch.device("cpu")))
    assert set(called) == {"rms_norm", "swiglu", "rotary"}


def test_rms_norm_of_bfloat16_beside_float32_weights() -> None:
    """As under autocast on a CPU: rounded once, and torch has nothing to warn of."""
    x, weight = torch.randn(3, 5, 64).bfloat16().requires_grad_(), torch.rand(64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = fused.rms_norm(x, weight, 1e-6)
    wide = x.detach().double()
    truth = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.detach().double()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), truth, rtol=2**-8, atol=1e-6)
    d_x, d_weight = torch.autograd.grad(out.float().sum(), (x, weight))
    assert d_x.dtype == torch.bfloat16 and d_weight.dtype == torch.float32
