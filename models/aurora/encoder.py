"""The hierarchical image encoder: SwinV2's windowed cosine attention at any image size.

Source: Swin Transformer V2 (arXiv:2111.09883): residual post-norm, scaled cosine attention, log-spaced
continuous position bias.
Shapes: B batch, H and W a stage's map, C channels, h heads, d head width.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import window_attention
from models.aurora.config import AuroraConfig
from models.layers import SwiGLU

PATCH = 4
STRIDE = 32  # pixels per token of stage 4, and the unit of masked image modelling


class SwinEncoder(nn.Module):
    """Images float [B, 3, height, width] -> four maps [B, H_i, W_i, C_i] with strides 4, 8, 16 and 32 pixels.

    Sizes that the strides do not divide are padded at the bottom and right, as timm's Swin does.
    """

    def __init__(self, config: AuroraConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        widths = config.stage_widths
        self.stem = nn.Conv2d(3, widths[0], PATCH, PATCH) if config.stem == "patch" else ConvStem(widths[0])
        self.stem_norm = nn.LayerNorm(widths[0])
        self.mask_token = nn.Parameter(torch.empty(widths[0]))
        rates = torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist()
        self.stages = nn.ModuleList()
        for i in range(4):
            start = sum(config.depths[:i])
            self.stages.append(SwinStage(config, i, rates[start : start + config.depths[i]]))
        self.norm = nn.LayerNorm(widths[3])

    def forward(self, images: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """mask bool [B, height/32, width/32]: where True the patch tokens become the mask token (SimMIM,
        arXiv:2111.09886)."""
        x = self.patchify(images)
        if mask is not None:
            x = self.hide(x, mask)
        maps = []
        for stage in self.stages:
            x = stage(x, self.gradient_checkpointing and self.training)
            maps.append(x)
        maps[3] = self.norm(maps[3])
        return maps

    def patchify(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] -> normalised patch tokens [B, H, W, C]."""
        pad_y, pad_x = -images.shape[-2] % PATCH, -images.shape[-1] % PATCH
        if pad_y or pad_x:
            images = F.pad(images, (0, pad_x, 0, pad_y))
        return self.stem_norm(self.stem(images).permute(0, 2, 3, 1))

    def hide(self, x: Tensor, mask: Tensor) -> Tensor:
        """Put the mask token where mask [B, height/32, width/32] is True; x [B, H, W, C] with H = 8 *
        height/32."""
        unit = STRIDE // PATCH
        expected = (x.shape[0], x.shape[1] // unit, x.shape[2] // unit)
        if tuple(mask.shape) != expected or x.shape[1] % unit or x.shape[2] % unit:
            raise ValueError(
                f"the mask is {tuple(mask.shape)}, but these images need {expected}: one unit of 32x32 pixels each, "
                f"on image sides that 32 divides (got {x.shape[1] * PATCH} x {x.shape[2] * PATCH} pixels)"
            )
        hidden = mask.repeat_interleave(unit, 1).repeat_interleave(unit, 2)[..., None]
        return torch.where(hidden, self.mask_token.to(x.dtype), x)


class ConvStem(nn.Sequential):
    """Images [B, 3, height, width] -> [B, dim, height/4, width/4] by overlapping convolutions (arXiv:2106.14881).

    Batch norm keeps how bright and how contrasted a place is beside others, which a LayerNorm over the channels of
    each place removes.
    """

    def __init__(self, dim: int) -> None:
        layers: list[nn.Module] = []
        for before, after, stride in ((3, dim, 2), (dim, dim, 1), (dim, 2 * dim, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(2 * dim, dim, 1))


class SwinStage(nn.Module):
    """Patch merging (but for the first stage), then blocks whose windows alternate between unshifted and
    shifted."""

    def __init__(self, config: AuroraConfig, index: int, drop_paths: list[float]) -> None:
        super().__init__()
        dim = config.stage_widths[index]
        self.merge = PatchMerging(dim // 2) if index else None
        window = min(config.windows[index], config.image_size // PATCH // 2**index)
        trained_window = config.bias_windows[index] if config.bias_windows else window
        self.blocks = nn.ModuleList(
            SwinBlock(config, dim, window, trained_window, window // 2 if j % 2 else 0, rate)
            for j, rate in enumerate(drop_paths)
        )
        self.extra_norm_every = config.extra_norm_every if index == 2 else 0
        extra = len(self.blocks) // self.extra_norm_every if self.extra_norm_every else 0
        self.extra_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(extra))

    def forward(self, x: Tensor, recompute: bool) -> Tensor:
        """[B, H, W, C] -> [B, H', W', C']; recompute: keep no activations inside blocks (activation
        checkpointing)."""
        if self.merge is not None:
            x = self.merge(x)
        for j, block in enumerate(self.blocks, start=1):
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            if self.extra_norm_every and j % self.extra_norm_every == 0:
                x = self.extra_norms[j // self.extra_norm_every - 1](x)
        return x


class PatchMerging(nn.Module):
    """Concatenate each 2x2 neighbourhood in the order (0,0), (1,0), (0,1), (1,1) of (row, column), project
    4C -> 2C, normalise."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]."""
        pad_y, pad_x = x.shape[1] % 2, x.shape[2] % 2
        if pad_y or pad_x:
            x = F.pad(x, (0, 0, 0, pad_x, 0, pad_y))
        batch, height, width, dim = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, dim).permute(0, 1, 3, 4, 2, 5)
        return self.norm(self.reduction(x.reshape(batch, height // 2, width // 2, 4 * dim)))


class SwinBlock(nn.Module):
    """Window attention and a feed-forward layer, each normalised after it and added (residual post-norm)."""

    def __init__(
        self, config: AuroraConfig, dim: int, window: int, trained_window: int, shift: int, drop_path: float
    ) -> None:
        super().__init__()
        self.attention = WindowAttention(config, dim, window, trained_window, shift)
        self.attention_norm = nn.LayerNorm(dim)
        self.feed = SwiGLU(dim) if config.mlp == "swiglu" else GeluMLP(dim)
        self.feed_norm = nn.LayerNorm(dim)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> the same shape."""
        x = x + self.dropped(self.attention_norm(self.attention(x)))
        return x + self.dropped(self.feed_norm(self.feed(x)))

    def dropped(self, branch: Tensor) -> Tensor:
        """Stochastic depth (arXiv:1603.09382): drop the branch for some samples, scale it up for the
        others."""
        if self.drop_path == 0.0 or not self.training:
            return branch
        keep = torch.rand(branch.shape[0], 1, 1, 1, device=branch.device) >= self.drop_path
        return branch * (keep / (1 - self.drop_path)).to(branch.dtype)


class WindowAttention(nn.Module):
    """Scaled cosine attention in (shifted) windows with a continuous log-spaced position bias; keys have no
    bias term."""

    def __init__(self, config: AuroraConfig, dim: int, window: int, trained_window: int, shift: int) -> None:
        super().__init__()
        self.window, self.trained_window, self.shift, self.head_dim = (
            window,
            trained_window,
            shift,
            config.head_dim,
        )
        self.padding = config.window_padding
        heads = dim // config.head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.empty(dim))
        self.v_bias = nn.Parameter(torch.empty(dim))
        self.out = nn.Linear(dim, dim)
        self.logit_scale = nn.Parameter(torch.empty(heads))
        self.position_bias = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> the same shape. The window is cut to the map, and a map of one window is not
        shifted."""
        batch, height, width, dim = x.shape
        window = (min(self.window, height), min(self.window, width))
        shift = (self.shift if height > window[0] else 0, self.shift if width > window[1] else 0)
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        if type(self.qkv) is nn.Linear:  # one pass over the output
            qkv = F.linear(x, self.qkv.weight, bias)
        else:  # an adapter (LoRA, peft's too) has a forward of its own
            qkv = self.qkv(x)
            qkv = qkv + bias.to(qkv.dtype)
        qkv = qkv.view(batch, height, width, 3, -1, self.head_dim)
        pad_kv = None
        if self.padding == "zero":
            pad_kv = (
                torch.stack((torch.zeros_like(self.v_bias), self.v_bias))
                .view(2, -1, self.head_dim)
                .to(qkv.dtype)
            )
        y = window_attention(
            qkv,
            self.relative_bias(window),
            window=window,
            shift=shift,
            logit_scale=self.logit_scale,
            pad_kv=pad_kv,
        )
        return self.out(y)

    def relative_bias(self, window: tuple[int, int]) -> Tensor:
        """The bias table [(2wy-1)*(2wx-1), h]: 16 * sigmoid(MLP(log-spaced offset)), section 3.3 of the
        paper."""
        # a tensor that was made while tracing must not outlive the trace
        make = log_offsets if torch.compiler.is_compiling() else remembered_offsets
        offsets = make(window, self.trained_window, self.q_bias.device).to(self.q_bias.dtype)
        return 16 * torch.sigmoid(self.position_bias(offsets).float())


class GeluMLP(nn.Module):
    """SwinV2's own feed-forward layer: 4x wide, GELU, with biases; [..., dim] -> [..., dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim)
        self.out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(x)))


def log_offsets(window: tuple[int, int], trained_window: int, device: torch.device) -> Tensor:
    """Relative offsets [(2wy-1)*(2wx-1), 2] of a window, row-major, log-spaced: sign(t) log2(1 + |t|) / 3
    with t = 8 * offset / (w - 1).

    w is the window that the bias is trained with, so that an offset keeps its meaning where a smaller map
    cuts the window.
    """
    with torch.inference_mode(False):  # a tensor made in inference mode could not serve training later
        y = torch.arange(-(window[0] - 1), window[0], dtype=torch.float32, device=device)
        x = torch.arange(-(window[1] - 1), window[1], dtype=torch.float32, device=device)
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
        offsets = grid * (8 / max(trained_window - 1, 1))
        return offsets.sign() * torch.log2(offsets.abs() + 1) / math.log2(8)


remembered_offsets = lru_cache(maxsize=64)(log_offsets)
