"""Learning rate, AdamW and the moving average against torch's own and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from micro import MODEL

from models import Aurora
from train.config import OptimConfig
from train.optim import Ema, load_optimizer_tensors, lr_at, optimizer_tensors
from train.optimizers import build_optimizer


def test_schedule_is_torchs_linear_then_cosine() -> None:
    """torch.optim.lr_scheduler: LinearLR over the warm-up, CosineAnnealingLR to the last step."""
    steps, config = 60, OptimConfig(lr=2e-3, final_lr=1e-5, warmup=12)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    linear = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 12, 1.0, total_iters=11)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - 1 - 12, eta_min=config.final_lr)
    expected = []
    for step in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < 11:
            linear.step()
        elif step >= 12:
            cosine.step()
    assert [lr_at(step, steps, config) for step in range(steps)] == pytest.approx(expected, rel=1e-9)


def test_schedule_at_its_corners() -> None:
    config = OptimConfig(lr=1.5e-4, final_lr=1e-6, warmup=5_000)
    assert lr_at(0, 976_563, config) == pytest.approx(1.5e-4 / 5_000)
    assert lr_at(4_999, 976_563, config) == lr_at(5_000, 976_563, config) == 1.5e-4
    assert lr_at(976_562, 976_563, config) == pytest.approx(1e-6)
    middle = (5_000 + 976_562) // 2
    assert lr_at(middle, 976_563, config) == pytest.approx((1.5e-4 + 1e-6) / 2, rel=1e-5)


def test_schedule_without_warmup_and_of_one_step() -> None:
    assert lr_at(0, 10, OptimConfig(lr=1.0, final_lr=0.5, warmup=0)) == 1.0
    assert lr_at(0, 1, OptimConfig(lr=1.0, final_lr=0.5, warmup=0)) == 1.0


def make_adamw(model: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    return build_optimizer(model, config, torch.device("cpu")).optimizer


def gradients(model: Aurora, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_adamw_is_the_paper() -> None:
    """Against the update of arXiv:1711.05101, algorithm 2, written out in fp64; decay on matrices only."""
    torch.manual_seed(0)
    model = Aurora(MODEL)
    config = OptimConfig(lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    optimizer = make_adamw(model, config)
    assert optimizer.defaults["fused"]
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in expected.items()}
    v = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(1, 4):
        gradients(model, step)
        for name, p in model.named_parameters():
            g = p.grad.double()
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.98 * v[name] + 0.02 * g * g
            direction = m[name] / (1 - 0.9**step) / ((v[name] / (1 - 0.98**step)).sqrt() + 1e-8)
            expected[name] -= 1e-2 * (direction + decays[id(p)] * expected[name])
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p.double(), expected[name], rtol=1e-5, atol=1e-6), name
    assert {decays[id(model.encoder.stem.weight)], decays[id(model.encoder.stem.bias)]} == {0.1, 0.0}


def test_optimizer_state_goes_through_names() -> None:
    torch.manual_seed(0)
    model, other = Aurora(MODEL), Aurora(MODEL)
    other.load_state_dict(model.state_dict())
    optimizer, fresh = make_adamw(model, OptimConfig()), make_adamw(other, OptimConfig())
    gradients(model, 0)
    optimizer.step()
    other.load_state_dict(model.state_dict())
    tensors, groups = optimizer_tensors(optimizer, model)
    load_optimizer_tensors(fresh, other, {name: tensor.clone() for name, tensor in tensors.items()}, groups)
    for m in (model, other):
        gradients(m, 1)
    optimizer.step()
    fresh.step()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_optimizer_state_of_another_model_is_refused() -> None:
    model = Aurora(MODEL)
    optimizer = make_adamw(model, OptimConfig())
    tensors, groups = optimizer_tensors(optimizer, model)
    groups[0]["params"] = groups[0]["params"][1:]
    with pytest.raises(ValueError, match="other parameters"):
        load_optimizer_tensors(optimizer, model, tensors, groups)


def test_average_is_the_closed_form() -> None:
    """After n updates with weights w1..wn: the weighted sum with the warmed-up decays."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    ema = Ema(model, 0.5)
    expected = 1.0
    for n, value in enumerate([3.0, -2.0, 7.0, 0.25, 8.0, 1.0, 5.0, 4.0, 2.0, 9.0, 6.0]):
        model.weight.data.fill_(value)
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    assert ema.weights["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_average_is_applied_and_taken_back_exactly() -> None:
    model = torch.nn.Linear(3, 3)
    ema = Ema(model, 0.9)
    before = model.weight.detach().clone()
    model.weight.data.mul_(math.pi)
    own = model.weight.detach().clone()
    ema.update(model)
    with pytest.raises(RuntimeError, match="inside"), ema.applied(model):
        assert torch.equal(model.weight, ema.weights["weight"])
        assert not torch.equal(model.weight, own)
        raise RuntimeError("inside")
    assert torch.equal(model.weight, own)
    assert not torch.equal(own, before)
