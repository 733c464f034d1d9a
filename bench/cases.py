"""The shapes that are measured. They are those of the models, so they follow the models' sizes."""

from __future__ import annotations

from bench.peers.latent import LatentCase
from bench.peers.layers import BlockCase, CrossCase
from bench.peers.loading import LoaderCase
from bench.peers.step import StepCase
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


ODD = WindowCase("odd-map-29x23", 1, 29, 23, 4, 32, 7, 3)  # padding in both directions

CPU_WINDOWS = (
    stage(WindowCase, "tiny", 1, 16),
    stage(WindowCase, "tiny", 3, 16),
    stage(WindowCase, "small", 1, 1),
    stage(WindowCase, "base", 3, 2),
    ODD,
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
)
# Perceiver's sizes: latents x heads over what one modality, or several packed together, give.
CPU_LATENTS = (
    LatentCase("perceiver-tiny", 8, 32, 136, 4, 64),
    LatentCase("perceiver-small-image", 1, 128, 1024, 8, 64),
    LatentCase("perceiver-small-ragged", 4, 64, 1024, 4, 64, ragged=True),
)
GPU_LATENTS = (
    LatentCase("perceiver-small", 64, 128, 1024, 8, 64),
    LatentCase("perceiver-base-ragged", 32, 256, 2048, 16, 64, ragged=True),
    LatentCase("perceiver-large-video", 8, 512, 8192, 12, 128),
    LatentCase("perceiver-xl-image", 2, 512, 4096, 40, 128),
    LatentCase("few-blocks-32-heads", 1, 512, 16384, 32, 128),
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
GPU_STEPS = (StepCase("tiny", 512), StepCase("small", 128))
CPU_LOADERS = (LoaderCase(32, 64, 24), LoaderCase(32, 224, 64))
GPU_LOADERS = (LoaderCase(64, 224, 64), LoaderCase(64, 448, 64))
