"""Samples with any subset of picture, sound, video and text, from several sources mixed by weight."""

from dataload.multimodal.batch import MultimodalBatch
from dataload.multimodal.config import (
    AudioConfig,
    ImageConfig,
    MixtureConfig,
    SourceConfig,
    TextConfig,
    VideoConfig,
)
from dataload.multimodal.loader import MixtureLoader

__all__ = [
    "AudioConfig",
    "ImageConfig",
    "MixtureConfig",
    "MixtureLoader",
    "MultimodalBatch",
    "SourceConfig",
    "TextConfig",
    "VideoConfig",
]
