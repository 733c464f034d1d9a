"""The pre-training objectives: tensors in, losses out.

Each returns a sum (or, for the contrastive loss, a mean over its micro-batch), so that gradient
accumulation can divide by the
denominators of the whole optimizer step and equal the large batch exactly.

Shapes: P images, K captions per image, E joint space, U uncaptioned images, N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

import kernels
from models.tokens import IGNORE, PAD


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the losses; a weight of 0 turns one off and it is not computed."""

    mim: float = 1.0
    """Masked image modelling on uncaptioned images (SimMIM: L1 on hidden 32x32-pixel patches)."""
    itc: float = 1.0
    """Image-text contrastive loss."""
    caption: float = 2.0
    """Image-to-text generation: next-token cross-entropy."""
    mlm: float = 1.0
    """Masked language modelling of captions, given the image."""
    itc_kind: Literal["sigmoid", "softmax"] = "sigmoid"
    """Sigmoid (SigLIP) or softmax (CLIP) contrastive loss."""
    itc_word_dropout: float = 0.0
    """Chance of each token of a caption to be left out of what the contrastive loss reads, drawn anew at each step
    (0.3 to 0.5 keeps a small data set from being learned by heart)."""
    itc_captions: float = 0.0
    """Weight, within the contrastive loss, of a contrast between the captions of one image (with captions_per_image of 2
    or more): what they share is what a picture can tell."""
    itc_mix: float = 0.0
    """Share of a micro-batch's pairs, up to a half and at least one, that become two in one: the right or the lower half of
    their picture is another pair's, whose captions follow their own (CutMix, arXiv:1905.04899, with captions as in MixGen,
    arXiv:2206.08358). Not with caption or mlm, whose words are of one picture."""
    parallel_caption: float = 0.0
    """Share of captions whose input words are all hidden, so that every word must come from the image
    (CapPa)."""
    label_smoothing: float = 0.0
    """Label smoothing of the captioning and masked-language losses."""
    z_loss: float = 1e-4
    """Weight of log(Z)^2 in the token losses; keeps logits from drifting (PaLM, arXiv:2204.02311)."""

    def __post_init__(self) -> None:
        for name in ("mim", "itc", "caption", "mlm", "z_loss", "itc_captions"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"ObjectiveConfig.{name} = {getattr(self, name)}; weights are 0 (off) or positive"
                )
        for name in ("itc_word_dropout", "parallel_caption", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"ObjectiveConfig.{name} = {getattr(self, name)}; it is a share between 0 and 1"
                )
        if not 0 <= self.itc_mix <= 0.5:
            raise ValueError(f"ObjectiveConfig.itc_mix = {self.itc_mix}; it is a share between 0 and 0.5")
        if self.itc_mix and (self.caption or self.mlm or not self.itc):
            raise ValueError(
                f"ObjectiveConfig.itc_mix = {self.itc_mix} with itc = {self.itc}, caption = {self.caption}, mlm = {self.mlm}: "
                "mixed pairs are for itc, and not for caption and mlm; set itc_mix to 0, or those two"
            )
        if self.itc_kind not in ("sigmoid", "softmax"):
            raise ValueError(f"ObjectiveConfig.itc_kind = {self.itc_kind!r}; supported: 'sigmoid', 'softmax'")

    def weights(self) -> dict[str, float]:
        """The weight of each loss by its name."""
        return {"mim": self.mim, "itc": self.itc, "caption": self.caption, "mlm": self.mlm}


@dataclass(frozen=True)
class Normalizers:
    """Denominators of one optimizer step: over all its micro-steps and ranks, never of one micro-batch
    alone."""

    caption_tokens: float
    mlm_tokens: float
    mim_patches: float
    itc_share: float = 1.0
    """What one micro-batch's contrastive mean weighs in the step: 1 / number of micro-steps."""

    @classmethod
    def of(cls, tokens: Tensor, mlm_targets: Tensor, mim_mask: Tensor) -> Normalizers:
        """Those of a single batch."""
        return cls(*(max(float(n), 1.0) for n in count(tokens, mlm_targets, mim_mask)))


@dataclass(frozen=True)
class CachedContrast:
    """A contrastive loss that was taken over more than one micro-batch: what falls to this one (GradCache,
    arXiv:2101.06983)."""

    loss: Tensor
    """This micro-batch's share, fp32 scalar."""
    image: Tensor
    """Gradient at its image embeddings [P, E]."""
    text: Tensor
    """Gradient at its text embeddings [P*K, E]."""
    logit_scale: Tensor
    logit_bias: Tensor
    """Its shares of the gradients of logit_scale and logit_bias, scalars."""

    def at(self, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        """A scalar with this loss and these gradients."""
        given = (image, text, logit_scale, logit_bias)
        grads = (self.image, self.text, self.logit_scale, self.logit_bias)
        product = torch.stack([(x * grad).sum() for x, grad in zip(given, grads, strict=True)]).sum()
        return product + (self.loss - product.detach())


def count(tokens: Tensor, mlm_targets: Tensor, mim_mask: Tensor) -> tuple[int, int, int]:
    """How many caption tokens are predicted, words asked for, and patches hidden in a batch."""
    return int((tokens[:, 1:] != PAD).sum()), int((mlm_targets != IGNORE).sum()), int(mim_mask.sum())


def masked_image_loss(predicted: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Sum over hidden patches of the mean absolute error of their pixels (SimMIM, arXiv:2111.09886, section
    3.4).

    predicted [U, H, W, 3*s*s] per patch of side s, images normalised [U, 3, H*s, W*s], mask bool [U, H, W].
    """
    error = (predicted.float() - patchify(images.float(), predicted.shape[1])).abs().mean(dim=-1)
    return (error * mask).sum()


def patchify(images: Tensor, rows: int) -> Tensor:
    """[U, 3, height, width] -> [U, H, W, 3*s*s] with H = rows and s = height / rows."""
    batch, channels, height, width = images.shape
    side = height // rows
    x = images.reshape(batch, channels, rows, side, width // side, side)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows, width // side, channels * side * side)


def unpatchify(patches: Tensor) -> Tensor:
    """[U, H, W, 3*s*s] -> [U, 3, H*s, W*s]."""
    batch, rows, columns, size = patches.shape
    side = round((size / 3) ** 0.5)
    x = patches.reshape(batch, rows, columns, 3, side, side).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(batch, 3, rows * side, columns * side)


def token_loss(x: Tensor, weight: Tensor, targets: Tensor, config: ObjectiveConfig) -> Tensor:
    """Sum of the cross-entropies (and z-losses) of the tokens that have a target.

    x [..., D], weight [V, D] of the tied embedding, targets int64 [...] with -100 where there is none.
    Logits exist for a few tokens at a time, and only for those with a target; 0 where none has.
    """
    wanted = targets != IGNORE
    return kernels.linear_cross_entropy(
        x[wanted], weight, targets[wanted], ignore_index=IGNORE, label_smoothing=config.label_smoothing,
        z_loss=config.z_loss, reduction="sum",
    )  # fmt: skip


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    kind: Literal["sigmoid", "softmax"],
) -> Tensor:
    """`kernels.contrastive_loss` of unit vectors image [P, E], text [P*K, E], over all ranks where torch.distributed
    has several: the mean over ranks is the loss of the global batch, gradients included."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    group = dist.group.WORLD if several else None
    return kernels.contrastive_loss(image, text, logit_scale, logit_bias, kind=kind, group=group)
