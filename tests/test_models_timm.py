"""Oracle: timm's SwinV2, random weights, loaded by the weight map, gives the same features and gradients."""

from __future__ import annotations

import pytest
import torch

from models.aurora.convert import config_from_timm, load_timm
from models.aurora.encoder import SwinEncoder

timm = pytest.importorskip("timm", reason="needs timm: install the test extra")


def pair(**options: object) -> tuple[torch.nn.Module, SwinEncoder]:
    torch.manual_seed(0)
    theirs = timm.create_model("swinv2_tiny_window8_256", pretrained=False, num_classes=0, **options).eval()
    for (
        parameter
    ) in theirs.parameters():  # timm starts biases at 0 and the post-norms at 1: make all of them matter
        parameter.data += 0.02 * torch.randn_like(parameter)
    ours = SwinEncoder(config_from_timm(theirs)).eval()
    load_timm(ours, theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize(
    "options",
    [
        {"img_size": 128, "window_size": 8},  # shifted windows, then windows cut to the map
        {"img_size": 224, "window_size": 7},
        {
            "img_size": 192,
            "window_size": 8,
        },  # 6 x 6 and 12 x 12 maps that 8 does not divide: padding
        {"img_size": 128, "window_size": 8, "pretrained_window_sizes": (6, 6, 6, 3)},
    ],
    ids=["cut", "divides", "pads", "other-pretraining-window"],
)
def test_features_and_gradients_equal_timms(options: dict) -> None:
    depths = {"depths": (1, 2, 2, 1), "embed_dim": 48, "num_heads": (2, 4, 8, 16), **options}
    theirs, ours = pair(**depths)
    images = torch.randn(1, 3, options["img_size"], options["img_size"])
    x, expected = theirs.patch_embed(images), []
    for stage in theirs.layers:
        x = stage(x)
        expected.append(x)
    expected[3] = theirs.norm(expected[3])
    maps = ours(images)
    for level, (mine, reference) in enumerate(zip(maps, expected, strict=True)):
        torch.testing.assert_close(
            mine, reference, rtol=2e-4, atol=2e-4, msg=lambda m, level=level: f"stage {level + 1}: {m}"
        )
    probe = torch.randn_like(expected[3])
    (expected[3] * probe).sum().backward()
    (maps[3] * probe).sum().backward()
    theirs_stage, ours_stage = theirs.layers[1].blocks[1], ours.stages[1].blocks[1]
    for reference, mine in (
        (theirs.patch_embed.proj.weight, ours.stem.weight),
        (theirs_stage.attn.qkv.weight, ours_stage.attention.qkv.weight),
        (theirs_stage.attn.logit_scale.flatten(), ours_stage.attention.logit_scale),
        (theirs_stage.attn.cpb_mlp[0].weight, ours_stage.attention.position_bias[0].weight),
        (theirs_stage.attn.q_bias, ours_stage.attention.q_bias),
    ):
        gradient = (
            reference.grad if reference.grad is not None else theirs_stage.attn.logit_scale.grad.flatten()
        )
        assert gradient.abs().max() > 0
        torch.testing.assert_close(mine.grad, gradient, rtol=2e-3, atol=2e-3 * gradient.abs().max().item())


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    theirs, ours = pair(img_size=128, depths=(1, 1, 1, 1), embed_dim=48, num_heads=(2, 4, 8, 16))
    weights = dict(theirs.state_dict())
    weights["layers.0.blocks.0.attn.surprise"] = torch.zeros(1)
    del weights["layers.2.blocks.0.norm1.weight"]
    with pytest.raises(ValueError, match=r"surprise.*stages\.2\.blocks\.0\.attention_norm\.weight"):
        load_timm(ours, weights)


def test_another_kind_of_model_is_refused() -> None:
    with pytest.raises(ValueError, match="SwinTransformerV2"):
        config_from_timm(torch.nn.Linear(2, 2))
