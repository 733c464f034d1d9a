"""Aurora-Vision: a hierarchical window-attention encoder and a cross-attention text stack, trained by four
objectives.

    images -> SwinEncoder -> four maps -+-> AttentionPool ------------------------> image embedding
    (contrastive)
                                        +-> MemoryProjector -> TextDecoder -------> captions, masked words
                                        +-> reconstruction head ------------------> pixels
                                        (masked images)
                                        +-> FeaturePyramid, QueryHeads -----------> dense maps, boxes, masks

Shapes: B batch, P pairs, U uncaptioned images, K captions per image, T tokens, D decoder width, E joint
space, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import objectives
from models.aurora.config import AuroraConfig
from models.aurora.decoder import TextDecoder
from models.aurora.encoder import STRIDE, SwinBlock, SwinEncoder, WindowAttention
from models.aurora.heads import FeaturePyramid, MemoryProjector, QueryHeads, with_places
from models.layers import AttentionPool, DecodingState, MeanPool, SwiGLU, WordBag
from models.objectives import CachedContrast, Normalizers, ObjectiveConfig
from models.tokens import BOS, EOS, IGNORE, MASK, PAD, SPECIAL

MEMORY_GAIN = (
    2.8  # makes what the memory says of the picture about twice as large as what it says of the place
)


class Aurora(nn.Module):
    """The whole model. `forward` gives the pre-training losses; the other methods are for using it."""

    def __init__(self, config: AuroraConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = SwinEncoder(config)
        self.decoder = TextDecoder(config)
        self.image_pool: AttentionPool | MeanPool
        self.text_pool: AttentionPool | WordBag
        scale = config.layer_scale_init
        if config.image_pooling == "mean":
            self.image_pool = MeanPool(config.stage_widths[3], config.embedding_width)
        else:
            self.image_pool = AttentionPool(
                config.stage_widths[3], config.head_dim, config.embedding_width, layer_scale=scale
            )
        if config.text_pooling == "words":
            self.text_pool = WordBag(config.vocabulary, config.embedding_width, SPECIAL)
        else:
            self.text_pool = AttentionPool(
                config.decoder_width, config.decoder_head_dim, config.embedding_width, layer_scale=scale
            )
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.logit_bias = nn.Parameter(torch.empty(()))
        self.projector = MemoryProjector(config)
        self.pixels = nn.Linear(config.stage_widths[3], 3 * STRIDE * STRIDE)
        self.pyramid = FeaturePyramid(config)
        self.pixel_embedding = nn.Linear(config.pyramid_width, config.embedding_width)
        self.query_heads = QueryHeads(config)
        init_weights(self)

    @property
    def gradient_checkpointing(self) -> bool:
        """Recompute activations in the backward pass instead of keeping them."""
        return self.encoder.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = on

    def forward(
        self,
        pair_images: Tensor,
        tokens: Tensor,
        mlm_tokens: Tensor,
        mlm_targets: Tensor,
        mim_images: Tensor,
        mim_mask: Tensor,
        objectives: ObjectiveConfig | None = None,
        normalizers: Normalizers | None = None,
        contrast: CachedContrast | None = None,
    ) -> dict[str, Tensor]:
        """The losses that are on, unweighted fp32 scalars under "mim", "itc", "caption", "mlm".

        Args:
            pair_images: normalised float [P, 3, height, width]; mim_images [U, 3, height, width], the same
            size.
            tokens: int64 [P*K, T], begin ... end, padded; rows i*K to i*K+K-1 belong to image i.
            mlm_tokens, mlm_targets: int64 [L, T], L <= P*K: the first L captions with hidden words, and
            those words (-100 elsewhere).
            mim_mask: bool [U, height/32, width/32], True = hidden.
            normalizers: denominators of the whole optimizer step; without them each loss is this batch's
            mean.
            contrast: the contrastive loss and its gradients at this batch's embeddings, where they are known already
            ("itc" is then that loss, with those gradients); without it the loss is taken over this batch.
        """
        return pretraining_losses(
            self, pair_images, tokens, mlm_tokens, mlm_targets, mim_images, mim_mask,
            objectives or ObjectiveConfig(), normalizers, contrast,
        )  # fmt: skip

    def embed(
        self,
        pair_images: Tensor,
        tokens: Tensor,
        mim_images: Tensor,
        mim_mask: Tensor,
        objectives: ObjectiveConfig,
    ) -> tuple[Tensor, Tensor]:
        """What `forward` contrasts: fp32 [P, E] of the images and [P*K, E] of the texts, made of the same random numbers
        in the same order."""
        pair_images, tokens = mix_pairs(pair_images, tokens, objectives.itc_mix)
        seen = see(self, pair_images, mim_images, mim_mask, objectives)
        return read(self, seen.pairs, tokens, objectives)[1:]

    def encode_image(self, images: Tensor) -> list[Tensor]:
        """Normalised images [B, 3, height, width] -> four maps [B, H_i, W_i, C_i], strides 4, 8, 16, 32."""
        return self.encoder(images)

    def image_embedding(self, maps: list[Tensor]) -> Tensor:
        """Maps -> fp32 [B, E] of unit length."""
        if isinstance(self.image_pool, MeanPool):
            return self.image_pool(maps[3].flatten(1, 2))
        return self.image_pool(with_places(maps[3]))

    def text_embedding(self, tokens: Tensor) -> Tensor:
        """int64 [B, T] -> fp32 [B, E] of unit length."""
        if isinstance(self.text_pool, WordBag):
            return self.text_pool(tokens)
        return self.text_pool(self.decoder.read_text(tokens, causal=True), tokens != PAD)

    def memory(self, maps: list[Tensor]) -> Tensor:
        """Maps -> what the text stack reads of the image, [B, M, D]."""
        return self.projector(maps)

    def mlm_logits(self, memory: Tensor, mlm_tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of every token of captions with hidden words, given the image."""
        return self.decoder.logits(self.whole_text(mlm_tokens, memory))

    def whole_text(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """int64 [B, T], memory [B, M, D] -> [B, T, D]: the text stack in its bidirectional mode."""
        x = self.decoder.read_text(tokens, causal=False)
        return self.decoder.read_image(x, memory, causal=False, key_mask=tokens != PAD)

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """The picture as predicted where mask bool [B, height/32, width/32] hides it: [B, 3, height,
        width], normalised space."""
        return objectives.unpatchify(self.pixels(self.encoder(images, mask)[3]))

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 3, H, W] -> embeddings, fp32 [B, E] of unit length, and the memory [B, M, D]."""
        maps = self.encode_image(images)
        return self.image_embedding(maps), self.memory(maps)

    def image_memory(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> the memory [B, M, D] that text about them reads."""
        return self.memory(self.encode_image(images))

    def next_words(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """int64 [B, T], memory [B, M, D] -> [B, T, D]: what each place has to say of the word that follows it."""
        return self.decoder.read_image(self.decoder.read_text(tokens, causal=True), memory, causal=True)

    def start(self, memory: Tensor) -> DecodingState:
        """Begin generating captions from memory [B, M, D]."""
        return self.decoder.start(memory)

    def step(self, tokens: Tensor, state: DecodingState) -> Tensor:
        """Logits [B, V] of the token that follows int64 [B]."""
        return self.decoder.step(tokens, state)

    def dense_embedding(self, maps: list[Tensor]) -> Tensor:
        """Maps -> an embedding per stride-4 pixel, [B, E, height/4, width/4], to compare with class texts
        (open vocabulary)."""
        return self.pixel_embedding(self.pyramid(maps)[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def detect(self, maps: list[Tensor], tokens: Tensor) -> Detections:
        """Object queries over image and prompt int64 [B, T]."""
        queries = self.decoder.answer_queries(tokens, self.memory(maps))
        boxes, classes, masks = self.query_heads(queries)
        mask_logits = torch.einsum("bqe,behw->bqhw", masks, self.dense_embedding(maps))
        return Detections(boxes, classes, mask_logits)


@dataclass(frozen=True)
class Detections:
    """What the object queries say: boxes [B, Q, 4] (cx, cy, w, h in 0..1), class embeddings [B, Q, E], mask
    logits [B, Q, height/4, width/4]."""

    boxes: Tensor
    classes: Tensor
    masks: Tensor


@dataclass(frozen=True)
class Seen:
    """What the encoder made of a batch: maps of the pairs, and the last map of the hidden uncaptioned images."""

    pairs: list[Tensor]
    hidden: Tensor


def see(
    model: Aurora, pair_images: Tensor, mim_images: Tensor, mim_mask: Tensor, config: ObjectiveConfig
) -> Seen:
    """Pairs and hidden uncaptioned images go through the encoder together, once; neither does where no objective wants
    it."""
    pairs = len(pair_images) if config.itc or config.caption or config.mlm else 0
    hidden = len(mim_images) if config.mim else 0
    if pairs + hidden == 0:
        raise ValueError(
            f"nothing to train on: {len(pair_images)} captioned and {len(mim_images)} uncaptioned images with {config}; "
            "captioned images feed itc, caption and mlm, uncaptioned ones feed mim"
        )
    images = torch.cat((pair_images[:pairs], mim_images[:hidden]))
    mask = torch.cat((mim_mask.new_zeros(pairs, *mim_mask.shape[1:]), mim_mask[:hidden])) if hidden else None
    maps = model.encoder(images, mask)
    return Seen([level[:pairs] for level in maps], maps[3][pairs:])


def read(
    model: Aurora, maps: list[Tensor], tokens: Tensor, config: ObjectiveConfig
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The captions as the unimodal layers read them, where something wants that; the embeddings of images and texts
    (empty without itc)."""
    text = None
    shared = not config.itc_word_dropout and isinstance(model.text_pool, AttentionPool)
    if config.caption or (config.itc and shared):
        text = model.decoder.read_text(tokens, causal=True)
    if not config.itc:
        return text, maps[3].new_empty(0), maps[3].new_empty(0)
    if shared and isinstance(model.text_pool, AttentionPool):
        embedding = model.text_pool(text, tokens != PAD)
    else:
        embedding = model.text_embedding(drop_words(tokens, config.itc_word_dropout))
    return text, model.image_embedding(maps), embedding


def pretraining_losses(
    model: Aurora,
    pair_images: Tensor,
    tokens: Tensor,
    mlm_tokens: Tensor,
    mlm_targets: Tensor,
    mim_images: Tensor,
    mim_mask: Tensor,
    config: ObjectiveConfig,
    normalizers: Normalizers | None,
    contrast: CachedContrast | None,
) -> dict[str, Tensor]:
    """See `Aurora.forward`. `mix_pairs`, `see` and `read` come first: `Aurora.embed` does what they do."""
    n = normalizers or Normalizers.of(tokens, mlm_targets, mim_mask)
    losses: dict[str, Tensor] = {}
    pair_images, tokens = mix_pairs(pair_images, tokens, config.itc_mix)
    seen = see(model, pair_images, mim_images, mim_mask, config)
    maps, pairs = seen.pairs, len(seen.pairs[3])
    if len(seen.hidden):
        predicted = model.pixels(seen.hidden)
        losses["mim"] = objectives.masked_image_loss(predicted, mim_images, mim_mask) / n.mim_patches
    if not pairs:
        return losses

    text, image_embedding, text_embedding = read(model, maps, tokens, config)
    if contrast is not None:
        losses["itc"] = contrast.at(image_embedding, text_embedding, model.logit_scale, model.logit_bias)
    elif config.itc:
        losses["itc"] = n.itc_share * alignment(model, image_embedding, text_embedding, config)
    if config.caption or config.mlm:
        memory = model.memory(maps)
        captions = len(tokens) // pairs
        if captions > 1:
            memory = memory.repeat_interleave(captions, dim=0)
    weight = model.decoder.embedding.weight
    if config.caption:
        assert text is not None
        inputs = text[:, :-1]
        if config.parallel_caption:
            inputs = model.decoder.read_text(
                hide_captions(tokens[:, :-1], config.parallel_caption), causal=True
            )
        x = model.decoder.read_image(inputs, memory, causal=True)
        targets = tokens[:, 1:].masked_fill(tokens[:, 1:] == PAD, IGNORE)
        losses["caption"] = objectives.token_loss(x, weight, targets, config) / n.caption_tokens
    if config.mlm:
        x = model.whole_text(mlm_tokens, memory[: len(mlm_tokens)])
        losses["mlm"] = objectives.token_loss(x, weight, mlm_targets, config) / n.mlm_tokens
    return losses


def alignment(model: Aurora, images: Tensor, texts: Tensor, config: ObjectiveConfig) -> Tensor:
    """The contrastive loss of images [P, E] and their captions [P*K, E]; with `itc_captions`, also that of each caption
    and the next one of the same image."""
    loss = objectives.contrastive_loss(
        images, texts, model.logit_scale, model.logit_bias, kind=config.itc_kind
    )
    captions = len(texts) // len(images)
    if config.itc_captions and captions > 1:
        texts = texts.unflatten(0, (len(images), captions))
        pairs = [
            objectives.contrastive_loss(
                texts[:, i], texts[:, i - 1], model.logit_scale, model.logit_bias, kind=config.itc_kind
            )
            for i in range(captions)
        ]
        loss = loss + config.itc_captions * torch.stack(pairs).mean()
    return loss


def mix_pairs(images: Tensor, tokens: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Of P images [P, 3, H, W], a random `share`, at most 1/2, get their right or their lower half from other images (as
    CutMix cuts, arXiv:1905.04899), each from one that stays as it is; their captions, int64 [P*K, T], are followed by the
    other one's (as in MixGen, arXiv:2206.08358). That is round(share * P) images, but at least one of two or more.
    Captions come back as [P*K, 2T]; with `share` 0, and of fewer than two images, nothing changes."""
    (pairs, _, height, width), device = images.shape, images.device
    count = min(max(1, round(share * pairs)), pairs // 2) if share else 0
    if not count:
        return images, tokens
    order = torch.randperm(pairs, device=device)
    mixed, others = order[:count], order[count : 2 * count]
    right = torch.arange(width, device=device) >= width // 2
    lower = (torch.arange(height, device=device) >= height // 2).unsqueeze(1)
    taken = torch.where(torch.rand(count, 1, 1, 1, device=device) < 0.5, right, lower)  # [count, 1, H, W]
    images = images.index_copy(0, mixed, torch.where(taken, images[others], images[mixed]))
    captions = tokens.unflatten(0, (pairs, -1))  # [P, K, T]
    more = torch.full_like(captions, PAD)
    more[mixed] = captions[others]
    ends = captions.masked_fill((captions == EOS) & (more[..., :1] == BOS), PAD)
    return images, _closed_up(torch.cat((ends, more.masked_fill(more == BOS, PAD)), dim=2).flatten(0, 1))


def drop_words(tokens: Tensor, share: float) -> Tensor:
    """Captions [B, T] without a random `share` of their words; the others move up, padding follows."""
    words = (tokens != PAD) & (tokens != BOS) & (tokens != EOS)
    dropped = words & (torch.rand(tokens.shape, device=tokens.device) < share)
    return _closed_up(tokens.masked_fill(dropped, PAD))


def _closed_up(tokens: Tensor) -> Tensor:
    """Tokens [B, T] in their order, with all padding behind them."""
    return tokens.gather(1, (tokens == PAD).to(torch.uint8).argsort(dim=1, stable=True))


def hide_captions(tokens: Tensor, share: float) -> Tensor:
    """Replace all words of a random `share` of captions [B, T] by the mask token (parallel prediction,
    CapPa, arXiv:2306.07915)."""
    rows = torch.rand(len(tokens), 1, device=tokens.device) < share
    return torch.where(rows & (tokens != PAD), MASK, tokens)


def init_weights(model: Aurora) -> None:
    """Every initial value of the model, in one place; modules keep torch's own default for norms (gain 1,
    bias 0).

    Linear layers and convolutions: normal with variance 1 / fan_in (LeCun), cut at two sigma. The customary
    0.02 suits widths near
    2,500 only: at Aurora-tiny's 32 channels it shrinks a SwiGLU branch below the epsilon of the norm behind
    it, and nothing is learned.
    Projections into a residual stream need no smaller value, since a LayerScale or a post-norm gain scales
    their branch.
    The projections into the memory: `MEMORY_GAIN` times that. A SwiGLU's output has a variance of 0.36 at most, the places
    added to it one of 0.5, and a text stack that reads more of the place than of the picture learns the language first.
    Embeddings, queries and learned tokens: variance 1 / width; the decoder multiplies the first two by
    sqrt(width).
    The patch stem's bias: standard normal, as large as what it is added to. The LayerNorm behind the stem removes the
    length of its input, so that without a bias a patch and the same patch twice as bright are one and the same.
    Residual post-norms of the encoder: gain `post_norm_init`. Contrastive scale ln `contrastive_scale` and bias
    `contrastive_bias` (SigLIP, arXiv:2303.15343, takes -10, for
    batches of thousands: with 48 texts per image it leaves the loss on its plateau for hundreds of steps).
    Cosine attention starts at scale 10 (SwinV2).
    """
    for module in model.modules():
        match module:
            case nn.Linear() | nn.Conv2d():
                init_layer(module)
            case nn.Embedding():
                normal_(module.weight, module.embedding_dim)
            case AttentionPool():
                normal_(module.query, module.query.shape[-1])
            case SwinBlock():
                nn.init.constant_(module.attention_norm.weight, model.config.post_norm_init)
                nn.init.constant_(module.feed_norm.weight, model.config.post_norm_init)
            case WindowAttention():
                nn.init.zeros_(module.q_bias)
                nn.init.zeros_(module.v_bias)
                nn.init.constant_(module.logit_scale, math.log(10))
    for module in model.projector.modules():
        if isinstance(module, SwiGLU):
            normal_(module.out.weight, module.out.in_features, gain=MEMORY_GAIN)
    if isinstance(model.encoder.stem, nn.Conv2d):
        assert model.encoder.stem.bias is not None
        nn.init.normal_(model.encoder.stem.bias)
    normal_(model.encoder.mask_token, len(model.encoder.mask_token))
    nn.init.constant_(model.logit_scale, math.log(model.config.contrastive_scale))
    nn.init.constant_(model.logit_bias, model.config.contrastive_bias)


def init_layers(head: nn.Module) -> None:
    """The same for the linear layers and convolutions of a task's head."""
    for module in head.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            init_layer(module)


def init_layer(module: nn.Linear | nn.Conv2d) -> None:
    """Weights as `init_weights` says, no bias."""
    normal_(module.weight, module.weight[0].numel())
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def normal_(weight: Tensor, fan_in: int, gain: float = 1.0) -> None:
    """Fill with a normal of deviation gain / sqrt(fan_in), cut at two sigma."""
    std = gain * fan_in**-0.5
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
