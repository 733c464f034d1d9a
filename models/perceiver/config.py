"""PerceiverIO-Multimodal: its configuration and the ladder of sizes, tiny to XL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ClassicBlocks:
    """What transformers' Perceiver has in place of this model's blocks: LayerNorm, GELU, biases, no norm of queries and
    keys. For weights from there; `models.perceiver.convert` fills it in."""

    heads: int = 8
    """Of the self-attention of the latents; their own width is `latent_width`."""
    read_heads: int = 8
    """Of the cross-attention from latents to inputs."""
    qk_width: int | None = None
    """Channels of the latents' queries and keys, in both; None: `latent_width`."""
    v_width: int | None = None
    """Channels of the values, in both; None: those of the queries."""
    read_qk_width: int | None = None
    """Channels of queries and keys of the cross-attention, where they are others."""
    widening: int = 1
    """Hidden width of the feed-forward layers among the latents, in multiples of theirs."""
    read_widening: int = 1
    """The same behind the cross-attention."""
    repeats: int = 1
    """How often the layers run one after the other, with the same weights."""
    query_residual: bool = True
    """Whether the latents are added to what they read."""
    decoder_heads: int = 8
    """Of the cross-attention from output queries to latents."""
    decoder_qk_width: int | None = None
    """Channels of its queries and keys; None: those of the latents."""
    decoder_widening: int = 1
    """The same as `widening`, behind it."""
    decoder_query_residual: bool = False
    """Whether a query is added to what it read."""


@dataclass(frozen=True)
class PerceiverConfig:
    """Everything that shapes a PerceiverIO. Widths are channels, sizes are pixels."""

    latents: int = 32
    """Rows of the latent array."""
    latent_width: int = 256
    """Their channels."""
    latent_layers: int = 4
    """Blocks of the latent transformer."""
    latent_head_dim: int = 64
    """Channels per head, in it and in the reads."""
    input_reads: int = 1
    """How often the latents read the inputs: before the first block, and at even distances."""

    encoder_width: int = 128
    """Channels of the tokens that the modality encoders make, the latents' inputs."""
    encoder_layers: int = 1
    """Blocks of each of the encoders of images, sounds and videos; 0 switches them off: patches are read as they are."""
    encoder_head_dim: int = 64
    """Channels per head of all encoders."""

    image_size: int = 64
    """Side of an image; others work if the patch divides them, with positions interpolated."""
    image_patch: int = 8
    """Side of a patch."""
    image_window: int = 0
    """Self-attention of the image encoder within windows of so many patches a side, every other block shifted by half
    of one; 0: over the whole image."""
    image_stem: Literal["patch", "conv"] = "patch"
    """What makes patches tokens: a linear map, or overlapping 3x3 convolutions with batch norm (arXiv:2106.14881), which
    learn more from a few thousand pictures. Hidden patches are grey before the convolutions see them; the norm's
    statistics are those of a micro-batch."""

    audio_kind: Literal["mel", "waveform"] = "mel"
    """What a sound's tokens are made of: patches of its log-mel spectrogram, or pieces of the waveform."""
    audio_seconds: float = 1.0
    """The longest sound; shorter ones make fewer tokens. 16 kHz."""
    audio_mels: int = 64
    """Bands of the spectrogram; a frame is 10 ms."""
    audio_patch: tuple[int, int] = (16, 10)
    """Bands and frames of a patch."""
    audio_stem: Literal["patch", "conv"] = "patch"
    """What makes patches of a spectrogram tokens: a linear map, or overlapping convolutions."""
    audio_range: float = 0.0
    """A spectrogram is cut so many nats below its loudest place (10 is 43 dB): recordings differ in what is below. 0: it is
    not."""
    waveform_patch: int = 400
    """Samples of a piece."""

    video_frames: int = 4
    """The most frames of a clip; fewer make fewer tokens."""
    video_size: int = 64
    """Side of a frame."""
    video_tubelet: tuple[int, int, int] = (2, 16, 16)
    """Frames, height and width of a patch of video (ViViT, arXiv:2103.15691)."""

    vocabulary: int = 2048
    """Rows of the token embedding; the tokenizer may have fewer pieces, not more."""
    text_length: int = 24
    """Tokens of a text, begin and end tokens included."""
    text_width: int = 192
    """Channels of the text encoder."""
    text_layers: int = 1
    """Its blocks."""

    decoder_width: int = 192
    """Channels of the text decoder. Where it equals `text_width`, both share one embedding."""
    decoder_layers: int = 2
    """Blocks of the text decoder, each with self-attention and a read of the latents."""
    decoder_head_dim: int = 64
    """Channels per head of the text decoder."""
    query_width: int = 128
    """Channels of the output queries of all other tasks."""
    query_layers: int = 1
    """Blocks of each query decoder."""
    embedding_width: int = 192
    """Channels of the joint space of all modalities and text."""
    text_pooling: Literal["attention", "words"] = "attention"
    """How a text becomes an embedding: a learned query over the text encoder, or the sum of its words' own vectors."""
    labels: int = 16
    """Classes of the label head (AudioSet has 527)."""

    layer_scale_init: float = 0.1
    """Initial LayerScale of residual branches."""
    cross_scale_init: float = 1.0
    """Initial LayerScale of what a block reads from inputs or latents."""
    contrastive_scale: float = 10.0
    """Initial multiplier of the cosines in the contrastive losses."""
    contrastive_bias: float = -10.0
    """Initial bias of the sigmoid contrastive loss: about minus the log of the texts that a sample meets."""
    dropout: float = 0.0
    """On the residual branches of the text encoder and decoder."""
    classic: ClassicBlocks | None = None
    """Blocks as transformers' Perceiver has them, in the latent transformer and the query decoders."""

    @property
    def image_grid(self) -> tuple[int, int]:
        """Patches of an image: rows, columns."""
        side = self.image_size // self.image_patch
        return side, side

    @property
    def audio_grid(self) -> tuple[int, int]:
        """Patches of the longest sound: in time, in frequency (1 for waveforms)."""
        samples = round(self.audio_seconds * 16_000)
        if self.audio_kind == "waveform":
            return -(-samples // self.waveform_patch), 1
        return -(-samples // (160 * self.audio_patch[1])), self.audio_mels // self.audio_patch[0]

    @property
    def video_grid(self) -> tuple[int, int, int]:
        """Patches of the longest clip: in time, rows, columns."""
        t, y, x = self.video_tubelet
        return -(-self.video_frames // t), self.video_size // y, self.video_size // x

    @property
    def patch_widths(self) -> dict[str, int]:
        """Numbers in a patch of each modality."""
        t, y, x = self.video_tubelet
        bands, frames = self.audio_patch
        audio = self.waveform_patch if self.audio_kind == "waveform" else bands * frames
        return {"image": 3 * self.image_patch**2, "audio": audio, "video": 3 * t * y * x}

    def __post_init__(self) -> None:
        _, y, x = self.video_tubelet
        heads = ("latent", "encoder", "decoder")
        checks = {
            f"{name}_width": (
                getattr(self, f"{name}_width") % getattr(self, f"{name}_head_dim") == 0 or bool(self.classic),
                f"a multiple of {name}_head_dim ({getattr(self, f'{name}_head_dim')})",
            )
            for name in heads
        } | {
            "image_size": (
                self.image_size % self.image_patch == 0
                and (self.image_stem == "patch" or self.image_size > self.image_patch),
                f"a multiple of image_patch ({self.image_patch})"
                + (", at least two patches in each direction with the convolutional stem" * (self.image_stem == "conv")),
            ),
            "image_patch": (
                self.image_stem == "patch" or self.image_patch & (self.image_patch - 1) == 0,
                "a power of two for the convolutional stem",
            ),
            "audio_range": (self.audio_range >= 0, "0 (off) or more"),
            "audio_mels": (
                self.audio_mels % self.audio_patch[0] == 0, f"a multiple of audio_patch's {self.audio_patch[0]} bands"
            ),
            "video_size": (self.video_size % y == self.video_size % x == 0, f"a multiple of {y} and {x}"),
            "text_width": (self.text_width % self.encoder_head_dim == 0, "a multiple of encoder_head_dim"),
            "query_width": (
                self.query_width % min(64, self.query_width) == 0 or bool(self.classic), "at most 64, or a multiple of it"
            ),
            "input_reads": (1 <= self.input_reads <= max(self.latent_layers, 1), "from 1 to latent_layers"),
            "encoder_head_dim": (self.encoder_head_dim % 2 == 0, "even, for rotary positions"),
            "decoder_head_dim": (self.decoder_head_dim % 2 == 0, "even, for rotary positions"),
            "text_length": (self.text_length >= 3, "at least 3: begin, one token, end"),
            "vocabulary": (self.vocabulary > 5, "more than the 5 special tokens"),
            "contrastive_scale": (self.contrastive_scale > 0, "positive"),
        }  # fmt: skip
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f"PerceiverConfig.{name} = {getattr(self, name)!r}; it must be {wanted}")


PERCEIVER_SIZES: dict[str, PerceiverConfig] = {
    "tiny": PerceiverConfig(contrastive_bias=-4.0, layer_scale_init=1.0),
    "small": PerceiverConfig(
        latents=128, latent_width=512, latent_layers=12, encoder_width=256, encoder_layers=3,
        image_size=224, image_patch=16, audio_seconds=10.0, audio_mels=128, audio_patch=(16, 20),
        video_frames=8, video_size=112, vocabulary=32_000, text_length=64, text_width=384, text_layers=2,
        decoder_width=384, decoder_layers=4, query_width=256, query_layers=2, embedding_width=512, labels=527,
    ),
    "base": PerceiverConfig(
        latents=256, latent_width=1024, latent_layers=12, encoder_width=512, encoder_layers=3,
        image_size=256, image_patch=16, audio_seconds=10.0, audio_mels=128, audio_patch=(16, 20),
        video_frames=8, video_size=224, vocabulary=32_000, text_length=64, text_width=768, text_layers=2,
        decoder_width=768, decoder_layers=6, query_width=384, query_layers=2, embedding_width=768, labels=527,
    ),
    "large": PerceiverConfig(
        latents=512, latent_width=1536, latent_layers=18, latent_head_dim=128, encoder_width=768, encoder_layers=4,
        image_size=512, image_patch=16, audio_seconds=10.0, audio_mels=128, audio_patch=(16, 10),
        video_frames=16, video_size=224, vocabulary=32_000, text_length=64, text_width=1024, text_layers=4,
        decoder_width=1280, decoder_layers=8, query_width=768, query_layers=2, embedding_width=1024, labels=527,
    ),
    "xl": PerceiverConfig(
        latents=512, latent_width=5120, latent_layers=36, latent_head_dim=128, input_reads=2,
        encoder_width=1024, encoder_layers=8, image_size=512, image_patch=8, image_window=16,
        audio_seconds=10.0, audio_mels=128, audio_patch=(16, 10), video_frames=16, video_size=256,
        vocabulary=32_000, text_length=128, text_width=1024, text_layers=12,
        decoder_width=4096, decoder_layers=16, decoder_head_dim=128, query_width=2048, query_layers=4,
        embedding_width=1024, labels=527,
    ),
}  # fmt: skip
"""The ladder: every size is the same code. Parameters are counted on the meta device by `python -m models`."""
