"""PerceiverIO-Multimodal: every modality through one latent array."""

from models.perceiver.config import PERCEIVER_SIZES, ClassicBlocks, PerceiverConfig
from models.perceiver.model import PerceiverIO
from models.perceiver.objectives import PerceiverObjectives
from models.perceiver.pieces import Piece

__all__ = [
    "PERCEIVER_SIZES",
    "ClassicBlocks",
    "PerceiverConfig",
    "PerceiverIO",
    "PerceiverObjectives",
    "Piece",
]
