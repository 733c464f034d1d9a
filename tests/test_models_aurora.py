"""Aurora as a whole: gradients reach everything, any image size, one encoding per step, caches, masks, checkpointing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from models import AURORA_SIZES, Aurora, AuroraConfig, parameter_groups
from models.aurora.model import drop_words, mix_pairs
from models.objectives import Normalizers, ObjectiveConfig, count
from models.tokens import BOS, EOS, IGNORE, MASK, PAD

TINY = AURORA_SIZES["tiny"]


def batch(
    config: AuroraConfig = TINY, pairs: int = 3, hidden: int = 2, captions: int = 1, seed: int = 0
) -> tuple:
    """Random pre-training tensors in the order of Aurora.forward."""
    g = torch.Generator().manual_seed(seed)
    size, grid, length = config.image_size, config.image_size // 32, config.text_length
    tokens = torch.randint(5, 200, (pairs * captions, length), generator=g)
    tokens[:, 0] = BOS
    for row, end in enumerate(torch.randint(4, length, (len(tokens),), generator=g).tolist()):
        tokens[row, end] = EOS
        tokens[row, end + 1 :] = PAD
    targets = torch.full_like(tokens, IGNORE)
    targets[:, 2] = tokens[:, 2]
    mlm = torch.where(targets != IGNORE, MASK, tokens)
    mask = torch.zeros(hidden, grid, grid, dtype=torch.bool)
    mask[:, 0] = True
    images = torch.randn(pairs + hidden, 3, size, size, generator=g)
    return images[:pairs], tokens, mlm, targets, images[pairs:], mask


def tiny(**changes: object) -> Aurora:
    torch.manual_seed(0)
    return Aurora(replace(TINY, **changes))


def test_every_parameter_gets_a_gradient() -> None:
    model = tiny()
    data = batch()
    losses = model(*data)
    assert set(losses) == {"mim", "itc", "caption", "mlm"}
    maps = model.encode_image(data[0])
    found = model.detect(maps, data[1])
    assert (
        found.boxes.shape == (3, 16, 4)
        and found.classes.shape == (3, 16, 256)
        and found.masks.shape == (3, 16, 16, 16)
    )
    levels = model.pyramid(maps)
    assert [tuple(level.shape) for level in levels] == [(3, 64, n, n) for n in (16, 8, 4, 2)]
    dense = sum(level.square().mean() for level in levels)
    (sum(losses.values()) + found.boxes.sum() + found.classes.mean() + found.masks.mean() + dense).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_losses_start_where_chance_is() -> None:
    losses = tiny()(*batch(pairs=8))
    # tied embeddings make the token just read likely at first, so captioning starts above log(V); masked words need not
    assert math.log(2048) < losses["caption"].item() < 13
    # scale 10, bias -4: a pair costs about 4 for its own text and little for the others (SigLIP)
    assert 1 < losses["itc"].item() < 12


def test_images_are_encoded_once_a_step() -> None:
    model, calls = tiny(), []
    model.encoder.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    model(*batch(pairs=3, hidden=2))
    assert calls == [5]


def test_a_weight_of_zero_turns_a_loss_off() -> None:
    model, data, calls = tiny(), batch(), []
    model.encoder.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    for name in ("mim", "itc", "caption", "mlm"):
        only = ObjectiveConfig(**{other: 0.0 for other in ("mim", "itc", "caption", "mlm") if other != name})
        assert set(model(*data, objectives=only)) == {name}
        assert set(model(*data, objectives=ObjectiveConfig(**{name: 0.0}))) == {
            "mim",
            "itc",
            "caption",
            "mlm",
        } - {name}
    assert calls[0] == 2  # masked image modelling alone encodes the uncaptioned images alone


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="captioned images feed itc"):
        tiny()(*batch(hidden=0), objectives=ObjectiveConfig(itc=0, caption=0, mlm=0))


def test_uncaptioned_images_feed_masked_modelling_alone() -> None:
    model = tiny()
    assert set(model(*batch(pairs=0))) == {"mim"}
    assert set(model(*batch(hidden=0))) == {"itc", "caption", "mlm"}


def test_hidden_pixels_do_not_reach_the_reconstruction() -> None:
    model = tiny().eval()
    *_, images, mask = batch()
    changed = images.clone()
    changed[:, :, :32] = 7.0  # the masked upper half
    assert torch.equal(model.reconstruct(images, mask), model.reconstruct(changed, mask))
    seen = images.clone()
    seen[:, :, 32:] = 7.0
    assert not torch.equal(model.reconstruct(images, mask), model.reconstruct(seen, mask))


def test_a_micro_batch_that_asks_for_no_word_trains_the_rest() -> None:
    """mlm_share may leave a small micro-batch without a masked caption; under DDP every rank runs the same graph."""
    images, tokens, mlm, targets, *hidden = batch()
    model = tiny()
    losses = model(images, tokens, mlm[:0], targets[:0], *hidden)
    assert losses["mlm"].item() == 0 and losses["caption"].item() > 1
    losses["mlm"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.decoder.unimodal.parameters())


def test_a_mask_of_another_size_is_refused() -> None:
    model = tiny()
    *_, images, mask = batch()
    with pytest.raises(ValueError, match=r"mask is \(2, 3, 3\).*need \(2, 2, 2\)"):
        model.encoder(images, torch.zeros(2, 3, 3, dtype=torch.bool))


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (70, 101), (32, 200), (20, 20)])
def test_any_image_size(size: tuple[int, int]) -> None:
    model = tiny().eval()
    maps = model.encode_image(torch.randn(2, 3, *size))
    height, width = (-(-side // 4) for side in size)
    for level in maps:
        assert level.shape[1:3] == (height, width)
        height, width = -(-height // 2), -(-width // 2)
    assert model.image_embedding(maps).shape == (2, 256)
    assert model.detect(maps, torch.full((2, 4), BOS)).masks.shape[-2:] == maps[0].shape[1:3]


def test_padding_changes_nothing() -> None:
    model = tiny().eval()
    memory = model.memory(model.encode_image(torch.randn(1, 3, 64, 64)))
    short = torch.tensor([[BOS, 9, 11, 12, EOS]])
    long = torch.nn.functional.pad(short, (0, 7), value=PAD)
    torch.testing.assert_close(model.text_embedding(short), model.text_embedding(long))
    torch.testing.assert_close(model.mlm_logits(memory, short), model.mlm_logits(memory, long)[:, :5])


def test_captioning_never_sees_later_words_and_masked_language_does() -> None:
    model = tiny().eval()
    memory = model.memory(model.encode_image(torch.randn(1, 3, 64, 64)))
    first = torch.tensor([[BOS, 9, 11, 12, 13]])
    other = torch.tensor([[BOS, 9, 11, 99, 98]])

    def caption(tokens: torch.Tensor) -> torch.Tensor:
        return model.decoder.read_image(model.decoder.read_text(tokens, causal=True), memory, causal=True)

    assert torch.equal(caption(first)[:, :3], caption(other)[:, :3])
    assert not torch.allclose(model.whole_text(first, memory)[:, :3], model.whole_text(other, memory)[:, :3])


def test_the_cache_gives_the_logits_of_the_whole_sequence() -> None:
    model = tiny().eval()
    memory = model.memory(model.encode_image(torch.randn(2, 3, 64, 64)))
    tokens = torch.randint(5, 200, (2, 9))
    x = model.decoder.read_image(model.decoder.read_text(tokens, causal=True), memory, causal=True)
    state = model.start(memory)
    stepwise = torch.stack([model.step(tokens[:, t], state) for t in range(9)], dim=1)
    torch.testing.assert_close(stepwise, model.decoder.logits(x), rtol=1e-4, atol=1e-4)


def test_several_captions_of_an_image_share_it() -> None:
    model = tiny()
    images, tokens, mlm, targets, none, mask = batch(pairs=3, hidden=0, captions=2)
    shared = model(images, tokens, mlm, targets, none, mask)
    repeated = model(images.repeat_interleave(2, 0), tokens, mlm, targets, none, mask)
    for name in ("caption", "mlm"):
        torch.testing.assert_close(shared[name], repeated[name])


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    results = []
    for on in (False, True):
        model = tiny(decoder_dropout=0.1, drop_path=0.2).train()
        model.gradient_checkpointing = on
        torch.manual_seed(1)
        sum(model(*batch()).values()).backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_bf16_autocast_stays_near_fp32() -> None:
    model, data = tiny(), batch(pairs=2, hidden=1)
    exact = model(*data)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*data)
    for name in exact:
        assert rough[name].dtype == torch.float32
        assert rough[name].item() == pytest.approx(exact[name].item(), rel=0.05), name


def test_losses_add_up_over_micro_batches() -> None:
    model, whole = tiny(), batch(pairs=4, hidden=4)
    full = model(*whole)
    totals = count(whole[1], whole[3], whole[5])
    parts = [
        model(*(x[i : i + 2] for x in whole), normalizers=Normalizers(*totals, itc_share=0.5)) for i in (0, 2)
    ]
    for name in ("mim", "caption", "mlm"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], full[name], rtol=1e-5, atol=1e-5)


def test_parallel_captioning_hides_all_words() -> None:
    model, data = tiny().eval(), batch(hidden=0)
    swapped = list(data)
    swapped[1] = torch.where(data[1] >= 5, data[1] + 300, data[1])
    only = ObjectiveConfig(mim=0, itc=0, mlm=0, parallel_caption=1.0)
    inputs: list[torch.Tensor] = []
    model.decoder.embedding.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(*data, objectives=only)
    assert all(set(tokens.unique().tolist()) <= {PAD, MASK} for tokens in inputs[-1:])


def test_dropped_words_leave_the_others_in_order() -> None:
    tokens = torch.tensor([[BOS, 10, 11, 12, 13, EOS, PAD, PAD], [BOS, 20, EOS, PAD, PAD, PAD, PAD, PAD]])
    assert torch.equal(drop_words(tokens, 0.0), tokens)
    assert drop_words(tokens, 1.0).tolist() == [[BOS, EOS, *[PAD] * 6]] * 2
    torch.manual_seed(0)
    many = drop_words(tokens[:1].expand(4000, -1), 0.25)
    assert ((many != PAD).sum(1) - 2).float().mean().item() == pytest.approx(
        3.0, abs=0.06
    )  # of four words, three
    for row in {tuple(row) for row in many.tolist()}:
        kept = [token for token in row if token != PAD]
        assert kept[0] == BOS and kept[-1] == EOS and kept[1:-1] == sorted(set(kept[1:-1]) & {10, 11, 12, 13})
        assert row[len(kept) :] == (PAD,) * (len(row) - len(kept))


def test_word_dropout_is_the_contrastive_loss_alone() -> None:
    model, inputs = tiny(), batch()
    torch.manual_seed(0)
    plain = model(*inputs)
    dropping = model(*inputs, objectives=ObjectiveConfig(itc_word_dropout=0.5))
    assert dropping["itc"] != plain["itc"]
    for name in ("mim", "caption", "mlm"):
        assert torch.equal(dropping[name], plain[name])


def mixed(pairs: int, share: float) -> list[str]:
    """Checks one batch of `pairs` with two captions each; returns which half of each mixed picture is another's."""
    images = torch.rand(pairs, 3, 5, 4)
    tokens = torch.full((pairs, 2, 6), PAD)
    for i in range(pairs):  # captions of one and two words, all different
        tokens[i, 0, :3] = torch.tensor([BOS, 10 + 3 * i, EOS])
        tokens[i, 1, :4] = torch.tensor([BOS, 11 + 3 * i, 12 + 3 * i, EOS])
    found, captions = mix_pairs(images, tokens.flatten(0, 1), share)
    halves, used = [], set()
    for i, (image, rows) in enumerate(zip(found, captions.unflatten(0, (pairs, 2)), strict=True)):
        texts = [row[: int((row != PAD).sum())].tolist() for row in rows]
        assert all(text[0] == BOS and text[-1] == EOS for text in texts)
        words = [text[1:-1] for text in texts]
        assert words[0][0] == 10 + 3 * i and words[1][:2] == [11 + 3 * i, 12 + 3 * i]
        if len(words[0]) == 1:
            assert torch.equal(image, images[i]) and len(words[1]) == 2
            continue
        other = (words[0][1] - 10) // 3
        assert words[0][1:] == [10 + 3 * other] and words[1][2:] == [11 + 3 * other, 12 + 3 * other]
        expected = {"right": images[i].clone(), "lower": images[i].clone()}
        expected["right"][:, :, 2:] = images[other][:, :, 2:]
        expected["lower"][:, 2:] = images[other][:, 2:]
        halves += [half for half, mixture in expected.items() if torch.equal(image, mixture)]
        used.add(other)
        assert torch.equal(found[other], images[other])  # which stays as it is
    assert len(used) == len(halves)
    return halves


def test_mixed_pairs() -> None:
    torch.manual_seed(0)
    sizes = {(12, 0.25): 3, (12, 0.5): 6, (7, 0.5): 3, (3, 0.1): 1, (2, 0.5): 1, (1, 0.5): 0}
    assert {size: len(mixed(*size)) for size in sizes} == sizes
    assert [part.shape for part in mix_pairs(torch.rand(0, 3, 5, 4), torch.zeros(0, 6), 0.5)] == [
        (0, 3, 5, 4),
        (0, 6),
    ]
    assert set(mixed(40, 0.5)) == {"right", "lower"}
    images, tokens = torch.rand(2, 3, 4, 4), torch.tensor([[BOS, 9, EOS], [BOS, 8, EOS]])
    same = mix_pairs(images, tokens, 0.0)
    assert same[0] is images and same[1] is tokens


def test_mixing_is_for_the_contrastive_loss_and_leaves_hidden_images_alone() -> None:
    model, inputs = tiny().eval(), batch()
    only = ObjectiveConfig(caption=0, mlm=0)
    plain = model(*inputs, objectives=only)
    mixing = model(*inputs, objectives=replace(only, itc_mix=0.5))
    assert mixing["itc"] != plain["itc"] and torch.equal(mixing["mim"], plain["mim"])
    alone = model(*batch(pairs=0), objectives=replace(only, itc_mix=0.5))
    assert alone.keys() == {"mim"}
    for wrong, says in (
        ({"itc_mix": 0.6}, "0.6; it is a share between 0 and 0.5"),
        ({"caption": 1.0}, "caption = 1.0, mlm = 0.*set itc_mix to 0"),
        ({"itc": 0.0}, "with itc = 0.0"),
    ):
        with pytest.raises(ValueError, match=says):
            replace(only, **{"itc_mix": 0.2, **wrong})


def test_decay_leaves_gains_biases_and_looked_up_rows_alone() -> None:
    model = tiny()
    decayed, kept = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    spared = {names[id(p)] for p in kept["params"]}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {"logit_scale", "decoder.embedding.weight", "decoder.queries.weight", "image_pool.query"} <= spared
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
