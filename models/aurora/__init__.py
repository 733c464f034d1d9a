"""Aurora-Vision: hierarchical window-attention encoder, cross-attention text stack."""

from models.aurora.config import AURORA_SIZES, AuroraConfig
from models.aurora.model import Aurora, Detections

__all__ = ["AURORA_SIZES", "Aurora", "AuroraConfig", "Detections"]
