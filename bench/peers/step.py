"""A training step of an encoder: Aurora's against timm's SwinV2 of the same size, the same function to the last weight.

Forward under autocast, a loss over the features, backward, fused AdamW. The check before the clock compares the
features of both with timm's in fp64.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import random_like
from bench.peers.autocast import Autocast, wide
from bench.subject import Absent, Function, Peer, Subject
from bench.work import Work
from models import AURORA_SIZES
from models.aurora.convert import config_from_timm, load_timm
from models.aurora.encoder import SwinEncoder


@dataclass(frozen=True)
class StepCase:
    """The encoder of one of Aurora's sizes, with SwinV2's own feed-forward layers so that timm has the same model."""

    size: str
    batch: int

    @property
    def name(self) -> str:
        """ "aurora-tiny"."""
        return f"aurora-{self.size}"

    @property
    def shape(self) -> str:
        """For readers."""
        side = AURORA_SIZES[self.size].image_size
        parameters = sum(p.numel() for p in _timm_model(self).parameters())
        return f"{self.batch} images of {side}x{side}, SwinV2 with {parameters / 1e6:.1f}M parameters, fused AdamW"

    def inputs(self, device: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        """images [B, 3, S, S], fp32 (fp64 for the exact result): autocast does the rest."""
        side = AURORA_SIZES[self.size].image_size
        images = torch.empty(self.batch, 3, side, side, device=device, dtype=wide(dtype))
        return {"images": random_like(images, seed)}

    def work(self, mode: str, dtype: torch.dtype) -> Work:
        """FLOPs as torch's counter finds them in timm's forward and backward, per image; bytes are not assumed."""
        return Work(self.batch * _flops(self.size), 0.0, self.batch, "images")


@cache
def _timm_model(case: StepCase) -> nn.Module:
    """timm's SwinV2 with random weights: those that both take. On the CPU, fp32."""
    try:
        from timm.models.swin_transformer_v2 import SwinTransformerV2
    except ImportError as error:
        raise Absent(f"timm is not installed ({error})") from None
    config = AURORA_SIZES[case.size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SwinTransformerV2(
            img_size=config.image_size, patch_size=4, num_classes=0, embed_dim=config.width, depths=config.depths,
            num_heads=tuple(width // config.head_dim for width in config.stage_widths),
            window_size=max(config.windows), drop_path_rate=0.0,
        )  # fmt: skip


@cache
def _flops(size: str) -> float:
    case = StepCase(size, 1)
    return training_flops(_timm_model(case), case.inputs("cpu", torch.float32, 0))


def training_flops(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """What torch's counter finds in one forward and backward."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs.values()).square().mean().backward()
    model.zero_grad()
    return float(counter.get_total_flops())


class Trained(Autocast):
    """The encoder's last map [B, 8C, H, W] when called; `step` is what is timed."""

    def __init__(self, encoder: nn.Module, device: str, dtype: torch.dtype) -> None:
        super().__init__(encoder.train(), device, dtype)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-5, fused=dtype != torch.float64)

    def step(self, images: Tensor) -> None:
        """One optimizer step."""
        self(images).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class _LastMap(nn.Module):
    """The last of the encoder's four maps."""

    def __init__(self, encoder: SwinEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)[3]


class Features(nn.Module):
    """timm's forward_features: stem, stages, last norm."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        return out


def _aurora(case: StepCase, device: str, dtype: torch.dtype) -> Function:
    theirs = _timm_model(case)
    encoder = SwinEncoder(config_from_timm(theirs))
    load_timm(encoder, theirs.state_dict())
    return Trained(_LastMap(encoder), device, dtype)


def _timm(case: StepCase, device: str, dtype: torch.dtype) -> Function:
    return Trained(Features(copy.deepcopy(_timm_model(case))), device, dtype)


TRAINING_STEP = Subject(
    "training_step",
    (Peer("aurora", _aurora, ours=True), Peer("timm", _timm)),
    exact="timm",
    plain=("timm",),
    depth=4.0,
)
