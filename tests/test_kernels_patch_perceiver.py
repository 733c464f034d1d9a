"""accelerate and restore on transformers' Perceiver: the library's own model, before and after, is the oracle."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import accelerate, restore
from kernels.accelerated import base, perceiver

hf = pytest.importorskip("transformers", reason="needs transformers: install the test extra")
modeling = pytest.importorskip(
    "transformers.models.perceiver.modeling_perceiver",
    reason="needs transformers with Perceiver: install the test extra",
)

TOKENS, LATENTS, WIDTH = 9, 5, 16
# The cross-attention, two blocks of the same two layers, the decoder's cross-attention.
MODULES, CALLS = 4, 6


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """(backend, whether there is a key mask) of every call of the kernel from now on."""
    made: list[tuple[str, bool]] = []
    real = perceiver.latent_attention

    def counting(*args: Any, **kwargs: Any) -> Any:
        made.append((kwargs["backend"], kwargs["key_mask"] is not None))
        return real(*args, **kwargs)

    monkeypatch.setattr(perceiver, "latent_attention", counting)
    return made


@pytest.fixture(autouse=True)
def every_warning_is_an_error() -> Iterator[None]:
    base.ANNOUNCED.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was accelerated.*")
        yield


def build(**options: Any) -> nn.Module:
    """A masked language model whose every parameter matters, in float64, training: dqk 4 and dv 8 in the encoder."""
    torch.manual_seed(0)
    sizes = {"num_latents": LATENTS, "d_latents": WIDTH, "d_model": WIDTH, "num_blocks": 2, "vocab_size": 20,
             "num_self_attends_per_block": 2, "num_self_attention_heads": 2, "num_cross_attention_heads": 2,
             "qk_channels": 8, "v_channels": 16, "max_position_embeddings": TOKENS}  # fmt: skip
    config = hf.PerceiverConfig(**sizes, **{"attention_probs_dropout_prob": 0.0, **options})
    model: nn.Module = hf.PerceiverForMaskedLM(config).double()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def ids() -> Tensor:
    return torch.randint(20, (3, TOKENS), generator=torch.Generator().manual_seed(1))


def padding(*lengths: int) -> Tensor:
    return (torch.arange(TOKENS) < torch.tensor(lengths)[:, None]).long()


def outcome(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    """Logits, and the gradients of a sum of them with given weights."""
    logits = model(ids(), **options).logits
    named = dict(model.named_parameters())
    loss = (logits * torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()
    grads = torch.autograd.grad(loss, list(named.values()))
    return {"": logits.detach()} | dict(zip(named, grads, strict=True))


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, tensor in want.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


MASKS = {
    "none": None,
    "ones": padding(TOKENS, TOKENS, TOKENS),
    "padding": padding(9, 4, 1),
    "holes": torch.tensor([[1, 0, 0, 1, 0, 1, 1, 1, 0], [0] * 8 + [1], [1] * 9]),
    "4D, -10000": -1e4 * (1 - padding(9, 4, 1)).double()[:, None, None],
    "4D, -inf": torch.zeros(3, 1, LATENTS, TOKENS).double().masked_fill(padding(9, 4, 1)[:, None, None] == 0, -torch.inf),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", MASKS)
def test_same_outputs_gradients_and_state(kind: str, backend: str, calls: list[tuple[str, bool]]) -> None:
    model, mask = build(), MASKS[kind]
    types, state = [type(m) for m in model.modules()], model.state_dict()
    want = outcome(model, attention_mask=mask)
    report = accelerate(model, backend=backend)
    assert len(report.replaced) == MODULES and not report.left and not report.already
    now = model.state_dict()
    assert list(now) == list(state) and all(now[k].data_ptr() == state[k].data_ptr() for k in state)
    assert_close(outcome(model, attention_mask=mask), want)
    masked = kind not in ("none", "ones")  # the library drops a mask that hides nothing
    assert calls == [(backend, masked)] + [(backend, False)] * (CALLS - 1)

    assert restore(model) == tuple(report.replaced)
    assert [type(m) for m in model.modules()] == types
    again = outcome(model, attention_mask=mask)
    assert all(torch.equal(again[name], want[name]) for name in want) and len(calls) == CALLS
    assert not any("backend" in name for m in model.modules() for name in vars(m))


def test_images_without_a_decoder(calls: list[tuple[str, bool]]) -> None:
    """One cross-attention head of another width than the latents, and self-attention with a mask of its own."""
    config = hf.PerceiverConfig(num_latents=4, d_latents=12, d_model=10, num_blocks=1, attention_probs_dropout_prob=0.0,
                                num_self_attends_per_block=1, num_self_attention_heads=3, num_cross_attention_heads=1,
                                cross_attention_shape_for_attention="q")  # fmt: skip
    model = hf.PerceiverModel(config).double()
    x = torch.randn(2, 30, 10, dtype=torch.float64)
    layer = model.encoder.self_attends[0]
    latents = torch.randn(2, 4, 12, dtype=torch.float64)
    mask = torch.tensor([[0.0, -1e30, 0, 0], [0, 0, 0, -1e30]], dtype=torch.float64)[:, None, None]
    want = model(x).last_hidden_state, layer(latents, attention_mask=mask)[0]
    assert str(accelerate(model)) == (
        "accelerate: 2 of 2 attention modules on latent_attention, backend 'auto'\n"
        "  replaced 2 transformers PerceiverSelfAttention "
        "(encoder.cross_attention.attention.self, encoder.self_attends.0.attention.self)"
    )
    got = model(x).last_hidden_state, layer(latents, attention_mask=mask)[0]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert calls == [("auto", False), ("auto", False), ("auto", True)]


def test_copies_and_hooks_on_projections(calls: list[tuple[str, bool]]) -> None:
    model = build()
    accelerate(model, backend="eager")
    other = copy.deepcopy(model)
    want = outcome(other, attention_mask=padding(9, 4, 1))
    assert calls == [("eager", True)] + [("eager", False)] * (CALLS - 1)
    for module in other.modules():
        if isinstance(module, base.Accelerated):
            module.value.register_forward_hook(lambda _module, _args, out: 2 * out)
    changed = outcome(other, attention_mask=padding(9, 4, 1))
    assert not torch.equal(changed[""], want[""]) and len(calls) == 2 * CALLS
    restore(other)
    assert_close(outcome(other, attention_mask=padding(9, 4, 1)), changed)


# ---- the report


def test_report_of_both_functions() -> None:
    swin = hf.SwinConfig(image_size=16, embed_dim=8, depths=(1,), num_heads=(2,), window_size=4)
    model = nn.ModuleDict({"text": build(), "image": hf.SwinModel(swin)})
    model.text.perceiver.encoder.self_attends[1].attention.self.dropout.p = 0.1
    report = accelerate(model)
    head, *lines = str(report).splitlines()
    assert (
        head
        == "accelerate: 4 of 5 attention modules on window_attention and latent_attention, backend 'auto'"
    )
    assert lines[-1] == (
        "  left     1 transformers PerceiverSelfAttention (text.perceiver.encoder.self_attends.1.attention.self): "
        "attention dropout is 0.1, and the kernel would drop others than the library (dropout.p = 0 would do)"
    )
    assert accelerate(model).functions == ("window_attention", "latent_attention")
    assert len(restore(model)) == 4


def test_dropout_as_configured_by_default_is_left() -> None:
    with pytest.raises(
        ValueError, match=r"or latent_attention; supported(.*\n)+.*left     4 .*dropout is 0\.1"
    ):
        accelerate(build(attention_probs_dropout_prob=0.1))
    with pytest.raises(ValueError, match="transformers's PerceiverSelfAttention"):
        accelerate(nn.Linear(2, 2))


# ---- calls that take the library's own path


def told_once(model: nn.Module, message: str, **options: Any) -> Any:
    with pytest.warns(UserWarning, match=message) as told:
        got = [model(ids(), **options) for _ in range(2)][1]
    assert len([w for w in told if "was accelerated" in str(w.message)]) == 1
    assert str(told[0].message).endswith("the library's own attention runs instead")
    return got


def test_attention_weights_come_from_the_library(calls: list[tuple[str, bool]]) -> None:
    model = build()
    want = model(ids(), output_attentions=True)
    accelerate(model)
    got = told_once(model, r"asked for attention weights \(output_attentions\)", output_attentions=True)
    assert torch.equal(got.logits, want.logits) and calls == []
    for name in ("attentions", "cross_attentions"):
        assert len(got[name]) == len(want[name]) > 0
        assert all(torch.equal(a, b) for a, b in zip(got[name], want[name], strict=True))


@pytest.mark.parametrize(
    "mask",
    [
        padding(9, 0, 4),  # nothing to see: the library then sees everything
        torch.randn(3, 1, LATENTS, TOKENS).double(),  # a bias
        -100.0 * (1 - padding(9, 4, 1)).double()[:, None, None],  # hides, but not entirely
        torch.zeros(1, 1, LATENTS, TOKENS).double().index_fill(2, torch.tensor([2]), 0.5),
        torch.zeros(3, 1, LATENTS, TOKENS).double().masked_fill(torch.eye(LATENTS, TOKENS) > 0, -torch.inf),
        torch.zeros(3, 2, 1, TOKENS).double(),  # for each head
        torch.zeros(3, 1, LATENTS, TOKENS, dtype=torch.bool),
        torch.zeros(3, 1, 1, TOKENS, dtype=torch.float64, requires_grad=True),
    ],
    ids=["nothing", "bias", "-100", "row", "by query", "by head", "bool", "learned"],
)
def test_other_masks(mask: Tensor, calls: list[tuple[str, bool]]) -> None:
    model = build()
    want = model(ids(), attention_mask=mask).logits
    accelerate(model)
    got = told_once(model, "PerceiverSelfAttention was accelerated, but a call's attention mask does more than",
                    attention_mask=mask).logits  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    assert calls == [("auto", False)] * 2 * (CALLS - 1), "the other layers, which have no mask"


def test_dropout_and_hooks_that_come_later(calls: list[tuple[str, bool]]) -> None:
    model = build()
    want = model(ids()).logits
    accelerate(model)
    attention = model.perceiver.encoder.cross_attention.attention.self
    attention.dropout.p = 0.5
    told_once(model, "attention dropout has been switched on")
    assert len(calls) == 2 * (CALLS - 1)
    torch.testing.assert_close(model.eval()(ids()).logits, want, rtol=1e-9, atol=1e-10)
    assert len(calls) == 2 * (CALLS - 1) + CALLS, "without training nothing is dropped"
    seen: list[torch.Size] = []
    handle = attention.dropout.register_forward_hook(lambda _module, _args, out: seen.append(out.shape))
    told_once(model, "a hook on its 'dropout' waits for attention weights, which are not made here")
    assert seen == [(3, 2, LATENTS, TOKENS)] * 2
    handle.remove()
    restore(model)


class WithHeadMask(modeling.PerceiverSelfAttention):  # type: ignore[misc,name-defined]
    """As transformers 4 had it: one argument more, in the middle."""

    def forward(self, hidden_states, attention_mask=None, head_mask=None, inputs=None, inputs_mask=None,
                output_attentions=False):  # type: ignore[no-untyped-def] # fmt: skip
        (out,) = super().forward(hidden_states, attention_mask, inputs, inputs_mask, output_attentions)
        return (out if head_mask is None else out * head_mask,)


def test_a_head_mask_goes_to_the_library(calls: list[tuple[str, bool]]) -> None:
    attention = build().perceiver.encoder.cross_attention.attention.self
    attention.__class__ = base.accelerated_class(perceiver.PerceiverSelfAttention, WithHeadMask)
    attention.attention_backend = "auto"
    latents, inputs = (torch.randn(2, n, WIDTH, dtype=torch.float64) for n in (LATENTS, TOKENS))
    with pytest.warns(UserWarning, match=r"arguments \(head_mask or others\) that the kernel does not have"):
        (named,) = attention(latents, inputs=inputs, head_mask=torch.tensor(0.5))
    (placed,) = attention(latents, None, torch.tensor(0.5), inputs, None, False)
    assert calls == []
    (plain,) = attention(latents, inputs=inputs, head_mask=None)
    assert calls == [("auto", False)]
    torch.testing.assert_close((named, placed), (plain / 2, plain / 2), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_without_a_graph_break(masked: bool, calls: list[tuple[str, bool]]) -> None:
    """Compiled code cannot read a mask: there, that layer runs the library's own code."""
    layer = build().perceiver.encoder.cross_attention
    latents, inputs = (torch.randn(3, n, WIDTH, dtype=torch.float64) for n in (LATENTS, TOKENS))
    mask = MASKS["4D, -10000"] if masked else None

    def run(function: Any) -> list[Tensor]:
        (out,) = function(latents, inputs=inputs, inputs_mask=mask)
        return [out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))]

    want = run(layer)
    accelerate(layer)
    torch.compiler.reset()
    got = run(torch.compile(layer, fullgraph=True, backend="eager"))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
