"""The losses against their papers' formulas, written out pair by pair in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from models import objectives
from models.objectives import ObjectiveConfig
from models.tokens import IGNORE


def embeddings(pairs: int, captions: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(pairs, 16, generator=g, dtype=torch.float64), dim=-1)
    text = F.normalize(torch.randn(pairs * captions, 16, generator=g, dtype=torch.float64), dim=-1)
    return image.requires_grad_(), text.requires_grad_()


@pytest.mark.parametrize("captions", [1, 3])
def test_sigmoid_loss_is_siglips(captions: int) -> None:
    image, text = embeddings(5, captions)
    scale, bias = torch.tensor(1.3, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    expected = 0.0
    for i in range(5):
        for j in range(5 * captions):
            logit = math.exp(1.3) * (image[i] @ text[j]).item() - 2.0
            z = 1 if j // captions == i else -1
            expected += math.log(1 + math.exp(-z * logit))
    loss = objectives.contrastive_loss(image, text, scale, bias, kind="sigmoid")
    assert loss.item() == pytest.approx(expected / (5 * captions), rel=1e-5)


@pytest.mark.parametrize("captions", [1, 3])
def test_softmax_loss_is_clips(captions: int) -> None:
    image, text = embeddings(4, captions)
    scale, bias = torch.tensor(2.0), torch.tensor(-10.0)
    logits = math.exp(2.0) * image @ text.T
    rows = [
        -sum(logits[i].log_softmax(0)[i * captions + k] for k in range(captions)) / captions for i in range(4)
    ]
    columns = [-logits[:, j].log_softmax(0)[j // captions] for j in range(4 * captions)]
    expected = (sum(rows) / len(rows) + sum(columns) / len(columns)) / 2
    loss = objectives.contrastive_loss(image, text, scale, bias, kind="softmax")
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5, check_dtype=False)
    got = torch.autograd.grad(loss, (image, text), retain_graph=True)
    wanted = torch.autograd.grad(expected, (image, text))
    for ours, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def test_contrastive_loss_refuses_what_does_not_pair_up() -> None:
    with pytest.raises(ValueError, match="7 texts cannot belong to 3 images"):
        objectives.contrastive_loss(
            torch.randn(3, 4), torch.randn(7, 4), torch.zeros(()), torch.zeros(()), kind="sigmoid"
        )


def test_masked_image_loss_counts_hidden_patches_only() -> None:
    images = torch.randn(2, 3, 64, 96)
    mask = torch.zeros(2, 2, 3, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, 0, 0] = True
    predicted = torch.randn(2, 2, 3, 3 * 32 * 32)
    expected = 0.0
    for b, y, x in mask.nonzero().tolist():
        patch = images[b, :, 32 * y : 32 * y + 32, 32 * x : 32 * x + 32]
        expected += (predicted[b, y, x].view(3, 32, 32) - patch).abs().mean()
    torch.testing.assert_close(
        objectives.masked_image_loss(predicted, images, mask), torch.as_tensor(expected)
    )


def test_patches_round_trip() -> None:
    images = torch.randn(2, 3, 64, 96)
    assert torch.equal(objectives.unpatchify(objectives.patchify(images, 2)), images)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_loss_ignores_and_sums(smoothing: float) -> None:
    x, weight = torch.randn(2, 5, 8), torch.randn(11, 8)
    targets = torch.randint(0, 11, (2, 5))
    targets[0, 2:] = IGNORE
    logits = (x @ weight.T).flatten(0, 1)
    expected = F.cross_entropy(
        logits, targets.flatten(), ignore_index=IGNORE, label_smoothing=smoothing, reduction="sum"
    )
    z = logits.logsumexp(-1)[targets.flatten() != IGNORE].square().sum()
    config = ObjectiveConfig(label_smoothing=smoothing, z_loss=0.01)
    torch.testing.assert_close(objectives.token_loss(x, weight, targets, config), expected + 0.01 * z)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"itc": -1.0}, "0 \\(off\\) or positive"),
        ({"itc_kind": "hinge"}, "supported: 'sigmoid'"),
        ({"label_smoothing": 2.0}, "share"),
    ],
)
def test_wrong_objectives_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ObjectiveConfig(**changes)
