"""Models: tensors in, tensors out; built on `kernels`, unaware of where data comes from and who trains
them."""

import kernels

if not getattr(kernels, "__auroraio__", False):
    raise ImportError(
        f"models is built on AuroraIO's package `kernels`, but Python finds another of that name first, in "
        f"{list(kernels.__path__)[0]} (Hugging Face has one). Give each its own environment; if both are in one, "
        "`pip uninstall kernels` and install auroraio again, because they may have overwritten each other's files."
    )

from models.aurora import AURORA_SIZES, Aurora, AuroraConfig
from models.parameters import parameter_groups
from models.perceiver import PERCEIVER_SIZES, PerceiverConfig, PerceiverIO
from models.pretrained import Pretrained, load_pretrained

__all__ = [
    "AURORA_SIZES", "PERCEIVER_SIZES", "Aurora", "AuroraConfig", "PerceiverConfig", "PerceiverIO", "Pretrained",
    "load_pretrained", "parameter_groups",
]  # fmt: skip
