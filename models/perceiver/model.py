"""PerceiverIO-Multimodal from outside to inside: tensors of any subset of modalities in, latents, losses or embeddings out.

    images ----> ImageAdapter --+
    waveforms -> audio_adapter -+  packed, sample     LatentTransformer      +-> EmbeddingQueries -> joint space, labels
    frames ----> VideoAdapter --+  by sample      --> [B, M, D]           ---+-> PatchQueries -----> pixels, spectrograms
    tokens ----> TextAdapter ---+                                            +-> TextDecoder ------> captions, masked words
                     +-> AttentionPool -> joint space

Letters: B samples, P pieces of a modality, S texts, M latents, D their width, E joint space, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from models.layers import AttentionPool, DecodingState, WordBag
from models.objectives import CachedContrast
from models.perceiver.adapters import Adapter, ImageAdapter, TextAdapter, VideoAdapter, audio_adapter
from models.perceiver.config import PerceiverConfig
from models.perceiver.contrast import Pairs
from models.perceiver.latents import InputRead, LatentTransformer
from models.perceiver.objectives import PerceiverObjectives, pretraining_losses, read
from models.perceiver.pieces import Piece, Tokens, join, packed, padded, visible
from models.perceiver.queries import EmbeddingQueries, PatchQueries, QueryDecoder, TextDecoder
from models.tokens import MASK, PAD, SPECIAL


class PerceiverIO(nn.Module):
    """The whole model. `forward` gives the pre-training losses; the other methods are for using it.

    `adapters` and `queries` are open: put a new modality's Adapter into the first, a new task's QueryDecoder into the
    second, under its name.
    """

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.config = config
        self.adapters = nn.ModuleDict(
            {"image": ImageAdapter(config), "audio": audio_adapter(config), "video": VideoAdapter(config)}
        )
        self.text = TextAdapter(config)
        self.latent = LatentTransformer(config)
        self.queries = nn.ModuleDict(
            {
                name: PatchQueries(config, cast(Adapter, self.adapters[name]).grid, config.patch_widths[name])
                for name in self.adapters
            }
        )
        self.embeddings = EmbeddingQueries(config)
        self.decoder = TextDecoder(config, self.text.embedding)
        self.text_pool: AttentionPool | WordBag
        if config.text_pooling == "words":
            self.text_pool = WordBag(config.vocabulary, config.embedding_width, SPECIAL)
        else:
            self.text_pool = AttentionPool(
                config.text_width, config.encoder_head_dim, config.embedding_width, layer_scale=config.layer_scale_init
            )  # fmt: skip
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.logit_bias = nn.Parameter(torch.empty(()))
        init_weights(self)

    @property
    def gradient_checkpointing(self) -> bool:
        """Recompute activations in the backward pass instead of keeping them."""
        return self.latent.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, Adapter | TextAdapter | LatentTransformer | QueryDecoder | TextDecoder):
                module.gradient_checkpointing = on

    def forward(
        self,
        pieces: Mapping[str, Piece],
        samples: int,
        mlm_tokens: Tensor,
        mlm_targets: Tensor,
        labels: Tensor | None = None,
        label_sample: Tensor | None = None,
        objectives: PerceiverObjectives | None = None,
        normalizers: Mapping[str, float] | None = None,
        contrast: Mapping[str, CachedContrast] | None = None,
    ) -> dict[str, Tensor]:
        """The losses that are on, unweighted fp32 scalars, by the names in `PerceiverObjectives.weights`.

        A loss is there whether or not the batch has anything for it: then it is 0, and its gradients are 0. So all
        processes of a distributed run have the same graph. Contrastive losses are over the pairs of all processes, which may
        have different numbers of them: where torch.distributed has several, all call this together.

        Args:
            pieces: "image", "audio", "video", "text" -> Piece; a modality that the batch lacks may be left out, and
                within a modality `sample` rises. Contrast is with the first K texts of a sample, where each has K or more.
            samples: B.
            mlm_tokens, mlm_targets: int64 [N], packed as the text is: its tokens with hidden words, and those words
                (-100 elsewhere).
            labels, label_sample: float [L, C], and int64 [L]: the sample of each row.
            normalizers: denominators of the whole optimizer step (`count_targets`); None: each loss is this batch's mean.
            contrast: the contrastive losses, by name, and their gradients at this batch's embeddings, where they are known
                already; without it they are taken over this batch.
        """
        return pretraining_losses(
            self, pieces, samples, mlm_tokens, mlm_targets, labels, label_sample,
            objectives or PerceiverObjectives(), normalizers, contrast,
        )  # fmt: skip

    def embed(
        self, pieces: Mapping[str, Piece], samples: int, mlm_tokens: Tensor, objectives: PerceiverObjectives, texts: int
    ) -> Mapping[str, Pairs]:  # fmt: skip
        """What `forward` contrasts, by the name of the loss: fp32 [Q, E] of samples, and [Q, K, E] of their first K = `texts`
        texts, made of the same random numbers in the same order."""
        return read(self, self.complete(pieces), samples, mlm_tokens, objectives, texts).pairs

    def encode(self, pieces: Mapping[str, Piece], samples: int) -> Tensor:
        """Latents [B, M, D] of samples with any modalities, text too."""
        parts = []
        for name, piece in pieces.items():
            if name != "text" and name not in self.adapters:
                raise ValueError(f"no adapter for {name!r}; there are {', '.join(self.adapters)} and text")
            tokens: Tokens = self.text(piece) if name == "text" else self.adapters[name](piece)
            parts.append((tokens, piece.sample))
        if not parts:
            raise ValueError("no modality to encode")
        return self.latent(*join(parts, samples))

    def embedding(self, latents: Tensor, modality: str) -> Tensor:
        """Latents of samples read without their text -> fp32 [B, E] of unit length; modality "image", "video", "audio"."""
        return self.embeddings.embedding(latents, modality)

    def text_embedding(self, text: Piece | Tensor) -> Tensor:
        """Texts, packed or int64 [S, T] with padding -> fp32 [S, E] of unit length."""
        return self.pool_text(packed(text) if isinstance(text, Tensor) else text, None)

    def pool_text(self, text: Piece, states: Tokens | None) -> Tensor:
        """The same; states of the text encoder, where they are there already."""
        if isinstance(self.text_pool, WordBag):
            return self.text_pool(padded(text.data, text.lengths))
        values, lengths = states or self.text.read(text)
        return self.text_pool(values, visible(lengths, values.shape[1]))

    def word_logits(
        self, pieces: Mapping[str, Piece], masked: Piece, samples: int, *, blind: bool = False
    ) -> Tensor:
        """Texts with hidden words, each of a sample of its own -> logits [S, T, V] of every place, padded to the longest.

        pieces: all else that is in the samples; the latents read the texts along. blind: the decoder is not given the words
        that are not hidden (`PerceiverObjectives.blind_mlm`).
        """
        latents = self.encode({**pieces, "text": masked}, samples)
        tokens = padded(masked.data, masked.lengths)
        seen = visible(masked.lengths, tokens.shape[1])
        shown = tokens.masked_fill(seen, MASK) if blind else tokens
        return self.decoder.logits(self.decoder(shown, latents[masked.sample], causal=False, seen=seen))

    def patch_queries(self, modality: str) -> PatchQueries:
        """The decoder of a modality's patches."""
        return cast(PatchQueries, self.queries[modality])

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 3, H, W] -> embeddings, fp32 [B, E] of unit length, and the latents [B, M, D]."""
        latents = self.image_memory(images)
        return self.embedding(latents, "image"), latents

    def image_memory(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> the latents [B, M, D] that text about them reads."""
        samples = torch.arange(len(images), device=images.device)
        return self.encode({"image": Piece(images, samples)}, len(images))

    def next_words(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """int64 [B, T], latents [B, M, D] -> [B, T, W]: what each place has to say of the word that follows it."""
        return self.decoder(tokens, latents, causal=True)

    def whole_text(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """The same, each place having read the words behind it too."""
        return self.decoder(tokens, latents, causal=False, seen=tokens != PAD)

    def start(self, latents: Tensor) -> DecodingState:
        """Begin generating text from latents [B, M, D]."""
        return self.decoder.start(latents)

    def step(self, tokens: Tensor, state: DecodingState) -> Tensor:
        """Logits [B, V] of the token that follows int64 [B]."""
        return self.decoder.step(tokens, state)

    def complete(self, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
        """All modalities: an empty one for each that is not there."""
        device = self.logit_scale.device
        unknown = set(pieces) - set(self.adapters) - {"text"}
        if unknown:
            raise ValueError(
                f"no adapter for {sorted(unknown)}; there are {', '.join(self.adapters)} and text"
            )
        known = {name: cast(Adapter, adapter).empty(device) for name, adapter in self.adapters.items()}
        return known | {"text": self.text.empty(device)} | dict(pieces)


def init_weights(model: nn.Module) -> None:
    """Every initial value of the model, or of an adapter or query decoder made later, in one place; norms keep torch's
    default (gain 1, bias 0), and LayerScales what the configuration says.

    Linear layers and convolutions: normal with variance 1 / fan_in (LeCun), cut at two sigma; biases 0.
    Token embeddings: variance 1 / width; they are multiplied by sqrt(width).
    What a stream of tokens starts from: standard normal for mask tokens and for output queries of places; for learned
    positions a quarter of that variance, as they are added to tokens of variance 1.
    What all samples share is small, where a sample is to be told from others: 0.1 for latents and embedding queries, 0.02
    for kinds of modality. And the queries of the input reads have a gain of 3: with 1 a latent sees about the mean of all
    its inputs. Otherwise the embeddings of any two pictures start with a cosine of 0.99, and contrast begins late.
    The pooling query: variance 1 / width, as in Aurora. Contrastive scale ln `contrastive_scale`, bias `contrastive_bias`.
    """
    for module in model.modules():
        match module:
            case nn.Linear() | nn.Conv2d():
                normal_(module.weight, module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            case nn.Embedding():
                normal_(module.weight, module.embedding_dim**-0.5)
            case AttentionPool():
                normal_(module.query, module.query.shape[-1] ** -0.5)
            case LatentTransformer():
                normal_(module.latents, 0.1)
            case InputRead():
                nn.init.constant_(module.attention.q_norm.weight, 3.0)
            case EmbeddingQueries():
                normal_(module.queries, 0.1)
            case QueryDecoder():
                normal_(module.queries, 1.0)
            case Adapter():
                normal_(module.mask_token, 1.0)
                normal_(module.positions, 0.5)
                normal_(module.kind, 0.02)
            case TextAdapter():
                normal_(module.kind, 0.02)
            case PerceiverIO():
                nn.init.constant_(module.logit_scale, math.log(module.config.contrastive_scale))
                nn.init.constant_(module.logit_bias, module.config.contrastive_bias)


def normal_(weight: Tensor, std: float) -> None:
    """Fill with a normal of this deviation, cut at two of it."""
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
