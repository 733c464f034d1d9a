"""Which optimizer a run gets, its clipped step against torch's own two calls, and its state through a checkpoint."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import arguments, command, losses
from torch import nn

from train import optimizers
from train.config import ConfigError, OptimConfig
from train.optim import load_optimizer_tensors, optimizer_tensors
from train.optimizers import (
    OptimizerError,
    apex_refusal,
    build_optimizer,
    choose,
    clip_and_step,
    forget_gradients,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HEALTHY = torch.tensor(True)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 5, bias=False), nn.Embedding(3, 4)).to(dtype)


def fill(model: nn.Module, seed: int, size: float) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, generator=g) * size).to(p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_step_is_torchs_clip_and_adamw(dtype: torch.dtype, clip: float) -> None:
    """Over 60 steps, with norms on both sides of the limit: norms, weights and moments, against clip_grad_norm_ and
    torch.optim.AdamW's own loop."""
    ours, theirs = network(dtype), network(dtype)
    config = OptimConfig(betas=(0.9, 0.98), weight_decay=0.1)
    optimizer = build_optimizer(ours, config, CPU).optimizer
    decay = {p.ndim > 1 and not isinstance(m, nn.Embedding) for m in theirs for p in m.parameters()}
    assert decay == {True, False}
    groups = [
        {
            "params": [
                p
                for m in theirs
                for p in m.parameters()
                if (p.ndim > 1 and not isinstance(m, nn.Embedding)) == on
            ],
            "weight_decay": 0.1 if on else 0.0,
        }
        for on in (True, False)
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8, foreach=False, fused=False)
    exact = dtype == torch.float32
    clipped = 0
    for step in range(60):
        size = 10 ** (-2.5 + 2 * ((step * 7) % 5) / 4)
        fill(ours, step, size), fill(theirs, step, size)
        lr = 1e-3 * (1 + step % 3)
        found = clip_and_step(optimizer, lr, clip, HEALTHY)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), clip or float("inf"))
        clipped += bool(expected > 1)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        torch.testing.assert_close(found, expected.float(), rtol=1e-5 if exact else 1e-2, atol=0)
    assert 10 < clipped < 50
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        if exact:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:  # roundings of bf16 weights differ by one unit now and then, 60 times
            assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()
        for moment in ("exp_avg", "exp_avg_sq"):
            x, y = (o.state[p][moment].float() for o, p in ((optimizer, a), (reference, b)))
            assert (x - y).norm() < (1e-5 if exact else 0.03) * y.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("kind", ["torch", "torch-8bit"])
def test_a_step_that_is_not_finite_is_none(kind: str, where: str, bad: float) -> None:
    """Weights, moments and the count of steps stay; the next step is as if nothing had been."""
    if kind == "torch-8bit":
        pytest.importorskip("torchao", reason="needs torchao: pip install 'auroraio[torchao]'")
    skipping, other = network(), network()
    one, two = (build_optimizer(m, OptimConfig(kind=kind), CPU).optimizer for m in (skipping, other))
    for step in range(4):
        fill(skipping, step, 0.1), fill(other, step, 0.1)
        if step != 2:
            clip_and_step(one, 1e-2, 1.0, HEALTHY), clip_and_step(two, 1e-2, 1.0, HEALTHY)
            continue
        if where == "gradient":
            next(skipping.parameters()).grad[0, 0] = bad
        norm = clip_and_step(one, 1e-2, 1.0, torch.tensor(where == "gradient"))
        assert torch.isfinite(norm) == (where == "loss")
    for p, q in zip(skipping.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert one.state[p]["step"] == two.state[q]["step"] == 3


def test_skipping_needs_no_look_at_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's step is clipped and skipped on the device: nothing is read on the host."""
    model = network()
    optimizer = build_optimizer(model, OptimConfig(kind="torch"), CPU).optimizer
    fill(model, 0, 1.0)

    def refuse(*_: Any) -> None:
        raise AssertionError("a tensor was read on the host")

    for name in ("item", "__bool__", "__float__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    clip_and_step(optimizer, 1e-3, 1.0, HEALTHY)


def test_parameters_without_gradients_stay() -> None:
    model = network()
    optimizer = build_optimizer(model, OptimConfig(), CPU).optimizer
    assert clip_and_step(optimizer, 1e-3, 1.0, HEALTHY) == 0
    before = model[1].weight.clone()
    fill(model, 0, 1.0)
    model[1].weight.grad = None
    clip_and_step(optimizer, 1e-3, 1.0, HEALTHY)
    assert torch.equal(before, model[1].weight)


# ---- which one


class Finder:
    """A package apex as some wheel would leave it, without anything to import."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str) -> importlib.machinery.ModuleSpec | None:
        if name == "apex":
            spec = importlib.machinery.ModuleSpec("apex", None, is_package=True)
            spec.submodule_search_locations = [str(self.folder / "apex")]
            return spec
        if name == "amp_C":
            made = (self.folder / "amp_C.so").exists()
            return importlib.machinery.ModuleSpec("amp_C", None) if made else None
        return importlib.util.find_spec(name)


def test_apex_is_nvidias_or_is_said_not_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four states of an environment; nothing is imported to tell them apart."""
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    assert "not installed" in str(apex_refusal(GPU)) and "github.com/NVIDIA/apex" in str(apex_refusal(GPU))
    monkeypatch.setattr(optimizers, "find_spec", Finder(tmp_path))
    (tmp_path / "apex").mkdir()
    monkeypatch.setattr(optimizers, "version", lambda name: "0.9.10dev")
    assert "the apex that is installed (apex 0.9.10dev) is another project" in str(apex_refusal(GPU))
    (tmp_path / "apex/optimizers").mkdir()
    (tmp_path / "apex/optimizers/fused_adam.py").touch()
    assert "without its CUDA extensions" in str(apex_refusal(GPU))
    (tmp_path / "amp_C.so").touch()
    assert apex_refusal(GPU) is None and "CUDA devices, got cpu" in str(apex_refusal(CPU))
    assert choose("auto", GPU)[0] == choose("apex", GPU)[0] == "apex"
    kind, why = choose("auto", CPU)
    assert kind == "torch" and "got cpu" in why


def test_a_named_one_is_never_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptimizerError, match="'apex' cannot run here.*These can: torch"):
        build_optimizer(network(), OptimConfig(kind="apex"), CPU)
    with pytest.raises(
        ConfigError, match="optim.kind is 'sgd'; supported: 'auto', 'torch', 'apex', 'torch-8bit'"
    ):
        choose("sgd", CPU)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(OptimizerError, match=r"auroraio\[torchao\]"):
        choose("torch-8bit", CPU)
    assert choose("torch", CPU) == ("torch", "asked for by name")


class FusedAdam(torch.optim.Optimizer):
    """Stands in for apex's, which counts its steps in its groups: the textbook's AdamW."""

    def __init__(self, groups: Any, adam_w_mode: bool, **settings: Any) -> None:
        assert adam_w_mode
        super().__init__(groups, {"weight_decay": 0.0, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            n = group["step"] = group.get("step", 0) + 1
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                m = state["exp_avg"].lerp_(p.grad, 1 - b1)
                v = state["exp_avg_sq"].lerp_(p.grad.square(), 1 - b2)
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(lr * m / (1 - b1**n) / ((v / (1 - b2**n)).sqrt() + group["eps"]))

    def zero_grad(self) -> None:  # type: ignore[override]
        """apex's takes no set_to_none."""
        super().zero_grad()


FusedAdam.__module__ = "apex.optimizers.fused_adam"


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("apex.optimizers")
    module.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    monkeypatch.setattr(optimizers, "apex_refusal", lambda device: None)


def test_gradients_are_forgotten_whatever_the_optimizer(apex: None) -> None:
    model = network()
    optimizer = build_optimizer(model, OptimConfig(kind="apex"), CPU).optimizer
    with pytest.raises(TypeError):
        optimizer.zero_grad(set_to_none=True)
    fill(model, 0, 0.1)
    forget_gradients(optimizer)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["torch", "apex", "torch-8bit"])
def test_state_goes_through_names(kind: str, apex: None) -> None:
    """Three steps, into tensors and JSON and back, three more: the same bits as six."""
    if kind == "torch-8bit":
        pytest.importorskip("torchao", reason="needs torchao: pip install 'auroraio[torchao]'")
    models = [network(), network()]
    first, fresh = (build_optimizer(m, OptimConfig(kind=kind), CPU).optimizer for m in models)
    for step in range(3):
        fill(models[0], step, 0.1)
        clip_and_step(first, 1e-2, 1.0, HEALTHY)
    tensors, groups = optimizer_tensors(first, models[0])
    assert all(type(t) is torch.Tensor for t in tensors.values())
    assert ("exp_avg/codes.0.weight" in tensors) == (kind == "torch-8bit")
    models[1].load_state_dict(models[0].state_dict())
    load_optimizer_tensors(fresh, models[1], {name: t.clone() for name, t in tensors.items()}, groups)
    for step in range(3, 6):
        for model, optimizer in zip(models, (first, fresh), strict=True):
            fill(model, step, 0.1)
            clip_and_step(optimizer, 1e-2, 1.0, HEALTHY)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("old", "new"), [("torch", "torch-8bit"), ("torch-8bit", "torch"), ("apex", "torch")]
)
def test_state_of_another_kind_is_refused(old: str, new: str, apex: None) -> None:
    pytest.importorskip("torchao", reason="needs torchao: pip install 'auroraio[torchao]'")
    model = network()
    optimizer = build_optimizer(model, OptimConfig(kind=old), CPU).optimizer
    fill(model, 0, 0.1)
    clip_and_step(optimizer, 1e-2, 1.0, HEALTHY)
    other = build_optimizer(model, OptimConfig(kind=new), CPU).optimizer
    with pytest.raises(ValueError, match="--optim.kind was another then"):
        load_optimizer_tensors(other, model, *optimizer_tensors(optimizer, model))


def test_eight_bits_are_near_whole_ones() -> None:
    pytest.importorskip("torchao", reason="needs torchao: pip install 'auroraio[torchao]'")
    small, whole = network(), network()
    start = [p.detach().clone() for p in whole.parameters()]
    one = build_optimizer(small, OptimConfig(kind="torch-8bit"), CPU).optimizer
    two = build_optimizer(whole, OptimConfig(kind="torch"), CPU).optimizer
    assert any("8bit" in type(t).__name__.lower() for t in [one._new_buffer(next(small.parameters()), True)])
    for step in range(10):
        fill(small, step, 0.1), fill(whole, step, 0.1)
        clip_and_step(one, 1e-2, 1.0, HEALTHY), clip_and_step(two, 1e-2, 1.0, HEALTHY)
    for p, q, before in zip(small.parameters(), whole.parameters(), start, strict=True):
        assert (p - q).norm() < 0.1 * (q - before).norm()


@pytest.mark.slow
def test_runs_with_eight_bits_go_on_exactly(tmp_path: Path) -> None:
    """The command, stopped and resumed through its checkpoint; its first lines say which optimizer runs."""
    pytest.importorskip("torchao", reason="needs torchao: pip install 'auroraio[torchao]'")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = (
        "--optim.kind",
        "torch-8bit",
        "--optim.final-lr",
        "1e-3",
        "--optim.lr",
        "1e-3",
        "--optim.warmup",
        "1",
    )
    run = ("-m", "train.pretrain")
    done = command(*run, *arguments(whole, "--steps", "4", *options))
    assert done.returncode == 0, done.stderr
    assert "optimizer   torchao's AdamW8bit (asked for by name)" in done.stdout + done.stderr
    assert command(*run, *arguments(parts, "--steps", "2", *options)).returncode == 0
    again = command(*run, *arguments(parts, "--steps", "4", *options, "--resume", "auto"))
    assert again.returncode == 0, again.stderr
    assert losses(parts) == losses(whole)
