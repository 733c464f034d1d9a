"""The shapes that are measured. They are those of the models, so they follow the models' sizes."""

from __future__ import annotations

from bench.peers.accelerated import AttentionCase, ModelCase
from bench.peers.contrastive import ContrastiveCase
from bench.peers.latent import LatentCase
from bench.peers.layers import BlockCase, CrossCase
from bench.peers.linear_ce import LossCase
from bench.peers.loading import LoaderCase
from bench.peers.media import CODECS, ClipCase, SoundCase
from bench.peers.opening import OpenCase
from bench.peers.optimizer import OptimizerCase
from bench.peers.perceiver import PerceiverCase
from bench.peers.pipelines import PipelineCase
from bench.peers.step import StepCase
from bench.peers.tokenizing import TextCase
from bench.peers.window import WindowCase
from models import AURORA_SIZES
from models.aurora.encoder import PATCH


def stage(kind: type[WindowCase], size: str, number: int, batch: int) -> WindowCase:
    """Stage `number` (1 to 4) of one of Aurora's encoders, as its shifted blocks see it; a map of one window is not
    shifted."""
    config = AURORA_SIZES[size]
    side = config.image_size // PATCH // 2 ** (number - 1)
    window = min(config.windows[number - 1], side)
    return kind(
        f"{size}-{config.image_size}px-stage{number}", batch, side, side,
        config.stage_widths[number - 1] // config.head_dim, config.head_dim, window, window // 2 if side > window else 0,
    )  # fmt: skip


SWIN_HEADS = {"t": 3, "b": 4, "l": 6}  # in the first stage, of 32 channels each


def swin(letter: str, number: int, batch: int, *, version: int = 1, window: int = 7) -> WindowCase:
    """Stage `number` (1 to 4) of Swin-T, -B or -L at 8 windows in the first stage's height and width (224 pixels with
    window 7), as its shifted blocks see it; version 2 has cosine attention."""
    heads = SWIN_HEADS[letter] * 2 ** (number - 1)
    side = 8 * window // 2 ** (number - 1)
    return WindowCase(
        f"swin{'v2' * (version == 2)}-{letter}-window{window}-stage{number}", batch, side, side, heads, 32, window,
        window // 2 if side > window else 0, cosine=version == 2,
    )  # fmt: skip


def attention(version: int, window: int, batch: int, side: int, heads: int) -> AttentionCase:
    """timm's shifted attention layer of either version, heads of 32."""
    return AttentionCase(
        f"swin{'v2' * (version == 2)}-window{window}-batch{batch}", batch, side, side, heads, 32, window, window // 2,
        cosine=version == 2,
    )  # fmt: skip


ODD = WindowCase("odd-map-29x23", 1, 29, 23, 4, 32, 7, 3)  # padding in both directions

CPU_WINDOWS = (
    stage(WindowCase, "tiny", 1, 16),
    stage(WindowCase, "tiny", 3, 16),
    stage(WindowCase, "small", 1, 1),
    stage(WindowCase, "base", 3, 2),
    ODD,
    swin("t", 3, 2),
)
GPU_WINDOWS = (
    stage(WindowCase, "tiny", 1, 512),
    stage(WindowCase, "small", 1, 64),
    stage(WindowCase, "small", 3, 64),
    stage(WindowCase, "base", 1, 32),
    stage(WindowCase, "base", 3, 64),
    stage(WindowCase, "xl", 1, 4),
    stage(WindowCase, "xl", 3, 16),
    WindowCase("odd-map-115x97", 16, 115, 97, 8, 32, 14, 7),
    swin("t", 1, 128),
    swin("t", 3, 128),
    swin("b", 1, 64),
    swin("b", 2, 64),
    swin("b", 3, 64),
    swin("b", 4, 64),
    swin("l", 1, 32),
    swin("l", 3, 64),
    swin("b", 1, 32, window=14),
    swin("b", 1, 64, version=2, window=8),
    swin("b", 3, 64, version=2, window=8),
    swin("b", 1, 16, version=2, window=16),
    swin("b", 3, 64, version=2, window=16),
)
# Perceiver's sizes: latents x heads over what one modality, or several packed together, give.
CPU_LATENTS = (
    LatentCase("perceiver-tiny", 8, 32, 136, 4, 64),
    LatentCase("perceiver-small-image", 1, 128, 1024, 8, 64),
    LatentCase("perceiver-small-ragged", 4, 64, 1024, 4, 64, ragged=True),
    LatentCase("perceiver-io-image", 1, 256, 3136, 1, 128),
    LatentCase("long-input", 1, 512, 8192, 1, 64),
    LatentCase("narrow-keys", 2, 128, 2048, 4, 32, v_dim=96),
    LatentCase("few-keys", 1, 4096, 256, 2, 64),
)
GPU_LATENTS = (
    LatentCase("perceiver-small", 64, 128, 1024, 8, 64),
    LatentCase("perceiver-base-ragged", 32, 256, 2048, 16, 64, ragged=True),
    LatentCase("perceiver-large-video", 8, 512, 8192, 12, 128),
    LatentCase("perceiver-xl-image", 2, 512, 4096, 40, 128),
    LatentCase("few-blocks-32-heads", 1, 512, 16384, 32, 128),
    LatentCase("few-blocks-8-heads", 1, 512, 131072, 8, 64),
    LatentCase("few-blocks-head-dim-96", 1, 256, 262144, 16, 96),
    LatentCase("narrow-keys", 4, 512, 16384, 8, 64, v_dim=128),
    LatentCase("one-query-pool", 256, 1, 784, 16, 64),
)
CPU_BLOCKS = (stage(BlockCase, "tiny", 1, 16), stage(BlockCase, "small", 2, 1))
GPU_BLOCKS = (stage(BlockCase, "small", 1, 64), stage(BlockCase, "base", 3, 64), stage(BlockCase, "xl", 3, 8))
CPU_CROSSES = (CrossCase("perceiver-small", 1, 128, 1024, 512, 256, 8),)
GPU_CROSSES = (
    CrossCase("perceiver-base", 32, 256, 2048, 1024, 512, 16),
    CrossCase("perceiver-xl", 2, 512, 4096, 5120, 1024, 40),
)
CPU_STEPS = (StepCase("tiny", 32), StepCase("small", 2))
# 784, 3,136 and 12,544 inputs: patches of 8, 4 and 2 pixels of a picture of 224.
CPU_PERCEIVERS = (
    PerceiverCase("784-inputs", 1, 512, 512, 2, 784, 256),
    PerceiverCase("784-inputs-of-4", 4, 512, 512, 2, 784, 256),
    PerceiverCase("3136-inputs", 1, 512, 512, 2, 3136, 256),
    PerceiverCase("12544-inputs", 1, 512, 512, 2, 12_544, 256),
)
# CPUs without bf16 instructions take a hundred times as long for a product.
CPU_PERCEIVERS_BF16 = (
    PerceiverCase("784-inputs-narrow", 1, 64, 128, 2, 784, 64),
    PerceiverCase("784-inputs-narrow-of-8", 8, 64, 128, 2, 784, 64),
    PerceiverCase("3136-inputs-narrow", 1, 64, 128, 2, 3136, 64),
)
GPU_PERCEIVERS = (PerceiverCase("3136-inputs", 64, 512, 1024, 12, 3136, 256),)
READS = tuple(
    PerceiverCase(f"{n:,}-inputs", 1, 32, 64, 2, n, 32, heads=1) for n in (10**3, 10**4, 10**5, 10**6)
)
GPU_STEPS = (StepCase("tiny", 512), StepCase("small", 128))
# One picture each for the gates: there nothing is so large that the allocator asks the system for memory again and again,
# which comes and goes from process to process. CPUs without bfloat16 instructions are slow in it: smaller maps.
CPU_ATTENTIONS = tuple(attention(v, w, n, 28, 3) for n in (1, 8) for v in (1, 2) for w in (7, 14))
CPU_ATTENTIONS_BF16 = (
    attention(1, 7, 1, 14, 3),
    attention(1, 14, 1, 28, 1),
    attention(2, 7, 1, 14, 3),
    attention(2, 14, 1, 28, 1),
)
GPU_ATTENTIONS = (
    attention(1, 7, 64, 56, 4),
    attention(1, 14, 64, 28, 8),
    attention(2, 8, 64, 64, 4),
    attention(2, 16, 16, 64, 4),
)
CPU_MODELS = (ModelCase("swin_tiny_patch4_window7_224", 224, 1),)
GPU_MODELS = (
    ModelCase("swin_base_patch4_window7_224", 224, 64),
    ModelCase("swinv2_base_window8_256", 256, 48),
)
CPU_LOADERS = (LoaderCase(32, 64, 24), LoaderCase(32, 224, 64))
GPU_LOADERS = (LoaderCase(64, 224, 64), LoaderCase(64, 448, 64))
OPENINGS = (OpenCase(1000, 10_000),)
CPU_TEXTS = tuple(TextCase(kind, batch) for kind in ("unigram", "bpe") for batch in (False, True))
PIPELINES = (PipelineCase(32, 448),)
CPU_SOUNDS = tuple(map(SoundCase, CODECS))
CPU_CLIPS = (ClipCase(250), ClipCase(48))
CPU_CONTRASTS = tuple(
    ContrastiveCase(f"{kind}-{pairs}", kind, pairs, width)
    for kind in ("softmax", "sigmoid")
    for pairs, width in ((512, 256), (1025, 97), (2048, 768))
) + (ContrastiveCase("softmax-8192", "softmax", 8192, 256),)
GPU_CONTRASTS = tuple(
    ContrastiveCase(f"{kind}-{pairs}", kind, pairs, 768)
    for kind in ("softmax", "sigmoid")
    for pairs in (2048, 32768)
)
# 16k tokens x 32k vocabulary is the size that counts; a CPU takes a minute for a round of it (bench/README.md), so it gets
# the same with fewer tokens and a narrower model by default.
CPU_LOSSES = (LossCase("1k-tokens-8k-vocabulary", 1024, 256, 8192),)
GPU_LOSSES = (
    LossCase("16k-tokens-32k-vocabulary", 16384, 2048, 32768),
    LossCase("16k-tokens-128k-vocabulary", 16384, 4096, 131072),
)
CPU_OPTIMIZERS = (OptimizerCase("50M-parameters", 7, 768),)
GPU_OPTIMIZERS = (OptimizerCase("1B-parameters", 20, 2048),)
