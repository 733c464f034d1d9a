"""transformers' Perceiver is the oracle of the latent transformer and the query decoders: same numbers and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.perceiver.config import PERCEIVER_SIZES
from models.perceiver.convert import config_from_transformers, load_decoder, load_encoder
from models.perceiver.latents import LatentTransformer
from models.perceiver.pieces import ends
from models.perceiver.queries import QueryDecoder

hf = pytest.importorskip("transformers", reason="needs transformers: install the test extra")
modeling = pytest.importorskip(
    "transformers.models.perceiver.modeling_perceiver",
    reason="needs transformers with Perceiver: install the test extra",
)

INPUTS, QUERIES, OUT = 24, 6, 5


def theirs(**options: Any) -> nn.Module:
    """A PerceiverModel with a basic decoder in which every parameter matters, float64."""
    torch.manual_seed(0)
    sizes = {"num_latents": 7, "d_latents": 32, "d_model": INPUTS, "num_blocks": 1, "num_self_attends_per_block": 2,
             "num_self_attention_heads": 4, "num_cross_attention_heads": 2, "attention_probs_dropout_prob": 0.0}  # fmt: skip
    config = hf.PerceiverConfig(**{**sizes, **options})
    decoder = modeling.PerceiverBasicDecoder(
        config, output_num_channels=OUT, num_channels=16, num_heads=2, widening_factor=2,
        qk_channels=32, v_channels=32, use_query_residual=bool(options.get("residual")),
        trainable_position_encoding_kwargs={"num_channels": 16, "index_dims": QUERIES},
    )  # fmt: skip
    model: nn.Module = modeling.PerceiverModel(config, decoder=decoder).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def ours(model: Any) -> tuple[LatentTransformer, QueryDecoder]:
    config = config_from_transformers(model)
    latent, decoder = LatentTransformer(config).double(), QueryDecoder(config, QUERIES, OUT).double()
    load_encoder(latent, model.state_dict())
    load_decoder(decoder, model.decoder.state_dict())
    return latent, decoder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": 3, "cross_attention_widening_factor": 2, "self_attention_widening_factor": 3},
        {"qk_channels": 8, "v_channels": 32, "cross_attention_shape_for_attention": "q", "residual": True},
        {"use_query_residual": False, "num_cross_attention_heads": 4},
    ],
    ids=["default", "repeated", "narrow-keys", "no-residual"],
)
def test_the_same_numbers_and_gradients(options: dict[str, Any]) -> None:
    model = theirs(**options)
    latent, decoder = ours(model)
    lengths = torch.tensor([9, 4, 9])
    inputs = torch.randn(3, 9, INPUTS, dtype=torch.float64)
    mask = torch.arange(9) < lengths[:, None]
    found = model(inputs, attention_mask=mask.long())
    states = latent(inputs[mask], ends(lengths))
    logits = decoder(states)
    torch.testing.assert_close(states, found.last_hidden_state, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits, found.logits, rtol=1e-9, atol=1e-9)

    weight = torch.randn_like(logits)
    (found.logits * weight).sum().backward()
    (logits * weight).sum().backward()
    # The map carries gradients as it carries weights: put theirs into models of ours.
    grads = {name: p.grad for name, p in model.named_parameters()}
    mirror, mirrored = LatentTransformer(config_from_transformers(model)).double(), decoder
    load_encoder(mirror, grads)
    compare(latent, dict(mirror.named_parameters()))
    mirrored = QueryDecoder(config_from_transformers(model), QUERIES, OUT).double()
    load_decoder(
        mirrored, {n.removeprefix("decoder."): g for n, g in grads.items() if n.startswith("decoder.")}
    )
    compare(decoder, dict(mirrored.named_parameters()))


def compare(module: nn.Module, wanted: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, wanted[name].data, rtol=1e-8, atol=1e-8, msg=name)


def test_fp32_is_as_near_to_fp64_as_theirs() -> None:
    model = theirs()
    latent, _ = ours(model)
    inputs = torch.randn(2, 40, INPUTS, dtype=torch.float64)
    exact = model(inputs).last_hidden_state
    flat, offsets = inputs.flatten(0, 1).float(), ends(torch.tensor([40, 40]))
    mine = (latent.float()(flat, offsets) - exact).abs().max()
    other = (model.float()(inputs.float()).last_hidden_state - exact).abs().max()
    spacing = ((exact.float() + 0.3 - 0.3) - exact.float()).abs().max()
    assert mine <= 2 * other + 2 * spacing


def test_what_does_not_fit_is_named() -> None:
    model: Any = theirs()
    latent, _ = ours(model)
    weights = dict(model.state_dict())
    weights["encoder.extra"] = weights.pop("embeddings.latents")
    weights["encoder.self_attends.0.mlp.dense1.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"\['encoder.extra'\].*dense1.*\(3, 3\).*missing: .*'latents'"):
        load_encoder(latent, weights)
    with pytest.raises(ValueError, match="cannot read a Linear"):
        config_from_transformers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'relu'; supported: 'gelu'"):
        config_from_transformers(theirs(hidden_act="relu"))


def test_a_model_of_ours_starts_from_their_weights() -> None:
    from models.perceiver import PerceiverIO

    model = theirs()
    mine = PerceiverIO(config_from_transformers(model))
    load_encoder(mine.latent, model.state_dict())
    assert torch.equal(mine.latent.latents.double(), model.embeddings.latents.float().double())
    assert PERCEIVER_SIZES["tiny"].classic is None
