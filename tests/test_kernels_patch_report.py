"""accelerate: what it says, what it leaves and why, and the calls that take a library's own path."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

import pytest
import torch
from swins import ALL, FITS, LAYERS, LIBRARIES, PADS, SMALLER, build, counted, images, outcome, small, timm
from torch import Tensor, nn

from kernels import accelerate, restore
from kernels.accelerated import base
from kernels.backend import BackendError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return counted(monkeypatch)


@pytest.fixture(autouse=True)
def every_warning_is_an_error() -> Iterator[None]:
    base.ANNOUNCED.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was accelerated.*")
        yield


# ---- the report


def test_report_reads_well() -> None:
    model, _ = small("timm")
    model.layers[1].blocks[0].attn.attn_drop.p = 0.1
    model.add_module("text", nn.TransformerEncoderLayer(8, 2))
    assert str(accelerate(model, backend="reference")) == (
        "accelerate: 3 of 5 attention modules on window_attention, backend 'reference'\n"
        "  replaced 3 timm SwinTransformerBlock (layers.0.blocks.0, layers.0.blocks.1, layers.1.blocks.1)\n"
        "  left     1 timm SwinTransformerBlock (layers.1.blocks.0): attention dropout is 0.1, and the kernel has "
        "none (attn.attn_drop.p = 0 would do)\n"
        "  left     1 torch MultiheadAttention (text.self_attn): not an attention that is supported"
    )
    assert "AcceleratedSwinTransformerBlock" in repr(model)
    model.layers[1].blocks[0].attn.attn_drop.p = 0.0
    again = accelerate(model)
    assert list(again.replaced) == ["layers.1.blocks.0"] and len(again.already) == 3
    assert "already  3 by an earlier call (layers.0.blocks.0, layers.0.blocks.1, layers.1.blocks.1)" in str(
        again
    )


def test_long_lists_are_cut() -> None:
    model = nn.Sequential(small("torchvision")[0], small("torchvision")[0])
    report = accelerate(model)
    assert len(report.replaced) == 2 * LAYERS
    assert re.search(r"8 torchvision ShiftedWindowAttention \((0\.\S+, ){4}and 4 more\)", str(report))


def test_a_second_call_changes_the_backend_alone(calls: list[str]) -> None:
    model, x = small("transformers", "2")
    first = accelerate(model)
    classes = [type(module) for module in model.modules()]
    second = accelerate(model, backend="reference")
    assert second.already == tuple(first.replaced) and not second.replaced and not second.left
    assert [type(module) for module in model.modules()] == classes
    outcome(model, x)
    assert calls == ["reference"] * LAYERS


# ---- left, and errors


@pytest.mark.parametrize(("library", "version"), ALL)
def test_attention_dropout_is_left(library: str, version: str) -> None:
    option = {
        "timm": "attn_drop_rate",
        "torchvision": "attention_dropout",
        "transformers": "attention_probs_dropout_prob",
    }[library]
    model, _ = small(library, version, **{option: 0.25})
    classes = [type(module) for module in model.modules()]
    with pytest.raises(
        ValueError, match="nothing in .* can run on window_attention.*\n.*\n.*left     4 .*is 0.25"
    ):
        accelerate(model)
    assert [type(module) for module in model.modules()] == classes


class OwnBlock(timm.models.swin_transformer.SwinTransformerBlock):  # type: ignore[misc,name-defined]
    """A subclass that may do anything."""


class OwnAttention(timm.models.swin_transformer.WindowAttention):  # type: ignore[misc,name-defined]
    """Likewise."""


def test_the_unknown_is_left_with_the_reason() -> None:
    model, x = small("timm")
    want = outcome(model, x)[""]
    blocks = [block for stage in model.layers for block in stage.blocks]
    blocks[0].__class__ = OwnBlock
    blocks[1].attn.__class__ = OwnAttention
    del blocks[2].attn.scale
    blocks[2].attn.fused_attn = True  # does without it
    hook = blocks[3].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError) as refused:
        accelerate(model)
    for reason in (
        "OwnBlock (layers.0.blocks.0): a subclass of timm SwinTransformerBlock, which may compute something else",
        "(layers.0.blocks.1): its attn is a test_kernels_patch_report OwnAttention, not the library's own",
        "(layers.1.blocks.0): it has no attn.scale; another version of the library may have none",
        "(layers.1.blocks.1): its attn has a hook, which would no longer be called",
    ):
        assert reason in str(refused.value)
    hook.remove()
    report = accelerate(model)
    assert list(report.replaced) == ["layers.1.blocks.1"] and len(report.left) == 3
    torch.testing.assert_close(outcome(model, x)[""], want, rtol=1e-9, atol=1e-12)


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        accelerate("swin")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"restore: model must be a torch\.nn\.Module, got NoneType"):
        restore(None)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError,
        match="nothing in Linear can run on window_attention or latent_attention; supported: timm's SwinT",
    ):
        accelerate(nn.Linear(2, 2))
    model, _ = small("timm")
    with pytest.raises(
        ValueError, match="accelerate: unknown backend 'fast'; supported: 'auto', 'reference'"
    ):
        accelerate(model, backend="fast")
    with pytest.raises(BackendError, match="accelerate: backend 'flash_attn' cannot run"):
        accelerate(model, backend="flash_attn")
    assert restore(model) == (), "a refused call changed the model"


def test_restore_refuses_a_class_that_came_later() -> None:
    model, _ = small("timm")
    accelerate(model)
    block = model.layers[0].blocks[1]
    wrapped = type("Wrapped", (type(block),), {})
    block.__class__ = wrapped
    with pytest.raises(ValueError, match=r"'layers\.0\.blocks\.1' was given the class Wrapped after"):
        restore(model)
    block.__class__ = wrapped.__mro__[1]
    assert len(restore(model)) == LAYERS


# ---- calls that take the library's own path


@pytest.mark.parametrize("version", ["1", "2"])
def test_attention_weights_come_from_the_library(version: str, calls: list[str]) -> None:
    options = {"attn_implementation": "eager"} if version == "1" else {}
    model, x = small("transformers", version, **options)
    want = model(x, output_attentions=True)
    accelerate(model)
    with pytest.warns(UserWarning, match=r"a call asked for attention weights \(output_attentions\)") as told:
        got = [model(x, output_attentions=True) for _ in range(2)][1]
    assert len([w for w in told if "was accelerated" in str(w.message)]) == 1 and calls == []
    assert len(got.attentions) == 2 and torch.equal(got.logits, want.logits)
    assert all(torch.equal(a, b) for a, b in zip(got.attentions, want.attentions, strict=True))
    model.config.output_attentions = True
    assert len(model(x).attentions) == 2
    model.config.output_attentions = False
    model(x)
    assert calls == ["auto"] * LAYERS


@pytest.mark.parametrize("library", LIBRARIES)
def test_dropout_switched_on_later(library: str, calls: list[str]) -> None:
    model, x = small(library)
    for name in accelerate(model).replaced:
        layer = model.get_submodule(name)
        if library == "timm":
            layer.attn.attn_drop.p = 0.5
        else:
            (layer if library == "torchvision" else layer.attention).attention_dropout = 0.5
    with pytest.warns(
        UserWarning, match="attention dropout has been switched on: the library's own attention"
    ):
        assert not torch.equal(outcome(model, x)[""], outcome(model, x)[""])
    assert calls == []
    outcome(model.eval(), x)
    assert calls == ["auto"] * LAYERS, "without training nothing is dropped"


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_hooks_inside_the_attention_are_called(library: str, calls: list[str]) -> None:
    model, x = small(library)
    layer = model.get_submodule(list(accelerate(model).replaced)[1])
    seen: list[torch.Size] = []
    inner = layer.attn if library == "timm" else layer.attention
    handle = inner.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    with pytest.warns(UserWarning, match="a hook on its 'att.*' waits for windows"):
        outcome(model, x)
    assert seen == [(2 * 9, 16, 16)] and len(calls) == LAYERS - 1
    handle.remove()
    outcome(model, x)
    assert len(calls) == 2 * LAYERS - 1


def test_hooks_on_the_softmax_are_called(calls: list[str]) -> None:
    """Attention maps are usually taken from there."""
    model, x = small("timm")
    layer = model.get_submodule(list(accelerate(model).replaced)[1])
    maps: list[torch.Size] = []
    layer.attn.softmax.register_forward_hook(lambda _module, _args, out: maps.append(out.shape))
    with pytest.warns(UserWarning, match="a hook on its 'attn.softmax' waits for windows"):
        outcome(model, x)
    assert len(maps) == 1 and len(calls) == LAYERS - 1
    restore(model)
    assert "attn.softmax has a hook" in str(accelerate(model))


def test_hooks_on_projections_are_called_and_the_kernel_runs(calls: list[str]) -> None:
    model, x = small("transformers", "2")
    layer = model.get_submodule(list(accelerate(model).replaced)[1])
    want = outcome(model, x)
    layer.attention.self.key.register_forward_hook(
        lambda _module, _args, out: 2 * out
    )  # cosine attention: no matter
    layer.attention.self.value.register_forward_hook(lambda _module, _args, out: 0 * out)
    calls.clear()
    assert not torch.equal(outcome(model, x)[""], want[""]) and len(calls) == LAYERS


class Adapted(nn.Linear):
    """A projection with something added, as adapters (LoRA) do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x.roll(1, -1)


@pytest.mark.parametrize(
    ("library", "version"), [("timm", "1"), ("transformers", "1"), ("transformers", "2")]
)
def test_adapters_in_the_projections_take_part(library: str, version: str, calls: list[str]) -> None:
    """Maps of 10 and 5, windows of 4: shifted and padded. In timm the adapter has to fit three times the width."""
    model, x = small(library, version)
    for module in model.modules():
        for name, child in list(module.named_children()):
            if name in ("q_proj", "query", "value", "v_proj"):
                child.__class__ = Adapted
            elif name == "qkv":
                nn.utils.parametrizations.weight_norm(child)
    want = outcome(model, x)
    accelerate(model)
    got = outcome(model, x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert len(calls) == LAYERS


@pytest.mark.parametrize("options", [{"qkv_bias": False}, {"qkv_bias": True, "separate": True}], ids=str)
def test_hooks_on_the_qkv_layer_of_timm_v2(options: dict[str, bool], calls: list[str]) -> None:
    """timm calls that layer where it has no bias, or keeps it apart."""
    separate = options.pop("separate", False)
    model, x = small("timm", "2", **options)
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = separate
            module.qkv.register_forward_hook(lambda _module, _args, out: out + 0.1 * out.roll(1, -1))
    want = outcome(model, x)
    accelerate(model)
    torch.testing.assert_close(outcome(model, x), want, rtol=1e-9, atol=1e-12)
    assert len(calls) == LAYERS


def test_gradient_checkpointing() -> None:
    for library, switch in (
        ("timm", "set_grad_checkpointing"),
        ("transformers", "activation_checkpointing_enable"),
    ):
        model, x = small(library)
        accelerate(model)
        want = outcome(model, x)
        getattr(model, switch)()
        torch.testing.assert_close(outcome(model, x), want, rtol=1e-12, atol=1e-14)


def added_to(projection: nn.Module, how: str) -> None:
    """Something that a projection does beside its product."""
    whole = projection.forward
    if how == "hook":
        projection.register_forward_hook(lambda _module, _args, out: 0.5 * out + 1)
    elif how == "forward":  # as Hugging Face's accelerate adds its hooks
        projection.forward = lambda x: 0.5 * whole(x) + 1  # type: ignore[method-assign]
    else:  # its weights are other ones at each call in training
        torch.manual_seed(0)
        torch.nn.utils.spectral_norm(projection)


@pytest.mark.parametrize("how", ["hook", "forward", "spectral norm"])
@pytest.mark.parametrize(
    ("library", "version", "names", "case"),
    [
        (*layer, case)
        for case in (FITS, PADS, SMALLER)
        for layer in (
            ("timm", "1", ("qkv",)),
            ("timm", "2", ("qkv",)),
            ("transformers", "1", ("q_proj", "v_proj")),
            ("transformers", "2", ("key", "value")),
        )
        # transformers' own SwinLayer cannot run a map that is smaller than its window
        if (layer[:2], case) != (("transformers", "1"), SMALLER)
    ],
)
def test_projections_that_do_more_are_called_once_with_their_padding(
    library: str, version: str, names: tuple[str, ...], how: str, case: tuple[int, int], calls: list[str]
) -> None:
    """Padding is zeros before the projections, and takes part as keys with what these make of it."""
    options = {"qkv_bias": False} if (library, version) == ("timm", "2") else {}  # else timm does not call it
    found, asked = [], []
    for ours in (False, True):
        model = build(library, version, *case, **options).train()
        for name, module in model.named_modules():
            if name.endswith(names):
                added_to(module, how)
                module.register_forward_pre_hook(lambda *_, ours=ours: asked.append(ours))
        if ours:
            accelerate(model)
        found.append(outcome(model, images(case[0])))
    assert len(calls) == LAYERS and asked.count(True) == asked.count(False) == LAYERS * len(names)
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_weights_that_a_hook_brings_are_waited_for(calls: list[str]) -> None:
    """Hugging Face's cpu_offload: modules whose forward is replaced by one that brings their weights, which are on the meta
    device meanwhile. A position bias that is behind such a one is the library's to read."""
    model, x = small("timm", "1")
    accelerate(model)
    want = outcome(model, x)[""]
    attention = next(module for name, module in model.named_modules() if name.endswith("attn"))
    table, whole = attention.relative_position_bias_table, attention.forward

    def bringing(*args: Tensor, **options: Tensor) -> Tensor:
        attention.relative_position_bias_table = table
        return whole(*args, **options)

    attention.relative_position_bias_table = nn.Parameter(table.to("meta"))
    attention.forward = bringing
    calls.clear()
    with pytest.warns(UserWarning, match="a hook on its 'attn' waits for windows"):
        got = outcome(model, x)[""]
    assert len(calls) == LAYERS - 1
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
