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
from dataload.multimodal.mixtures import MIXTURES, PAIRS, mixture
from dataload.multimodal.pairs import PairBatch, PairSet

__all__ = [
    "MIXTURES",
    "PAIRS",
    "AudioConfig",
    "ImageConfig",
    "MixtureConfig",
    "MixtureLoader",
    "MultimodalBatch",
    "PairBatch",
    "PairSet",
    "SourceConfig",
    "TextConfig",
    "VideoConfig",
    "mixture",
]
