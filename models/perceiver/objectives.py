"""What PerceiverIO is pre-trained on: one function, tensors in, losses out.

A sample is read once as it is, and once with parts of it hidden; both readings run through encoders and latents together.

    as it is (all but text) -> embedding queries --contrast with text--> itc, vtc, atc      -> text decoder -> caption
                            -> label query -----------------------------> label
    parts hidden (all)      -> patch queries ---------------------------> mim, mvm, mam     -> text decoder -> mlm

Letters: B samples, P pieces of a modality, S texts, R readings, M latents, D their width, E joint space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers import WordBag
from models.objectives import CachedContrast, ObjectiveConfig, token_loss
from models.perceiver.adapters import Adapter
from models.perceiver.contrast import (
    ANY,
    CONTRASTS,
    Pairs,
    alignment,
    among_first,
    fewest_texts,
    first_pieces,
    over_ranks,
)
from models.perceiver.pieces import Piece, Tokens, join, padded, together, visible
from models.tokens import IGNORE, MASK, PAD, SPECIAL

if TYPE_CHECKING:
    from models.perceiver.model import PerceiverIO

MASKED = {"mim": "image", "mvm": "video", "mam": "audio"}
WHOLE = (*CONTRASTS, "caption", "label")
"""Losses that are read off the samples as they are."""


@dataclass(frozen=True)
class PerceiverObjectives:
    """Weights of the losses; a weight of 0 turns one off and it is not computed."""

    itc: float = 1.0
    """Image-text contrastive loss."""
    vtc: float = 1.0
    """Video-text contrastive loss."""
    atc: float = 1.0
    """Audio-text contrastive loss."""
    caption: float = 2.0
    """Generation of a sample's texts from its other modalities: next-token cross-entropy."""
    mlm: float = 1.0
    """Masked language modelling, given all that is in the sample."""
    mim: float = 1.0
    """Hidden patches of images."""
    mvm: float = 1.0
    """Hidden tubelets of videos."""
    mam: float = 1.0
    """Hidden patches of sounds."""
    label: float = 0.0
    """Classes of a sample (multi-label)."""
    contrastive_kind: Literal["sigmoid", "softmax"] = "sigmoid"
    """Sigmoid (SigLIP) or softmax (CLIP) contrastive losses."""
    word_dropout: float = 0.0
    """Chance of each token of a text to be hidden from the contrastive losses, drawn anew at each step (0.3 to 0.5 keeps a
    small data set from being learned by heart)."""
    agreement: float = 0.0
    """Weight, within the contrastive losses, of a contrast between the texts of one sample, where each has 2 or more: what
    they share is what a picture can tell."""
    masked_share: float = 1.0
    """Share of the samples, evenly spread over the micro-batch, that are read with hidden parts."""
    masked_twice: bool = True
    """Whether those are read as they are too. Without, a sample goes through the latents once."""
    mask_ratio: float = 0.6
    """Share of the patches that is hidden where a piece brings no mask."""
    blind_mlm: bool = False
    """Masked text is asked for by place alone, so that the words around come from the latents (Perceiver IO's way);
    False: the decoder is given the words that are not hidden."""
    parallel_caption: float = 0.0
    """Share of texts whose input words are all hidden from the decoder (CapPa, arXiv:2306.07915)."""
    label_smoothing: float = 0.0
    """Label smoothing of the caption and masked-language losses."""
    z_loss: float = 1e-4
    """Weight of log(Z)^2 in the token losses."""

    def __post_init__(self) -> None:
        for name in (*self.weights(), "z_loss", "agreement"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"PerceiverObjectives.{name} = {getattr(self, name)}; weights are 0 (off) or positive"
                )
        for name in ("word_dropout", "masked_share", "mask_ratio", "parallel_caption", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"PerceiverObjectives.{name} = {getattr(self, name)}; it is a share, 0 to 1")
        if self.contrastive_kind not in ("sigmoid", "softmax"):
            raise ValueError(f"contrastive_kind {self.contrastive_kind!r}; supported: 'sigmoid', 'softmax'")

    def weights(self) -> dict[str, float]:
        """The weight of each loss by its name."""
        names = (*CONTRASTS, "caption", "mlm", *MASKED, "label")
        return {name: getattr(self, name) for name in names}

    def token_options(self) -> ObjectiveConfig:
        """What `models.objectives.token_loss` wants to know."""
        return ObjectiveConfig(label_smoothing=self.label_smoothing, z_loss=self.z_loss)


@dataclass(frozen=True)
class Readings:
    """Which samples are read how. Reading 0..W-1 are whole samples, the others have hidden parts."""

    whole: Tensor
    """int64 [B]: the reading of each sample as it is, -1 where there is none"""
    hidden: Tensor
    """int64 [B]: the same with hidden parts"""
    number_whole: int
    number: int

    @classmethod
    def of(cls, pieces: Mapping[str, Piece], samples: int, config: PerceiverObjectives) -> Readings:
        """Every sample with something else than text is read whole; `masked_share` of all of them hidden."""
        device = pieces["text"].sample.device
        weights = config.weights()
        some = torch.zeros(samples, dtype=torch.bool, device=device)
        for name, piece in pieces.items():
            if name != "text":
                some[piece.sample] = True
        place = torch.arange(samples, device=device, dtype=torch.float64)
        hidden = ((place + 1) * config.masked_share).floor() > (place * config.masked_share).floor()
        hidden &= any(weights[name] for name in (*MASKED, "mlm"))
        whole = some & any(weights[name] for name in WHOLE)
        if not config.masked_twice:
            whole &= ~hidden
        first = int(whole.sum())
        numbers = torch.where(whole, whole.cumsum(0) - 1, -1)
        others = torch.where(hidden, first + hidden.cumsum(0) - 1, -1)
        return cls(numbers, others, first, first + int(hidden.sum()))


def count_targets(
    pieces: Mapping[str, Piece],
    samples: int,
    mlm_targets: Tensor,
    config: PerceiverObjectives,
    label_sample: Tensor | None = None,
) -> dict[str, int]:
    """What each loss of this micro-batch is a sum over, by its name; summed over a step's micro-batches and ranks these are
    its `normalizers`. Contrastive losses are means already and count 1."""
    readings = Readings.of(pieces, samples, config)
    text = pieces["text"]
    tokens = padded(text.data, text.lengths)
    whole, hidden = readings.whole[text.sample] >= 0, readings.hidden[text.sample] >= 0
    targets = padded(mlm_targets - IGNORE, text.lengths) + IGNORE
    counts = {
        "caption": int((tokens[whole][:, 1:] != PAD).sum()),
        "mlm": int((targets[hidden] != IGNORE).sum()),
        "label": 0 if label_sample is None else int((readings.whole[label_sample] >= 0).sum()),
        **dict.fromkeys(CONTRASTS, 1),
    }
    for loss, name in MASKED.items():
        asked = firsts(pieces[name].sample, samples) if name in pieces else text.sample[:0]
        counts[loss] = int((readings.hidden[asked] >= 0).sum())
    return counts


def firsts(sample: Tensor, samples: int) -> Tensor:
    """The samples that have a piece, int64, each once, rising."""
    return (
        torch.zeros(samples, dtype=torch.bool, device=sample.device)
        .index_fill(0, sample, True)
        .nonzero()[:, 0]
    )


@dataclass(frozen=True)
class Read:
    """A micro-batch as the latents have read it."""

    readings: Readings
    asked: Mapping[str, tuple[Tensor, Tensor, Tensor]]
    """by modality: what its masked objective asks for (`read_pieces`)"""
    masked: Piece
    """texts with hidden words, of readings"""
    masked_rows: Tensor
    """int64: their numbers among the texts"""
    latents: Tensor
    """[R, M, D]"""
    found: Tensor | None
    """[W, 4, E]: embedding queries of the whole samples, where something wants them"""
    pairs: Mapping[str, Pairs]
    """what is contrasted, by the name of the loss"""


def read(
    model: PerceiverIO, pieces: Mapping[str, Piece], samples: int, mlm_tokens: Tensor, config: PerceiverObjectives,
    texts: int,
) -> Read:  # fmt: skip
    """Encoders, latents and embeddings; `texts` of each sample are contrasted. pieces: all modalities (`complete`)."""
    weights = config.weights()
    readings = Readings.of(pieces, samples, config)
    text = pieces["text"]
    parts: list[tuple[Tokens, Tensor]] = []
    asked: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, adapter in model.adapters.items():
        assert isinstance(adapter, Adapter)
        tokens, reading, asked[name] = read_pieces(adapter, pieces[name], readings, config)
        parts.append((tokens, reading))
    wanted = (readings.whole[text.sample] >= 0) & among_first(text.sample, texts)
    contrasted = text.select(wanted.nonzero()[:, 0], text.sample[wanted])
    if config.word_dropout:
        dropped = torch.rand(contrasted.data.shape, device=contrasted.data.device) < config.word_dropout
        data = torch.where(dropped & (contrasted.data >= SPECIAL), MASK, contrasted.data)
        contrasted = contrasted._replace(data=data)
    masked_rows = (readings.hidden[text.sample] >= 0).nonzero()[:, 0]
    masked = text._replace(data=mlm_tokens).select(masked_rows, readings.hidden[text.sample[masked_rows]])
    # A bag of words reads the words themselves: only the masked texts need the encoder.
    bag = isinstance(model.text_pool, WordBag)
    states = model.text.read(masked if bag else together(contrasted, masked))
    n = 0 if bag else len(contrasted.sample)
    parts.append((model.text.inputs(Tokens(states.values[n:], states.lengths[n:])), masked.sample))
    latents = model.latent(*join(parts, readings.number))

    found, pairs = None, {}
    if config.label or any(weights[name] for name in CONTRASTS):
        found = model.embeddings(latents[: readings.number_whole])
    if found is not None and any(weights[name] for name in CONTRASTS):
        pooled = model.pool_text(contrasted, Tokens(states.values[:n], states.lengths[:n]))
        each = 1 if texts == ANY else texts
        for loss, name in CONTRASTS.items():
            if weights[loss]:
                pairs[loss] = paired(
                    found, pooled, contrasted.sample, pieces[name].sample, readings, samples, name, each
                )
    return Read(readings, asked, masked, masked_rows, latents, found, pairs)


def pretraining_losses(
    model: PerceiverIO,
    pieces: Mapping[str, Piece],
    samples: int,
    mlm_tokens: Tensor,
    mlm_targets: Tensor,
    labels: Tensor | None,
    label_sample: Tensor | None,
    config: PerceiverObjectives,
    normalizers: Mapping[str, float] | None,
    contrast: Mapping[str, CachedContrast] | None,
) -> dict[str, Tensor]:
    """See `PerceiverIO.forward`. `read` comes first: `PerceiverIO.embed` does what it does."""
    weights = config.weights()
    pieces = model.complete(pieces)
    text = pieces["text"]
    counts = normalizers or count_targets(pieces, samples, mlm_targets, config, label_sample)
    # A count over ranks, divided by their number, may be below 1: only where there is nothing it must not be 0.
    totals = counts if normalizers else {name: max(n, 1) for name, n in counts.items()}
    if contrast:
        texts = next(iter(contrast.values())).text.shape[1]
    else:
        texts = fewest_texts(text.sample)
        if any(weights[name] for name in CONTRASTS):
            texts = over_ranks(texts, text.data.device)
    was = read(model, pieces, samples, mlm_tokens, config, texts)
    readings, latents = was.readings, was.latents

    nothing = latents.sum() * 0
    known = {
        loss: cached.at(*was.pairs[loss], model.logit_scale, model.logit_bias) + nothing
        for loss, cached in (contrast or {}).items()
    }
    losses: dict[str, Tensor] = {}
    if not contrast:
        losses = {loss: one + nothing for loss, one in alignment(model, was.pairs, config).items()}
    if config.label and labels is not None and label_sample is not None:
        assert was.found is not None
        reading = readings.whole[label_sample]
        logits = model.embeddings.classes(was.found[:, 3][reading[reading >= 0]]).float()
        targets = labels[reading >= 0].float()
        losses["label"] = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1).sum()
    if config.caption:
        losses["caption"] = caption_loss(model, text, readings, latents, config)
    if config.mlm:
        losses["mlm"] = masked_text_loss(
            model, was.masked, text, was.masked_rows, mlm_targets, latents, config
        )
    for loss, name in MASKED.items():
        if weights[loss]:
            patches, hidden, reading = was.asked[name]
            losses[loss] = model.patch_queries(name).loss(latents[reading], patches, hidden)
    return known | {name: loss / totals[name] for name, loss in losses.items()}


def read_pieces(
    adapter: Adapter, piece: Piece, readings: Readings, config: PerceiverObjectives
) -> tuple[Tokens, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The tokens of a modality in all readings, their readings int64 [P'], and what its masked objective asks for: patches
    [Q, n, F], hidden bool [Q, n], readings int64 [Q]."""
    whole = (readings.whole[piece.sample] >= 0).nonzero()[:, 0]
    hidden = (readings.hidden[piece.sample] >= 0).nonzero()[:, 0]
    first, owner = len(whole), piece.sample
    rows = torch.cat((whole, hidden))
    reading = torch.cat((readings.whole[owner[whole]], readings.hidden[owner[hidden]]))
    both = piece.select(rows, reading)
    patches, lengths = adapter.patches(both)
    mask = adapter.hidden(both, patches, lengths, config.mask_ratio)
    mask = mask & (torch.arange(len(rows), device=mask.device) >= first)[:, None]
    tokens = adapter.encode(both, patches, lengths, mask)
    # The queries of a place are the same for every piece of a sample: the first is asked for.
    asked = first + first_pieces(owner[hidden]).nonzero()[:, 0]
    return tokens, reading, (patches[asked], mask[asked], reading[asked])


def paired(
    found: Tensor, texts: Tensor, text_sample: Tensor, sample: Tensor, readings: Readings, samples: int, name: str,
    each: int,
) -> Pairs:  # fmt: skip
    """Embeddings of the samples that have both this modality and texts, and of those texts, `each` of a sample."""
    from models.perceiver.queries.embeddings import NAMES

    has = torch.zeros(samples, dtype=torch.bool, device=sample.device).index_fill(0, sample, True)
    pair = has[text_sample]
    owners = text_sample[pair & first_pieces(text_sample)]
    image = F.normalize(found[readings.whole[owners], NAMES.index(name)].float(), dim=-1)
    return image, texts[pair].unflatten(0, (len(owners), each))


def caption_loss(
    model: PerceiverIO, text: Piece, readings: Readings, latents: Tensor, config: PerceiverObjectives
) -> Tensor:
    """Sum over the tokens of all texts of samples that have something to tell them from."""
    rows = (readings.whole[text.sample] >= 0).nonzero()[:, 0]
    told = text.select(rows, readings.whole[text.sample[rows]])
    tokens = padded(told.data, told.lengths)  # PAD is 0
    inputs = tokens[:, :-1] if tokens.shape[1] > 1 else tokens
    targets = F.pad(tokens, (0, 1))[:, 1 : inputs.shape[1] + 1]
    if config.parallel_caption:
        rows = torch.rand(len(inputs), 1, device=inputs.device) < config.parallel_caption
        inputs = torch.where(rows & (inputs != PAD), MASK, inputs)
    x = model.decoder(inputs, latents[told.sample], causal=True)
    targets = targets.masked_fill(targets == PAD, IGNORE)
    return token_loss(x, model.decoder.embedding.weight, targets, config.token_options())


def masked_text_loss(
    model: PerceiverIO, masked: Piece, text: Piece, rows: Tensor, targets: Tensor, latents: Tensor,
    config: PerceiverObjectives,
) -> Tensor:  # fmt: skip
    """Sum over the words that are asked for."""
    tokens = padded(masked.data, masked.lengths)
    wanted = text._replace(data=targets).select(rows, masked.sample)
    asked = padded(wanted.data - IGNORE, wanted.lengths) + IGNORE
    seen = visible(masked.lengths, tokens.shape[1])
    if config.blind_mlm:
        tokens = tokens.masked_fill(seen, MASK)
    x = model.decoder(tokens, latents[masked.sample], causal=False, seen=seen)
    return token_loss(x, model.decoder.embedding.weight, asked, config.token_options())
