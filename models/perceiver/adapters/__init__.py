"""Raw pieces of a modality to tokens that the latents read; one file per modality."""

from models.perceiver.adapters.audio import MelAdapter, WaveformAdapter, audio_adapter
from models.perceiver.adapters.base import Adapter
from models.perceiver.adapters.image import ImageAdapter
from models.perceiver.adapters.text import TextAdapter
from models.perceiver.adapters.video import VideoAdapter

__all__ = [
    "Adapter", "ImageAdapter", "MelAdapter", "TextAdapter", "VideoAdapter", "WaveformAdapter", "audio_adapter",
]  # fmt: skip
