"""Heads on Aurora and PerceiverIO: boxes, classes per pixel, answers, matching, LoRA."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace

import pytest
import torch
from torch import nn

from models import Aurora
from models.answering import Chooser
from models.aurora.detection import NOTHING, STRIDES, Detector, around, assign, grid, level_sizes
from models.aurora.segmentation import Segmenter
from models.boxes import giou, iou, nms, nms_by_class
from models.lora import LoraLinear, add_lora, merge_lora
from models.matching import Matcher
from models.perceiver import PERCEIVER_SIZES
from models.perceiver.classify import SoundClassifier
from models.tokens import IGNORE
from models.writing import Writer
from tests.micro import MODEL


def random_boxes(count: int, seed: int = 0) -> torch.Tensor:
    corners = 60 * torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat((corners.amin(1), corners.amax(1) + 1), dim=1)


def pixels_of(box: torch.Tensor, side: int = 64) -> torch.Tensor:
    inside = torch.zeros(side, side, dtype=torch.bool)
    x0, y0, x1, y1 = box.long().tolist()
    inside[y0:y1, x0:x1] = True
    return inside


def test_iou_counts_pixels() -> None:
    first, second = random_boxes(6).round(), random_boxes(5, seed=1).round()
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            p, q = pixels_of(a), pixels_of(b)
            wanted = (p & q).sum() / (p | q).sum()
            assert iou(first, second)[i, j].item() == pytest.approx(wanted.item(), abs=1e-6)


def test_giou_against_transformers() -> None:
    oracle = importlib.import_module("transformers.loss.loss_for_object_detection")
    first, second = random_boxes(8), random_boxes(8, seed=1)
    wanted = oracle.generalized_box_iou(first, second).diagonal()
    torch.testing.assert_close(giou(first, second), wanted)


def test_nms_keeps_the_best_of_each_heap() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [30, 30, 40, 40], [0, 0, 10, 9]])
    scores = torch.tensor([0.5, 0.9, 0.2, 0.8])
    assert nms(boxes, scores, 0.6).tolist() == [1, 2]
    classes = torch.tensor([0, 0, 0, 1])
    assert nms_by_class(boxes, scores, classes, 0.6).tolist() == [1, 3, 2]
    kept = nms(random_boxes(60), torch.rand(60), 0.5)
    overlaps = iou(random_boxes(60)[kept], random_boxes(60)[kept])
    assert (overlaps - torch.eye(len(kept))).max() <= 0.5


def test_every_object_has_a_place_and_every_place_lies_in_its_object() -> None:
    boxes = torch.cat((random_boxes(12), torch.tensor([[5.0, 5, 6, 6], [0, 0, 64, 64]])))
    classes = torch.arange(len(boxes))
    asked, sides = assign(boxes, classes, 64, 96)
    points, strides = grid(level_sizes(64, 96), boxes.device)
    assert len(asked) == len(points) == sum(h * w for h, w in level_sizes(64, 96))
    found = asked != NOTHING
    torch.testing.assert_close(sides[found], boxes[asked[found]])
    alone, _ = assign(boxes[-2:-1], classes[-2:-1], 64, 96)
    assert (alone != NOTHING).sum() == 1, "an object too small to hold a place has the nearest one"
    large, _ = assign(boxes[-1:], classes[-1:], 64, 96)
    assert set(strides[large != NOTHING].tolist()) <= {float(stride) for stride in STRIDES[1:]}
    for i, box in enumerate(boxes[:12]):
        mine = points[asked == i]
        inside = (mine > box[:2]).all(1) & (mine < box[2:]).all(1)
        small = (box[2:] - box[:2]).min() < 8
        assert inside.all() or small
    none, _ = assign(boxes[:0], classes[:0], 64, 64)
    assert (none == NOTHING).all()


def test_a_detector_that_says_the_truth_finds_it() -> None:
    """Distances and classes as assigned come back as the boxes, whatever the head."""
    boxes, classes = torch.tensor([[4.0, 8, 30, 28], [40, 30, 60, 60]]), torch.tensor([1, 0])
    asked, sides = assign(boxes, classes, 64, 64)
    points, strides = grid(level_sizes(64, 64), boxes.device)
    hit = asked != NOTHING
    distances = torch.cat((points - sides[:, :2], sides[:, 2:] - points), dim=1) / strides[:, None]
    torch.testing.assert_close(around(points, distances * strides[:, None])[hit], sides[hit])


def test_detector_learns_where_things_are() -> None:
    torch.manual_seed(0)
    model = Detector(MODEL, 2)
    images = torch.zeros(2, 3, 64, 64)
    images[0, 0, 8:28, 4:30], images[1, 1, 30:60, 40:60] = 3.0, 3.0
    truth = [([4.0, 8, 30, 28], 0), ([40.0, 30, 60, 60], 1)]
    pairs = [assign(torch.tensor([box]), torch.tensor([c]), 64, 64) for box, c in truth]
    asked, sides = (torch.stack(part) for part in zip(*pairs, strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = torch.stack([*model(images, asked, sides).values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for found, (box, c) in zip(model.eval().detect(images), truth, strict=True):
        assert found.classes[0] == c
        assert iou(found.boxes[:1], torch.tensor([box])).item() > 0.7
        assert len(found.boxes) <= 100


def test_losses_divide_by_the_whole_step() -> None:
    torch.manual_seed(0)
    images, tokens = torch.randn(4, 3, 32, 32), torch.randint(5, 100, (4, 8))
    targets = tokens.clone()
    targets[:, :3] = IGNORE
    maps = torch.randint(0, 3, (4, 32, 32))
    asked, sides = assign(random_boxes(3) / 2, torch.tensor([0, 1, 2]), 32, 32)
    asked, sides = asked.expand(4, -1), sides.expand(4, -1, -1)
    worth = torch.rand(4, 7)
    config = replace(MODEL, decoder_dropout=0.0)
    whole = float((asked != NOTHING).sum())
    cases = [
        (Detector(config, 3), (images, asked, sides), (whole,)),
        (Segmenter(config, 3), (images, maps), (float(maps.numel()), 4.0)),
        (Writer(Aurora(config)), (images, tokens, targets), (float((targets != IGNORE).sum()),)),
        (Chooser(Aurora(config), 7), (images, tokens, worth), (4.0,)),
    ]
    for model, given, totals in cases:
        model.eval()
        alone = model(*given)
        parts = [model(*(x[i : i + 2] for x in given), *totals) for i in (0, 2)]
        for name, loss in alone.items():
            both = parts[0][name] + parts[1][name]
            torch.testing.assert_close(both, loss, rtol=1e-4, atol=1e-5, msg=f"{type(model).__name__} {name}")


def test_segmenter_takes_any_size_and_ignores_255() -> None:
    model = Segmenter(MODEL, 3).eval()
    assert model.logits(torch.randn(1, 3, 50, 70)).shape == (1, 3, 50, 70)
    images, maps = torch.randn(1, 3, 32, 32), torch.randint(0, 3, (1, 32, 32))
    loss = model(images, torch.where(torch.rand(1, 32, 32) < 0.5, maps, 255))
    other = model(images, torch.full((1, 32, 32), 255))
    assert loss["pixel"] > 0 and other["pixel"] == 0 and other["dice"] == 0


def test_matcher_gives_gradients_to_all_it_uses() -> None:
    model = Matcher(Aurora(MODEL))
    losses = model(torch.randn(3, 3, 32, 32), torch.randint(5, 100, (3, 6)))
    torch.stack([*losses.values()]).sum().backward()
    unused = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is None}
    assert unused <= {
        "pixels",
        "pyramid",
        "pixel_embedding",
        "query_heads",
        "decoder",
        "encoder",
        "logit_bias",
    }
    assert model.head.weight.grad is not None and model.base.logit_scale.grad is not None


def test_a_sound_is_the_same_alone_and_in_a_batch() -> None:
    torch.manual_seed(0)
    tiny = replace(
        PERCEIVER_SIZES["tiny"], latents=4, latent_width=64, latent_layers=1, latent_head_dim=32,
        audio_stem="conv", audio_range=10.0,
    )  # fmt: skip
    model = SoundClassifier(tiny, 5).eval()
    sounds = [0.1 * torch.randn(n) for n in (4000, 9000, 16000)]
    offsets = torch.tensor([0, 4000, 13000, 29000], dtype=torch.int32)
    together = model.classes(torch.cat(sounds), offsets)
    for i, sound in enumerate(sounds):
        alone = model.classes(sound, torch.tensor([0, len(sound)], dtype=torch.int32))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=1e-4)
    loss = model(torch.cat(sounds), offsets, torch.eye(5)[:3])["label"]
    loss.backward()
    audio = [p for name, p in model.base.adapters["audio"].named_parameters() if name != "mask_token"]
    assert all(p.grad is not None for p in audio)


def test_lora_changes_nothing_at_first_and_merges_exactly() -> None:
    torch.manual_seed(0)
    model = Aurora(replace(MODEL, decoder_dropout=0.0)).eval()
    images = torch.randn(2, 3, 32, 32)
    before = model.image_embedding(model.encode_image(images))
    names = add_lora(model, ("qkv", "out", "up", "gate"), rank=2, alpha=4.0)
    assert len(names) > 10
    torch.testing.assert_close(model.image_embedding(model.encode_image(images)), before)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning and all(".lora_" in name for name in learning)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            nn.init.normal_(module.up.weight, std=0.1)
    changed = model.image_embedding(model.encode_image(images))
    assert not torch.allclose(changed, before, atol=1e-3)
    changed.sum().backward()
    encoder = [n for n in names if n.startswith("encoder.stages")]
    for name in encoder:
        layer = model.get_submodule(name)
        assert isinstance(layer, LoraLinear) and layer.down.weight.grad is not None, name
    merge_lora(model)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    torch.testing.assert_close(model.image_embedding(model.encode_image(images)), changed)


def test_lora_is_pefts() -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'auroraio[test]'")
    torch.manual_seed(0)

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    ours, theirs = network(), network()
    theirs.load_state_dict(ours.state_dict())
    add_lora(ours, ("0", "2"), rank=2, alpha=6.0)
    settings = peft.LoraConfig(r=2, lora_alpha=6.0, target_modules=["0", "2"])
    theirs = peft.inject_adapter_in_model(settings, theirs)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())  # the same names
    x = torch.randn(4, 6)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_pefts_layers_work_in_aurora(autocast: bool) -> None:
    """Around the attention's projection as well, whose bias stands apart; and ours do the same."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'auroraio[test]'")
    torch.manual_seed(0)
    ours = Aurora(replace(MODEL, decoder_dropout=0.0)).eval()
    theirs = copy.deepcopy(ours)
    images = torch.randn(2, 3, 32, 32)
    settings = peft.LoraConfig(r=2, lora_alpha=6.0, target_modules=["qkv", "out"])
    theirs = peft.inject_adapter_in_model(settings, theirs)
    add_lora(ours, ("qkv", "out"), rank=2, alpha=6.0)
    before = theirs.image_embedding(theirs.encode_image(images))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found, expected = (model.image_embedding(model.encode_image(images)) for model in (ours, theirs))
    torch.testing.assert_close(found, expected, atol=2e-2 if autocast else 1e-5, rtol=0)
    assert (expected - before).abs().max() > 0.1
    found.sum().backward()
    expected.sum().backward()
    learning = [(name, p) for name, p in ours.encoder.named_parameters() if ".qkv.lora_" in name]
    assert len(learning) == 8
    for name, parameter in learning:
        gradient = theirs.encoder.get_parameter(name).grad
        assert gradient.abs().max() > 0
        torch.testing.assert_close(parameter.grad, gradient, atol=2e-2 if autocast else 1e-5, rtol=1e-2)
