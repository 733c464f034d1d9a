"""The parts of Aurora that a few thousand pictures want: a convolutional stem, a mean, a bag of words, captions as pairs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models import AURORA_SIZES, Aurora
from models.aurora.encoder import ConvStem
from models.aurora.model import alignment
from models.objectives import ObjectiveConfig
from models.tokens import BOS, EOS, PAD

PHOTOS = replace(
    AURORA_SIZES["tiny"], stem="conv", image_pooling="mean", text_pooling="words", depths=(1, 1, 1, 1)
)
ITC_ONLY = ObjectiveConfig(mim=0, caption=0, mlm=0, itc_kind="softmax", itc_captions=0.5)


@pytest.fixture
def model() -> Aurora:
    torch.manual_seed(0)
    return Aurora(PHOTOS)


def test_a_bag_of_words_knows_words_and_no_order(model: Aurora) -> None:
    tokens = torch.tensor(
        [[BOS, 9, 11, 30, EOS, PAD], [BOS, 30, 9, 11, EOS, PAD], [9, 11, 30, PAD, PAD, PAD]]
    )
    a, b, c = model.text_embedding(tokens)
    table = model.text_pool.embedding.weight
    expected = F.normalize(table[9] + table[11] + table[30], dim=0)
    for found in (a, b, c):
        torch.testing.assert_close(found, expected)
    nothing = model.text_embedding(torch.tensor([[BOS, EOS, PAD]]))
    assert nothing.shape == (1, PHOTOS.embedding_width) and not nothing.any()


def test_the_mean_pool_is_a_mean_a_norm_and_a_projection(model: Aurora) -> None:
    model.eval()
    pool = model.image_pool
    pool.norm.running_mean.normal_()
    pool.norm.running_var.uniform_(0.5, 2)
    maps = [torch.empty(0)] * 3 + [torch.randn(3, 2, 2, 256)]
    mean = maps[3].mean((1, 2))
    centred = (mean - pool.norm.running_mean) / (pool.norm.running_var + 1e-5).sqrt()
    expected = F.normalize(F.linear(centred, pool.project.weight, pool.project.bias), dim=-1)
    torch.testing.assert_close(model.image_embedding(maps), expected)


@pytest.mark.parametrize("size", [(64, 64), (60, 92)])
def test_the_stems_make_maps_of_one_size(model: Aurora, size: tuple[int, int]) -> None:
    assert isinstance(model.encoder.stem, ConvStem)
    patches = Aurora(replace(PHOTOS, stem="patch")).eval()
    images = torch.randn(2, 3, *size)
    ours, theirs = model.eval().encode_image(images), patches.encode_image(images)
    assert [m.shape for m in ours] == [m.shape for m in theirs]


def test_a_conv_stem_sees_brightness(model: Aurora) -> None:
    """A patch and the same patch twice as bright stay different behind the stem: batch norm compares them."""
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        one, two = model.encoder.train().patchify(torch.cat((images, 2 * images))).chunk(2)
    assert (one - two).abs().mean() > 0.05


def test_captions_of_an_image_attract_each_other(model: Aurora) -> None:
    """The extra term is the contrast of each caption with another one of its image, by hand."""
    images = F.normalize(torch.randn(4, 16), dim=-1)
    texts = F.normalize(torch.randn(4 * 3, 16), dim=-1)
    plain = alignment(model, images, texts, replace(ITC_ONLY, itc_captions=0.0))
    scale = model.logit_scale.exp()
    groups, target, terms = texts.view(4, 3, 16), torch.arange(4), []
    for i, j in ((0, 2), (1, 0), (2, 1)):
        logits = scale * groups[:, i] @ groups[:, j].T
        terms.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    found = alignment(model, images, texts, ITC_ONLY)
    torch.testing.assert_close(found, plain + 0.5 * sum(terms) / 3)
    one_each = texts[::3]
    assert torch.equal(
        alignment(model, images, one_each, ITC_ONLY),
        alignment(model, images, one_each, replace(ITC_ONLY, itc_captions=0.0)),
    )


def test_gradients_reach_every_part_that_is_used(model: Aurora) -> None:
    tokens = torch.randint(5, 2000, (8, 24))
    none = torch.empty(0, 24, dtype=torch.int64)
    images, mask = torch.randn(4, 3, 64, 64), torch.zeros(0, 2, 2, dtype=torch.bool)
    loss = model(images, tokens, none, none, torch.empty(0, 3, 64, 64), mask, ITC_ONLY)["itc"]
    loss.backward()
    parts = {"encoder.stem": 0, "image_pool": 0, "text_pool": 0, "encoder.stages": 0}
    for name, parameter in model.named_parameters():
        for part in parts:
            if name.startswith(part):
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
                parts[part] += 1
    assert all(parts.values())
