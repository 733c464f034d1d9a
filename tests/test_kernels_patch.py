"""accelerate and restore: every library's own model, before and after, is the oracle."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from swins import (
    ALL,
    COVERED,
    FITS,
    LAYERS,
    LIBRARIES,
    PADS,
    SMALLER,
    build,
    counted,
    hf,
    images,
    outcome,
    small,
)
from torch import Tensor, nn

from kernels import accelerate, restore


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return counted(monkeypatch)


# ---- the same numbers


@pytest.mark.parametrize(
    ("library", "version", "size", "window", "options"),
    [(*which, *sizes, {}) for which in ALL for sizes in (FITS, PADS, COVERED)]
    + [("timm", v, *SMALLER, {"always_partition": True}) for v in "12"]
    + [("torchvision", v, *SMALLER, {}) for v in "12"]
    + [("timm", "2", *SMALLER, {}), ("transformers", "2", *SMALLER, {})]  # these cut their window
    + [("timm", "1", *PADS, {"qkv_bias": False}), ("transformers", "2", *PADS, {"qkv_bias": False})],
)
def test_same_outputs_gradients_and_state(
    library: str, version: str, size: int, window: int, options: dict, calls: list[str]
) -> None:
    model, x = build(library, version, size, window, **options), images(size)
    types, state = [type(m) for m in model.modules()], model.state_dict()
    want = outcome(model, x)
    report = accelerate(model)
    assert len(report.replaced) == LAYERS and report.already == () and dict(report.left) == {}
    now = model.state_dict()
    assert list(now) == list(state) and all(now[k].data_ptr() == state[k].data_ptr() for k in state)
    got = outcome(model, x)
    assert calls == ["auto"] * LAYERS
    assert list(got) == list(want)
    for name, tensor in want.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )

    assert restore(model) == tuple(report.replaced)
    assert [type(m) for m in model.modules()] == types
    assert all(torch.equal(again, want[name]) for name, again in outcome(model, x).items())
    assert len(calls) == LAYERS, "a restored model calls the kernel"
    assert not any("backend" in name for m in model.modules() for name in vars(m))


@pytest.mark.parametrize(("library", "version"), ALL)
def test_float32_by_the_rule(library: str, version: str) -> None:
    """Error against float64: at most twice the library's own in outputs, three times in gradients."""
    model, x = build(library, version, *PADS), images(PADS[0])
    exact = outcome(model, x)
    theirs = outcome(model.float(), x.float())
    accelerate(model)
    ours = outcome(model, x.float())
    for name, truth in exact.items():
        rounded = truth.float()
        atol = 2 * ((rounded + 0.3 - 0.3) - rounded).abs().max().item()
        # A gradient is a sum over tokens: it cannot be expected to do better than float32's epsilon of the largest.
        atol += 1.2e-7 * max(t.abs().max().item() for t in exact.values()) if name else 0.0
        error, allowed = ((t[name].double() - truth).abs().max().item() for t in (ours, theirs))
        assert error <= (3 if name else 2) * allowed + atol, (name, error, allowed, atol)


def test_trains_as_without() -> None:
    """Eight steps of AdamW with kernels on and off: the losses agree, then the weights."""
    losses: dict[bool, list[float]] = {}
    weights: dict[bool, dict[str, Tensor]] = {}
    for on in (False, True):
        model, x = small("timm")
        if on:
            accelerate(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[on] = []
        for _ in range(8):
            loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 2]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[on].append(loss.item())
        weights[on] = model.state_dict()
    assert losses[True][-1] < 0.5 * losses[True][0]
    assert losses[True] == pytest.approx(losses[False], rel=1e-9)
    for name, tensor in weights[False].items():
        torch.testing.assert_close(weights[True][name], tensor, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("layer", ["DonutSwinLayer", "ClapAudioLayer", "MaskFormerSwinLayer", "Swin2SRLayer"])
@pytest.mark.parametrize("shift", [0, 3])
def test_other_transformers_layers(layer: str, shift: int, calls: list[str]) -> None:
    from transformers.models.clap import modeling_clap
    from transformers.models.donut import modeling_donut_swin
    from transformers.models.maskformer import modeling_maskformer_swin
    from transformers.models.swin2sr import modeling_swin2sr

    files = (modeling_clap, modeling_donut_swin, modeling_maskformer_swin, modeling_swin2sr)
    (cls,) = (getattr(file, layer) for file in files if hasattr(file, layer))
    config = hf.Swin2SRConfig(window_size=7) if layer == "Swin2SRLayer" else hf.DonutSwinConfig(window_size=7)
    module = cls(config, 16, (9, 12), 2, shift_size=shift).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 108, 16, dtype=torch.float64)

    def run() -> list[Tensor]:
        (out,) = module(x, (9, 12))
        return [out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))]

    want = run()
    assert accelerate(module).replaced == {"": f"transformers {layer}"}
    torch.testing.assert_close(run(), want, rtol=1e-9, atol=1e-9)
    assert calls == ["auto"]


# ---- what goes on working


@pytest.mark.parametrize("library", LIBRARIES)
def test_copies_and_pickles_are_accelerated(library: str, calls: list[str]) -> None:
    model, x = small(library)
    accelerate(model, backend="eager")
    want = outcome(model, x)[""]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        calls.clear()
        assert torch.equal(outcome(other, x)[""], want) and calls == ["eager"] * LAYERS
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        assert len(restore(other)) == LAYERS and len(restore(other)) == 0
    assert len(accelerate(model).already) == LAYERS, "restoring a copy restored the original"


@pytest.mark.parametrize(("library", "version"), ALL)
def test_compiles_without_a_graph_break(library: str, version: str) -> None:
    """A shifted layer, map 10 x 10, window 4, forward and backward."""
    model, _ = small(library, version)
    layer = model.get_submodule(list(accelerate(model).replaced)[1])
    shape, more = ((2, 10, 10, 16), ()) if library != "transformers" else ((2, 100, 16), ((10, 10),))
    x = torch.randn(shape, dtype=torch.float64)

    def run(function: Any) -> list[Tensor]:
        out = function(x, *more)
        out = out[0] if isinstance(out, tuple) else out
        return [out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))]

    torch.compiler.reset()
    got = run(torch.compile(layer, fullgraph=True, backend="eager"))
    torch.testing.assert_close(got, run(layer), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("library", "version"), ALL)
def test_autocast(library: str, version: str) -> None:
    model, x = build(library, version, *PADS).float(), images(PADS[0]).float()
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = model(x)
        accelerate(model)
        ours = model(x)
    exact, theirs, ours = (getattr(out, "logits", out).float() for out in (exact, theirs, ours))
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 0.01


def test_feature_extractors_trace_torchvision() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model, _ = small("torchvision", "2")
    want = create_feature_extractor(model, ["features.3"])
    accelerate(model)
    got = create_feature_extractor(model, ["features.3"])
    for size in (40, 72):
        theirs, ours = (extract(images(size))["features.3"] for extract in (want, got))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
