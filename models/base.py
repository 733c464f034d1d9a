"""What both models offer to tasks, which need not know which of the two they are built on.

    features(images)                embeddings fp32 [B, E] of unit length, and the memory [B, M, D] that text about them reads
    image_memory(images)            that memory alone
    text_embedding(tokens)          fp32 [B, E] of unit length
    next_words(tokens, memory)      [B, T, W], each place having read the words before it
    whole_text(tokens, memory)      [B, T, W], each place having read all words
    start(memory), step(tokens, s)  generation, a token at a time (models/generation.py)

Shapes: B batch, M places of the memory, T tokens, D and W widths, E joint space. Images are normalised [B, 3, height, width],
tokens int64 [B, T]: BOS, words, EOS, padding.
"""

from __future__ import annotations

from typing import TypeAlias, Union

from models.aurora.config import AuroraConfig
from models.aurora.model import Aurora
from models.perceiver.config import PerceiverConfig
from models.perceiver.model import PerceiverIO

Base: TypeAlias = Union[Aurora, PerceiverIO]  # noqa: UP007


def new_base(config: AuroraConfig | PerceiverConfig) -> Base:
    """A new model of the family that the configuration is for."""
    return PerceiverIO(config) if isinstance(config, PerceiverConfig) else Aurora(config)
