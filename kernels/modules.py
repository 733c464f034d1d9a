"""Window attention as a module, for models that are written from scratch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.accelerated.attend import continuous_table
from kernels.backend import Plan, resolve
from kernels.window_attention.op import NEVER, window_attention

NAME = "WindowAttention"
MLP_WIDTH = 512  # hidden units of SwinV2's position bias
LOGIT_SCALE = math.log(10.0)  # SwinV2's cosine is multiplied by 10 at first
STD = 0.02


class WindowAttention(nn.Module):
    """Multi-head self-attention inside the (shifted) windows of a map: [B, H, W, C] -> [B, H, W, C], any H, W.

    With its defaults the attention of Swin (arXiv:2103.14030); with `cosine=True, position_bias="continuous"` that of
    SwinV2 (arXiv:2111.09883). There is no norm, dropout or residual in it. Parameters are named as in timm, whose
    weights load by name (`load_state_dict`): Swin with position_bias="table", SwinV2 with cosine and "continuous".

    dim: C, divisible by heads. window, shift: int or (y, x), 0 <= shift < window.
    qkv_bias: whether queries, keys and values get a bias; with cosine=True, as in SwinV2, keys get none.
    position_bias: "table", one number per head and relative position; "continuous", those numbers from an MLP over
        log-spaced relative positions, at most 16; or None.
    pretrained_window: for "continuous", the window that the weights were trained with, where it was another one.
    cosine: cosine attention with a learnable scale per head, at most 100.
    padding: what fills a map up to whole windows is "masked" (the result does not depend on it), or takes part as
        "keys" of zeros that went through the qkv layer, as in timm and torchvision.
    backend: as for `window_attention`.

    A map smaller than the window along an axis: the window is cut to the map there, keeping each relative position's
    bias. An axis that one window covers is not shifted. That is Swin's rule, applied to every map as it comes.

    Raises ValueError (values, shapes), TypeError (dtypes that `window_attention` refuses), BackendError (a backend
    that this version does not have).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int | tuple[int, int],
        shift: int | tuple[int, int] = 0,
        qkv_bias: bool = True,
        position_bias: Literal["table", "continuous"] | None = "table",
        pretrained_window: int | tuple[int, int] | None = None,
        cosine: bool = False,
        padding: Literal["masked", "keys"] = "masked",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.padding, self.backend = dim, heads, padding, backend
        self.window, self.shift = _pair("window", window), _pair("shift", shift)
        self.pretrained_window = _pair(
            "pretrained_window", window if pretrained_window is None else pretrained_window
        )
        self.position_bias, self.cosine = position_bias, cosine
        self._check(pretrained_window is not None)
        kind: Any = {"device": device, "dtype": dtype}
        wy, wx = self.window

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias and not cosine, **kind)
        self.proj = nn.Linear(dim, dim, **kind)
        if cosine:
            self.logit_scale = nn.Parameter(torch.empty(heads, 1, 1, **kind))
            # In the place of qkv.bias: queries and values have one, keys have none.
            self.q_bias = nn.Parameter(torch.empty(dim, **kind)) if qkv_bias else None
            self.v_bias = nn.Parameter(torch.empty(dim, **kind)) if qkv_bias else None
        if position_bias == "table":
            self.relative_position_bias_table = nn.Parameter(
                torch.empty((2 * wy - 1) * (2 * wx - 1), heads, **kind)
            )
        elif position_bias == "continuous":
            self.cpb_mlp = nn.Sequential(
                nn.Linear(2, MLP_WIDTH, **kind),
                nn.ReLU(inplace=True),
                nn.Linear(MLP_WIDTH, heads, bias=False, **kind),
            )
            coords = torch.empty(2 * wy - 1, 2 * wx - 1, 2, **kind)
            self.register_buffer("relative_coords_table", coords, persistent=False)
            self.relative_coords_table: Tensor
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """All initial values, as in Swin and SwinV2.

        Weights, also those of the MLP, and the bias table: truncated normal, std 0.02. Biases: 0. logit_scale: ln 10.
        The MLP's coordinates, which are no parameter, are made here too.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.position_bias == "table":
            nn.init.trunc_normal_(self.relative_position_bias_table, std=STD)
        elif self.position_bias == "continuous":
            table = log_spaced_coords(self.window, self.pretrained_window)
            self.relative_coords_table.copy_(table)
        if self.cosine:
            nn.init.constant_(self.logit_scale, LOGIT_SCALE)
            for bias in (self.q_bias, self.v_bias):
                if bias is not None:
                    nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> [B, H, W, C]."""
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"{NAME}: x must be [B, H, W, {self.dim}], got {list(x.shape)}")
        bias = self._qkv_bias()
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))
        (height, width), (wy, wx), (sy, sx) = x.shape[1:3], self.window, self.shift
        # not min(), which a compiler would carry as a size that is unknown
        window = wy if height >= wy else height, wx if width >= wx else width
        shift = sy if height > wy else 0, sx if width > wx else 0
        pad_kv = None
        if self.padding == "keys":
            zeros = qkv.new_zeros(3, self.heads, self.dim // self.heads)
            pad_kv = (zeros if bias is None else bias.view(zeros.shape))[1:]
        out = window_attention(
            qkv,
            self._table(window),
            window=window,
            shift=shift,
            logit_scale=self.logit_scale.flatten() if self.cosine else None,
            pad_kv=pad_kv,
            backend=self.backend,
        )
        return self.proj(out)

    def extra_repr(self) -> str:
        """What print(model) shows of the settings."""
        return (
            f"{self.dim}, heads={self.heads}, window={self.window}, shift={self.shift}, "
            f"position_bias={self.position_bias!r}, cosine={self.cosine}, padding={self.padding!r}, "
            f"backend={self.backend!r}"
        )

    def _qkv_bias(self) -> Tensor | None:
        if not self.cosine:
            return self.qkv.bias
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))

    def _table(self, window: tuple[int, int]) -> Tensor | None:
        """[(2wy-1) * (2wx-1), heads] for a window that may be cut: the middle of the whole table."""
        if self.position_bias is None:
            return None
        table: Tensor
        if self.position_bias == "table":
            table = self.relative_position_bias_table
        else:
            table = continuous_table(self.cpb_mlp, self.relative_coords_table, self.heads)
        if window == self.window:
            return table
        (wy, wx), (cut_y, cut_x) = self.window, window
        table = table.view(2 * wy - 1, 2 * wx - 1, self.heads)
        table = table[wy - cut_y : wy + cut_y - 1, wx - cut_x : wx + cut_x - 1]
        return table.reshape(-1, self.heads)

    def _check(self, named_pretrained_window: bool) -> None:
        """The constructor's arguments, or an error that says what came and what is supported."""
        if self.heads < 1 or self.dim < 1 or self.dim % self.heads:
            raise ValueError(
                f"{NAME}: dim must be a multiple of heads, got dim {self.dim}, heads {self.heads}"
            )
        if min(self.window) < 1 or min(self.pretrained_window) < 1:
            raise ValueError(
                f"{NAME}: window and pretrained_window must be at least 1, got {self.window}, "
                f"{self.pretrained_window}"
            )
        if not all(0 <= s < w for s, w in zip(self.shift, self.window, strict=True)):
            raise ValueError(
                f"{NAME}: shift must be from 0 to less than the window's {self.window}, got {self.shift}"
            )
        if self.position_bias not in ("table", "continuous", None):
            raise ValueError(
                f"{NAME}: position_bias must be 'table', 'continuous' or None, got {self.position_bias!r}"
            )
        if named_pretrained_window and self.position_bias != "continuous":
            raise ValueError(
                f"{NAME}: pretrained_window is for position_bias='continuous', got {self.position_bias!r}"
            )
        if self.padding not in ("masked", "keys"):
            raise ValueError(f"{NAME}: padding must be 'masked' or 'keys', got {self.padding!r}")
        resolve(NAME, self.backend, Plan("auto", "", NEVER))  # raises for a backend that there is not


def log_spaced_coords(window: tuple[int, int], pretrained_window: tuple[int, int]) -> Tensor:
    """SwinV2's coordinates (arXiv:2111.09883, equation 4) of all relative positions, float64 [2wy-1, 2wx-1, 2].

    Offsets are scaled so that the largest one of the window that was trained with is 8, then sign(d) * log2(1 + |d|),
    divided by log2(8) = 3 as in the authors' code.
    """
    axes = []
    for size, trained in zip(window, pretrained_window, strict=True):
        offsets = 8 * torch.arange(1 - size, size, dtype=torch.float64) / max(trained - 1, 1)
        axes.append(offsets.sign() * torch.log2(1 + offsets.abs()) / 3)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """`value` as (y, x)."""
    both = (value, value) if isinstance(value, int) else value
    if not (isinstance(both, Sequence) and len(both) == 2 and all(isinstance(size, int) for size in both)):
        raise ValueError(f"{NAME}: {name} must be an int or (y, x) of ints, got {value!r}")
    return both[0], both[1]
