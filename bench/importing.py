"""timm on a machine whose torchvision was built for another torch: without this, importing either fails."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def make_torchvision_importable() -> object:
    """Declare the operators that torchvision's import asks for, where its library does not load.

    So it is with a torchvision built for CUDA beside a CPU build of torch. The Python parts, which timm needs
    and tests compare with, work without those operators. The declarations last as long as what is returned.
    """
    import torch
    from torch.library import Library

    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        for binary in Path(spec.submodule_search_locations[0]).glob("_C.*"):
            torch.ops.load_library(binary)
    except OSError:
        library = Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None
