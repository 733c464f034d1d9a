"""Aurora-Vision: its configuration and the ladder of sizes, tiny to XL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AuroraConfig:
    """Everything that shapes an Aurora model. Widths are channels, sizes are pixels; four encoder stages."""

    image_size: int = 64
    """Side of the training images in pixels; the encoder accepts any size, this one sets each stage's
    largest window."""
    width: int = 32
    """Channels of stage 1; stage i has width * 2**(i-1)."""
    stem: Literal["patch", "conv"] = "patch"
    """What makes the first tokens: a linear map of 4x4 patches, or overlapping 3x3 convolutions with batch norm
    (arXiv:2106.14881), which learn more from a few thousand pictures. "conv" sees across hidden patches, so it is not for
    masked image modelling, and its statistics are those of a micro-batch."""
    depths: tuple[int, int, int, int] = (2, 2, 4, 2)
    """Blocks per stage."""
    windows: tuple[int, int, int, int] = (8, 8, 4, 2)
    """Window side per stage, in tokens; cut to the feature map where that is smaller."""
    bias_windows: tuple[int, int, int, int] | None = None
    """Window side per stage that the position bias was trained with, where that is another one (weights
    from timm)."""
    head_dim: int = 32
    """Channels per attention head of the encoder."""
    extra_norm_every: int = 0
    """An extra LayerNorm after every so many stage-3 blocks (SwinV2-H and -G: 6); 0 = none."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward of the encoder blocks; "gelu" (4x, with biases) is SwinV2's own, for weights from timm."""
    window_padding: Literal["mask", "zero"] = "mask"
    """Where windows do not divide a map: hide the padding, or attend to it as timm does (for weights from
    timm)."""
    post_norm_init: float = 0.1
    """Initial gain of the residual post-norms; SwinV2 starts its largest models at 0."""
    layer_scale_init: float = 0.1
    """Initial LayerScale of the residual branches of the text stack and of the two pools."""
    cross_scale_init: float = 1.0
    """Initial LayerScale of the text stack's cross-attention to the image. Short runs want more: trained on captions
    alone for 130 steps, tiny got 73% of the held-out shape words right from 3 and 30% from 1 (one seed)."""
    contrastive_scale: float = 10.0
    """Initial multiplier of the cosines in the contrastive loss. A few hundred steps hardly move it."""
    contrastive_bias: float = -10.0
    """Initial bias of the sigmoid contrastive loss: about minus the log of the texts that an image meets."""
    drop_path: float = 0.0
    """Stochastic depth of the last encoder block; rises linearly from 0 at the first."""

    vocabulary: int = 2048
    """Rows of the token embedding; the tokenizer may have fewer pieces, not more."""
    text_length: int = 24
    """Tokens per caption, begin and end tokens included; longer captions are cut."""
    decoder_width: int = 192
    """Channels of the text stack."""
    decoder_head_dim: int = 64
    """Channels per attention head of the text stack."""
    unimodal_layers: int = 2
    """Text-only layers; the text embedding is read after them."""
    crossmodal_layers: int = 2
    """Layers with cross-attention to the image, above the unimodal ones."""
    decoder_dropout: float = 0.0
    """Dropout on the residual branches of the text stack."""
    queries: int = 16
    """Learned object and mask queries."""

    embedding_width: int = 256
    """Channels of the joint image-text space."""
    image_pooling: Literal["attention", "mean"] = "attention"
    """How the last map becomes an embedding: a learned query, or the mean behind batch norm (few pictures)."""
    text_pooling: Literal["attention", "words"] = "attention"
    """How a caption becomes an embedding: a learned query over the text stack, or the sum of its words' own vectors, a
    bag of words. On 1,200 captioned photographs the stack learns the captions by heart."""
    pyramid_width: int = 64
    """Channels of the feature pyramid."""
    projector_hidden: tuple[int, int] = (256, 512)
    """Hidden widths of the projections of stage 3 and stage 4 into the decoder's memory."""

    @property
    def stage_widths(self) -> tuple[int, int, int, int]:
        """Channels of the four stages."""
        return (self.width, 2 * self.width, 4 * self.width, 8 * self.width)

    def __post_init__(self) -> None:
        checks = {
            "image_size": (
                self.image_size % 32 == 0 and self.image_size > 0,
                "a positive multiple of 32 pixels",
            ),
            "width": (self.width % self.head_dim == 0, f"a multiple of head_dim ({self.head_dim})"),
            "decoder_width": (
                self.decoder_width % self.decoder_head_dim == 0,
                f"a multiple of decoder_head_dim ({self.decoder_head_dim})",
            ),
            "decoder_head_dim": (self.decoder_head_dim % 2 == 0, "even, for rotary positions"),
            "contrastive_scale": (self.contrastive_scale > 0, "positive"),
            "windows": (min(self.windows) >= 1, "at least 1 each"),
            "text_length": (self.text_length >= 3, "at least 3: begin, one token, end"),
            "vocabulary": (self.vocabulary > 5, "more than the 5 special tokens"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f"AuroraConfig.{name} = {getattr(self, name)!r}; it must be {wanted}")


AURORA_SIZES: dict[str, AuroraConfig] = {
    "tiny": AuroraConfig(contrastive_bias=-4.0, layer_scale_init=1.0, cross_scale_init=3.0),
    "small": AuroraConfig(
        image_size=224, width=128, depths=(2, 2, 4, 2), windows=(7, 7, 7, 7), head_dim=64, drop_path=0.1,
        vocabulary=32_000, text_length=64, decoder_width=384, unimodal_layers=3, crossmodal_layers=3,
        queries=300,
        embedding_width=512, pyramid_width=128, projector_hidden=(1024, 2048),
    ),
    "base": AuroraConfig(
        image_size=224, width=192, depths=(2, 2, 18, 2), windows=(14, 14, 14, 7), head_dim=64, drop_path=0.2,
        vocabulary=32_000, text_length=64, decoder_width=640, unimodal_layers=4, crossmodal_layers=4,
        queries=300,
        embedding_width=768, pyramid_width=256, projector_hidden=(1024, 2048),
    ),
    "large": AuroraConfig(
        image_size=448, width=384, depths=(2, 2, 16, 2), windows=(14, 14, 14, 14), head_dim=64, drop_path=0.2,
        extra_norm_every=6, post_norm_init=0.0,
        vocabulary=32_000, text_length=64, decoder_width=768, unimodal_layers=6, crossmodal_layers=6,
        queries=300,
        embedding_width=1024, pyramid_width=256, projector_hidden=(2048, 4096),
    ),
    "xl": AuroraConfig(
        image_size=448, width=512, depths=(2, 2, 36, 4), windows=(14, 14, 14, 14), head_dim=64, drop_path=0.3,
        extra_norm_every=6, post_norm_init=0.0,
        vocabulary=32_000, text_length=64, decoder_width=1280, decoder_head_dim=128, unimodal_layers=12,
        crossmodal_layers=12, queries=300,
        embedding_width=1024, pyramid_width=512, projector_hidden=(4096, 12288),
    ),
}  # fmt: skip
"""The ladder: every size is the same code. Parameters are counted on the meta device by `python -m
models`."""
