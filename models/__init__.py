"""Models: tensors in, tensors out; built on `kernels`, unaware of where data comes from and who trains
them."""

from models.aurora import AURORA_SIZES, Aurora, AuroraConfig
from models.parameters import parameter_groups

__all__ = ["AURORA_SIZES", "Aurora", "AuroraConfig", "parameter_groups"]
