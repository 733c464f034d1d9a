"""PerceiverIO as a whole: any subset of modalities, alone as in a batch, gradients everywhere, caches, checkpointing."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import PERCEIVER_SIZES, PerceiverConfig, PerceiverIO, parameter_groups
from models.generation import generate
from models.perceiver import PerceiverObjectives, Piece
from models.perceiver.adapters.audio import log_mel
from models.perceiver.adapters.base import grid_rotary
from models.perceiver.adapters.image import patchify, unpatchify
from models.perceiver.objectives import count_targets
from models.perceiver.pieces import ends
from models.tokens import BOS, EOS, IGNORE, MASK

TINY = PERCEIVER_SIZES["tiny"]
SAMPLES = 6
ALL = PerceiverObjectives(label=1.0)
OF = {"image": {"itc", "mim"}, "audio": {"atc", "mam"}, "video": {"vtc", "mvm"}, "text": {"mlm", "caption"}}


def packed(parts: list[Tensor], sample: list[int]) -> Piece:
    return Piece(torch.cat(parts), torch.tensor(sample), ends(torch.tensor([len(one) for one in parts])))


def batch(seed: int = 0) -> dict[str, Any]:
    """Six samples: pictures (0, 1, 4), sounds (2, 4), clips (3, 4), texts (all); sample 5 has text alone."""
    g = torch.Generator().manual_seed(seed)

    def words(n: int) -> Tensor:
        return torch.cat((torch.tensor([BOS]), torch.randint(5, 200, (n,), generator=g), torch.tensor([EOS])))

    text = packed([words(n) for n in (3, 7, 5, 22, 9, 4)], [0, 1, 2, 3, 4, 5])
    targets = torch.full_like(text.data, IGNORE)
    targets[2::4] = text.data[2::4]
    sounds = [0.1 * torch.randn(n, generator=g) for n in (16_000, 5_000)]
    clips = [torch.randint(0, 256, (n, 64, 64, 3), generator=g, dtype=torch.uint8) for n in (4, 3)]
    images = torch.randn(3, 3, 64, 64, generator=g)
    hidden = torch.rand(3, 4, 4, generator=g) < 0.6
    pieces = {
        "image": Piece(images, torch.tensor([0, 1, 4]), mask=hidden),
        "audio": packed(sounds, [2, 4]), "video": packed(clips, [3, 4]), "text": text,
    }  # fmt: skip
    return {
        "pieces": pieces, "samples": SAMPLES, "mlm_tokens": torch.where(targets == IGNORE, text.data, MASK),
        "mlm_targets": targets, "labels": torch.eye(2, 16), "label_sample": torch.tensor([2, 4]),
    }  # fmt: skip


def tiny(**changes: Any) -> PerceiverIO:
    torch.manual_seed(0)
    return PerceiverIO(replace(TINY, **changes))


def only(pieces: dict[str, Piece], sample: int) -> dict[str, Piece]:
    """What one sample has, as a batch of its own."""
    out = {}
    for name, piece in pieces.items():
        rows = (piece.sample == sample).nonzero()[:, 0]
        if len(rows):
            out[name] = piece.select(rows, torch.zeros(len(rows), dtype=torch.long))
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"audio_kind": "waveform", "image_stem": "conv", "text_pooling": "words", "decoder_width": 256},
        {"image_window": 4, "encoder_layers": 2, "input_reads": 2},
    ],
    ids=["default", "other-inputs", "windows"],
)
def test_every_parameter_gets_a_gradient(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    losses = model(**batch(), objectives=ALL)
    assert set(losses) == set(ALL.weights())
    assert all(loss.isfinite() and loss > 0 and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("missing", ["image", "audio", "video", "text"])
def test_a_missing_modality_is_a_loss_of_zero(missing: str) -> None:
    """Gradients are zero, not None, so that every process of a distributed run has the same graph."""
    model, data = tiny(), batch()
    del data["pieces"][missing]
    if missing == "text":
        data |= {
            "mlm_tokens": torch.empty(0, dtype=torch.long),
            "mlm_targets": torch.empty(0, dtype=torch.long),
        }
    losses = model(**data, objectives=ALL)
    zero = OF[missing] | ({"itc", "vtc", "atc"} if missing == "text" else set())
    assert {name for name, loss in losses.items() if loss == 0} == zero
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    unused = model.text if missing == "text" else model.adapters[missing]
    blind = {"embedding.weight"} if missing == "text" else set()
    assert not any(p.grad.any() for name, p in unused.named_parameters() if name not in blind)


def test_a_batch_of_text_alone_and_an_empty_one() -> None:
    model, data = tiny(), batch()
    data["pieces"] = {"text": data["pieces"]["text"]}
    losses = model(**data)
    assert {name for name, loss in losses.items() if loss > 0} == {"mlm"}
    none = torch.empty(0, dtype=torch.long)
    losses = model({}, 0, none, none)
    assert all(loss == 0 for loss in losses.values())


def test_a_sample_alone_is_what_it_is_in_a_batch() -> None:
    model, pieces = tiny().eval(), batch()["pieces"]
    with torch.no_grad():
        together = model.encode(pieces, SAMPLES)
        texts = model.text_embedding(pieces["text"])
        for sample in range(SAMPLES):
            mine = only(pieces, sample)
            torch.testing.assert_close(model.encode(mine, 1)[0], together[sample], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                model.text_embedding(mine["text"])[0], texts[sample], rtol=1e-4, atol=1e-5
            )


def test_every_modality_changes_the_latents_of_its_own_sample_alone() -> None:
    model, pieces = tiny().eval(), batch()["pieces"]
    with torch.no_grad():
        before = model.encode(pieces, SAMPLES)
        for name, piece in pieces.items():
            data = piece.data.flip(0) if name != "image" else piece.data.flip(-1)
            after = model.encode(pieces | {name: piece._replace(data=data)}, SAMPLES)
            changed = ~torch.isclose(before, after, atol=1e-4).flatten(1).all(1)
            assert changed.nonzero()[:, 0].tolist() == piece.sample.unique().tolist(), name


def test_what_is_hidden_is_not_seen() -> None:
    """Hidden pixels do not reach the tokens; a mask that is drawn hides its share of each piece, and no padding."""
    model, pieces = tiny().eval(), batch()["pieces"]
    adapter: Any = model.adapters["image"]
    piece = pieces["image"]
    patches, lengths = adapter.patches(piece)
    hidden = adapter.hidden(piece, patches, lengths, 0.5)
    assert torch.equal(hidden.view(3, 8, 8)[:, ::2, ::2], piece.mask)  # cells of two patches
    other = torch.where(hidden[..., None], torch.randn_like(patches), patches)
    assert torch.equal(
        adapter.encode(piece, patches, lengths, hidden).values,
        adapter.encode(piece, other, lengths, hidden).values,
    )
    sounds, spans = model.adapters["audio"].patches(pieces["audio"])  # type: ignore[operator]
    drawn = model.adapters["audio"].hidden(pieces["audio"], sounds, spans, 0.25)  # type: ignore[operator]
    assert drawn.sum(1).tolist() == [10, 4] and spans.tolist() == [
        40,
        16,
    ]  # the short one ends before its padding
    assert not drawn[1, 16:].any()


def test_convolutions_in_front() -> None:
    """Their norm is over the batch: one over a picture would make a bright one of a dark one. Alone is as in a batch when
    they are scored, hidden pixels do not reach them, and a step without pictures leaves their statistics."""
    model, piece = tiny(image_stem="conv"), batch()["pieces"]["image"]
    adapter: Any = model.adapters["image"]
    for side in (64, 96):
        assert adapter.stem(torch.randn(2, 3, side, side)).shape == (
            2,
            TINY.encoder_width,
            side // 8,
            side // 8,
        )
    grey = torch.full((1, 3, 64, 64), 0.2)
    dark, bright = adapter.stem(torch.cat((piece.data, grey, 4 * grey)))[-2:]
    assert (dark - bright).abs().mean() > 0.1

    before = {name: tensor.clone() for name, tensor in adapter.stem.named_buffers()}
    nothing = adapter.stem(piece.data[:0])
    assert nothing.shape == (0, TINY.encoder_width, 8, 8)
    for name, tensor in adapter.stem.named_buffers():
        assert torch.equal(tensor, before[name]) or name.endswith("num_batches_tracked")

    patches, lengths = adapter.eval().patches(piece)
    hidden = adapter.hidden(piece, patches, lengths, 0.5)
    other = torch.where(hidden[..., None], torch.randn_like(patches), patches)
    seen, same = (adapter.encode(piece, x, lengths, hidden).values for x in (patches, other))
    assert torch.equal(seen, same)
    alone = adapter.stem(piece.data[1:2])[0]
    torch.testing.assert_close(alone, adapter.stem(piece.data)[1], rtol=1e-4, atol=1e-5)


def test_masked_share_and_normalizers() -> None:
    model, data = tiny(), batch()
    half = PerceiverObjectives(masked_share=0.5, masked_twice=False)
    counts = count_targets(data["pieces"], SAMPLES, data["mlm_targets"], half)
    assert (counts["mim"], counts["mvm"], counts["mam"]) == (1, 1, 0)  # samples 1, 3, 5 are read hidden
    text = data["pieces"]["text"]
    assert counts["caption"] == sum(int(text.lengths[i]) - 1 for i in (0, 2, 4))
    torch.manual_seed(1)
    mean = model(**data, objectives=half)
    torch.manual_seed(1)
    doubled = model(**data, objectives=half, normalizers={name: 2 * n for name, n in counts.items()})
    for name in ("caption", "mlm", "mim", "itc"):
        torch.testing.assert_close(2 * doubled[name], mean[name])


def test_captioning_looks_back_and_masked_text_both_ways() -> None:
    model = tiny().eval()
    latents = torch.randn(1, TINY.latents, TINY.latent_width)
    first, other = torch.tensor([[BOS, 9, 11, 12, 13]]), torch.tensor([[BOS, 9, 11, 99, 98]])
    told = [model.decoder(tokens, latents, causal=True) for tokens in (first, other)]
    assert torch.equal(told[0][:, :3], told[1][:, :3])
    seen = torch.ones(1, 5, dtype=torch.bool)
    asked = [model.decoder(tokens, latents, causal=False, seen=seen) for tokens in (first, other)]
    assert not torch.allclose(asked[0][:, :3], asked[1][:, :3])


def test_the_cache_gives_the_logits_of_the_whole_text() -> None:
    model = tiny().eval()
    pieces = {name: piece for name, piece in batch()["pieces"].items() if name != "text"}
    with torch.no_grad():
        latents = model.encode(pieces, SAMPLES)
        tokens = torch.randint(5, 200, (SAMPLES, 9))
        whole = model.decoder.logits(model.decoder(tokens, latents, causal=True))
        state = model.start(latents)
        stepwise = torch.stack([model.step(tokens[:, t], state) for t in range(9)], dim=1)
    torch.testing.assert_close(stepwise, whole, rtol=1e-4, atol=1e-4)
    assert len(generate(model, latents, method="beam", max_length=5, beams=2)) == SAMPLES


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_activation_checkpointing_gives_the_same_gradients(stem: str) -> None:
    """And the same statistics of batch norm, as if nothing had been computed twice."""
    results = []
    for on in (False, True):
        model = tiny(image_window=4, encoder_layers=2, dropout=0.1, image_stem=stem).train()
        model.gradient_checkpointing = on
        torch.manual_seed(1)
        sum(model(**batch()).values()).backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None] + list(model.buffers()))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_bf16_autocast_stays_near_fp32() -> None:
    model, data = tiny(), batch()
    torch.manual_seed(1)
    exact = model(**data)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**data)
        sum(rough.values()).backward()
    for name in exact:
        assert rough[name].dtype == torch.float32
        assert rough[name].item() == pytest.approx(exact[name].item(), rel=0.05, abs=0.02), name


def test_the_latent_transformer_compiles_as_one_graph() -> None:
    latent = tiny().latent.eval()
    inputs, offsets = torch.randn(20, TINY.encoder_width), torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    compiled = torch.compile(latent, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs, offsets), latent(inputs, offsets), rtol=1e-4, atol=1e-4)


def test_windows_see_a_window() -> None:
    """One block of windows of 4: a changed pixel reaches the 16 patches around it, and no other."""
    adapter: Any = tiny(image_window=4).adapters["image"].eval()
    images = torch.randn(1, 3, 64, 64)
    other = images.clone()
    other[..., 0, 63] += 1
    first, second = (adapter(Piece(x, torch.tensor([0]))).values.view(8, 8, -1) for x in (images, other))
    changed = (first != second).any(-1)
    assert changed[:4, 4:].all() and changed.sum() == 16


def test_other_image_sizes_and_impossible_ones() -> None:
    model = tiny().eval()
    assert model.encode({"image": Piece(torch.randn(2, 3, 96, 40), torch.tensor([0, 1]))}, 2).shape == (
        2,
        32,
        256,
    )
    with pytest.raises(ValueError, match=r"60x64 pixels; patches are 8x8"):
        model.encode({"image": Piece(torch.randn(1, 3, 60, 64), torch.tensor([0]))}, 1)
    with pytest.raises(ValueError, match=r"80 patches; the longest has 40"):
        model.encode({"audio": packed([torch.randn(32_000)], [0])}, 1)
    with pytest.raises(ValueError, match=r"text of 30 tokens.* up to 24"):
        model.encode({"text": packed([torch.full((30,), 7)], [0])}, 1)
    with pytest.raises(ValueError, match="no adapter for 'smell'"):
        model.encode({"smell": Piece(torch.zeros(1), torch.tensor([0]))}, 1)
    with pytest.raises(ValueError, match="image_size = 60; it must be a multiple of image_patch"):
        PerceiverConfig(image_size=60)
    with pytest.raises(
        ValueError, match=r"image_size = 16; it must be .* at least two patches in each direction"
    ):
        PerceiverConfig(image_size=16, image_patch=16, image_stem="conv")


def test_patches_and_back() -> None:
    x = torch.arange(2 * 3 * 4 * 6 * 8).view(2, 3, 4, 6, 8)
    patches = patchify(x, (2, 3, 4))
    assert torch.equal(patches[1, 5], x[1, :, 2:4, 0:3, 4:8].flatten())
    assert torch.equal(unpatchify(patches, (2, 2, 2), (2, 3, 4)), x)


def test_rotary_positions_are_relative_in_every_direction() -> None:
    cos, sin = (part.view(5, 6, -1) for part in grid_rotary((5, 6), 32, torch.device("cpu")))
    q, k = torch.randn(16, dtype=torch.complex64), torch.randn(16, dtype=torch.complex64)
    turn = torch.complex(cos, sin)

    def score(a: tuple[int, int], b: tuple[int, int]) -> Tensor:
        return (q * turn[a] * (k * turn[b]).conj()).sum().real

    torch.testing.assert_close(score((0, 1), (2, 4)), score((2, 2), (4, 5)))
    assert not torch.isclose(score((0, 1), (2, 4)), score((0, 1), (2, 3)))


def test_log_mel_is_that_of_transformers() -> None:
    utils = pytest.importorskip(
        "transformers.audio_utils", reason="needs transformers: install the test extra"
    )
    filters = utils.mel_filter_bank(513, 128, 0, 8000, 16_000, norm="slaney", mel_scale="slaney")
    waveform = 0.1 * torch.randn(8_000)
    window = utils.window_function(400, "hann")
    want = utils.spectrogram(
        waveform.numpy(), window, 400, 160, fft_length=1024, power=2.0, pad_mode="constant",
        mel_filters=filters, mel_floor=0.0,
    )  # fmt: skip
    found = log_mel(waveform[None], 128)[0]
    torch.testing.assert_close(
        found, torch.from_numpy(want + 1e-10).log().float()[:, :50], rtol=1e-3, atol=1e-3
    )


def test_learned_rows_do_not_decay() -> None:
    model = tiny()
    decayed, kept = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    spared = {names[id(p)] for p in kept["params"]}
    assert {
        "latent.latents",
        "adapters.image.positions",
        "queries.audio.queries",
        "text_pool.query",
    } <= spared
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_the_readme_adds_a_modality_and_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example is run as it stands."""
    text = (Path(__file__).parent.parent / "models" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# A new modality.*?)```", text, re.S)
    scope: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), scope)
    model, latents = scope["model"], scope["latents"]
    assert latents.shape == (2, 32, 256) and scope["beats"].shape == (2, 1, 1)
    scope["beats"].sum().backward()
    build: Callable[[str], Any] = model.get_submodule
    for name in ("adapters.pulse", "queries.beats"):
        still = ("mask_token",)
        assert all(p.grad is not None for n, p in build(name).named_parameters() if not n.endswith(still)), (
            name
        )


def test_embeddings_of_different_inputs_differ_from_the_start() -> None:
    """A model whose latents see the mean of all patches, and more of itself than of its input, gives all pictures one
    embedding (a mean cosine of 0.93 here): contrast then begins a hundred steps late."""
    torch.manual_seed(0)
    model = PerceiverIO(PERCEIVER_SIZES["tiny"]).eval()
    colors = torch.rand(12, 3, 4, 4)
    pictures = torch.nn.functional.interpolate(colors, size=64, mode="bilinear")
    rows = torch.arange(12)
    with torch.no_grad():
        latents = model.encode({"image": Piece((pictures - 0.45) / 0.25, rows)}, 12)
        found = model.embedding(latents, "image")
    alike = (found @ found.T)[~torch.eye(12, dtype=torch.bool)]
    assert alike.mean() < 0.6


def test_word_dropout_hides_words_from_the_contrast_alone() -> None:
    model, given = tiny(text_pooling="words"), batch()
    loss = {}
    for share in (0.0, 0.5, 1.0):
        torch.manual_seed(1)  # the same patches are hidden
        loss[share] = model(**given, objectives=replace(ALL, word_dropout=share))
    for name in set(loss[0.0]) - {"itc", "vtc", "atc"}:
        assert torch.equal(loss[0.0][name], loss[0.5][name]), name
    assert not torch.equal(loss[0.0]["itc"], loss[0.5]["itc"])
    # Without a word all texts are alike: no logit but the bias is left, for 3 pictures and 3 texts.
    bias = model.logit_bias
    expected = (torch.nn.functional.softplus(bias) * 6 + torch.nn.functional.softplus(-bias) * 3) / 3
    torch.testing.assert_close(loss[1.0]["itc"], expected)


def test_contrast_is_with_as_many_texts_as_every_sample_has() -> None:
    model, given = tiny(), batch()
    pieces = {name: given["pieces"][name] for name in ("image", "text")}
    words = [pieces["text"].data[a:b] for a, b in itertools.pairwise(pieces["text"].offsets.tolist())]
    texts = [one for i in (0, 1, 4) for one in (words[i], words[(i + 1) % 6])]
    twice = packed(texts, [0, 0, 1, 1, 4, 4])
    objectives = PerceiverObjectives(
        caption=0.0, mlm=0.0, mim=0.0, mvm=0.0, mam=0.0, contrastive_kind="softmax"
    )

    def itc(text: Piece, agreement: float = 0.0) -> Tensor:
        none, wanted = torch.full_like(text.data, IGNORE), replace(objectives, agreement=agreement)
        return model(pieces | {"text": text}, 6, text.data, none, objectives=wanted)["itc"]

    image = model.embedding(model.encode({"image": pieces["image"]}, 6), "image")[[0, 1, 4]]
    logits = model.logit_scale.exp() * image @ model.text_embedding(twice).T  # [3, 6]
    own = torch.arange(6) // 2
    finding = torch.nn.functional.cross_entropy(logits.T, own)
    naming = -logits.log_softmax(1)[own, torch.arange(6)].view(3, 2).mean(1).mean()
    torch.testing.assert_close(itc(twice), (finding + naming) / 2, atol=1e-5, rtol=1e-5)
    of = model.text_embedding(twice).view(3, 2, -1)
    alike = model.logit_scale.exp() * of[:, 0] @ of[:, 1].T
    agreed = sum(torch.nn.functional.cross_entropy(x, torch.arange(3)) for x in (alike, alike.T)) / 2
    torch.testing.assert_close(itc(twice, 0.5) - itc(twice), 0.5 * agreed, atol=1e-5, rtol=1e-5)
    # One sample has a single text: the first of each counts.
    uneven = packed(texts[:5], [0, 0, 1, 1, 4])
    torch.testing.assert_close(itc(uneven), itc(packed(texts[::2], [0, 1, 4])))


def test_normalizers_may_be_less_than_one() -> None:
    """A count over all ranks is divided by their number: one clip of four ranks is a quarter."""
    model, found = tiny(), []
    for normalizer in (1.0, 0.25):
        torch.manual_seed(1)  # masks of sounds and clips
        found.append(model(**batch(), objectives=ALL, normalizers=dict.fromkeys(ALL.weights(), normalizer)))
    for name, loss in found[0].items():
        assert found[1][name].item() == pytest.approx(4 * loss.item(), rel=1e-6), name
