"""Weights from timm's SwinV2 into Aurora's encoder: same features, so that training can start from them.

timm and this encoder order patch merging alike, downsample at the start of a stage, and give keys no bias;
names are what differs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from models.aurora.config import AuroraConfig
from models.aurora.encoder import SwinBlock, SwinEncoder

RENAMES = (
    (r"^patch_embed\.proj\.", "stem."),
    (r"^patch_embed\.norm\.", "stem_norm."),
    (r"^layers\.(\d+)\.downsample\.", r"stages.\1.merge."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.", ".attention."),
    (r"\.attention\.proj\.", ".attention.out."),
    (r"\.cpb_mlp\.", ".position_bias."),
    (r"\.norm1\.", ".attention_norm."),
    (r"\.norm2\.", ".feed_norm."),
    (r"\.mlp\.fc1\.", ".feed.up."),
    (r"\.mlp\.fc2\.", ".feed.out."),
)
UNUSED = re.compile(r"^head\.|\.(relative_coords_table|relative_position_index|k_bias|attn_mask)$")


def config_from_timm(model: Any) -> AuroraConfig:
    """The encoder configuration of a timm `SwinTransformerV2` (the text side keeps its defaults).

    Raises ValueError for another class of model, non-square images or windows, or a patch size other than 4.
    """
    if type(model).__name__ != "SwinTransformerV2":
        raise ValueError(
            f"cannot read a {type(model).__name__}; supported: timm's SwinTransformerV2 (names swinv2_*)"
        )
    blocks = [list(stage.blocks) for stage in model.layers]
    first = [stage[0] for stage in blocks]
    size = model.patch_embed.img_size
    windows = [tuple(block.window_size) for block in first]
    if size[0] != size[1] or any(y != x for y, x in windows) or tuple(model.patch_embed.patch_size) != (4, 4):
        raise ValueError(
            f"image {tuple(size)}, windows {windows}, patch {tuple(model.patch_embed.patch_size)}; "
            "supported: square images and windows, patch 4"
        )
    return AuroraConfig(
        image_size=size[0],
        width=model.embed_dim,
        depths=_four(len(stage) for stage in blocks),
        windows=_four(window[0] for window in windows),
        bias_windows=_four(
            max(block.attn.pretrained_window_size) or window[0]
            for block, window in zip(first, windows, strict=True)
        ),
        head_dim=model.embed_dim // first[0].attn.num_heads,
        mlp="gelu",
        window_padding="zero",
    )


def _four(values: Iterable[int]) -> tuple[int, int, int, int]:
    a, b, c, d = values
    return a, b, c, d


def load_timm(encoder: SwinEncoder, weights: Mapping[str, Tensor]) -> list[str]:
    """Copy a timm SwinV2 state dict into the encoder; returns what timm had and the encoder has no use for
    (the classifier).

    Raises ValueError naming every parameter that is missing, left over or of another shape. The mask token
    keeps its value.
    """
    return _load(encoder, weights, found={"mask_token"})


def load_block(block: SwinBlock, weights: Mapping[str, Tensor]) -> list[str]:
    """The same for one block: the state dict of a timm `SwinTransformerV2Block` into a `SwinBlock`."""
    return _load(block, {f".{name}": tensor for name, tensor in weights.items()}, found=set())


def _load(module: nn.Module, weights: Mapping[str, Tensor], found: set[str]) -> list[str]:
    own = module.state_dict()
    unused, unknown, wrong = [], [], []
    for name, tensor in weights.items():
        if UNUSED.search(name):
            unused.append(name)
            continue
        target = name
        for pattern, replacement in RENAMES:
            target = re.sub(pattern, replacement, target)
        target = target.removeprefix(".")
        if target not in own:
            unknown.append(name)
            continue
        value = tensor.flatten() if target.endswith("logit_scale") else tensor
        if value.shape != own[target].shape:
            wrong.append(f"{name} {tuple(tensor.shape)} for {target} {tuple(own[target].shape)}")
            continue
        own[target].copy_(value)  # a state dict's tensors share memory with the module's parameters
        found.add(target)
    missing = sorted(set(own) - found)
    if unknown or wrong or missing:
        raise ValueError(
            f"these weights do not fit. Not known here: {unknown}; other shapes: {wrong}; missing: {missing}. "
            "Build the encoder with config_from_timm(model)."
        )
    return unused
