"""What `kernels.accelerate` does to models of timm: their attention layers, and a whole training step.

Both sides are timm's own module with the same weights; one of them is accelerated. The layer is what a Swin block does
between its norm and its residual: roll, pad, partition, qkv, attention, projection, and back. In a half type all of it
is in that type, as after `model.to(dtype)`; the training step uses autocast.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from bench import work
from bench.measure import random_like
from bench.peers.autocast import wide
from bench.peers.compiling import compiled_for_gpu
from bench.peers.step import Features, Trained, training_flops
from bench.peers.window import WindowCase
from bench.subject import TRAINING, Absent, Function, Peer, Subject
from bench.work import Work
from kernels import accelerate


@dataclass(frozen=True)
class AttentionCase(WindowCase):
    """The attention layer of timm's SwinV2 block, or without `cosine` of its Swin block, on the map of a WindowCase."""

    @property
    def dim(self) -> int:
        """Channels."""
        return self.heads * self.head_dim

    @property
    def shape(self) -> str:
        """For readers."""
        return f"{'SwinV2' if self.cosine else 'Swin'} attention, {super().shape}"

    def inputs(self, device: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        """x [B, H, W, C] in the dtype."""
        shape = (self.batch, self.height, self.width, self.dim)
        return {"x": random_like(torch.empty(shape, device=device, dtype=dtype), seed)}

    def work(self, mode: str, dtype: torch.dtype) -> Work:
        """A block's without its feed-forward layers."""
        tokens = self.batch * self.height * self.width
        return work.swin_block(tokens, self.dim, self.slots, 0, dtype.itemsize, backward=mode == TRAINING)


class Attention(nn.Module):
    """The attention of a timm block, x [B, H, W, C] -> [B, H, W, C]; its parameters alone get gradients."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block.requires_grad_(False)
        self.block.attn.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block._attn(x)  # type: ignore[operator]
        return out


@cache
def _block(case: AttentionCase) -> nn.Module:
    """timm's block with random weights that bfloat16 holds exactly, fp32 on the CPU: those that all take."""
    try:
        from timm.models.swin_transformer import SwinTransformerBlock
        from timm.models.swin_transformer_v2 import SwinTransformerV2Block
    except ImportError as error:
        raise Absent(f"timm is not installed ({error})") from None
    kind = SwinTransformerV2Block if case.cosine else SwinTransformerBlock
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = kind(
            case.dim, (case.height, case.width), case.heads, window_size=case.window, shift_size=case.shift
        )
        for parameter in block.parameters():  # biases start at 0: make all of them matter
            parameter.data += 0.02 * torch.randn_like(parameter)
            parameter.data = parameter.data.bfloat16().float()
    return block


def _timm(case: AttentionCase, device: str, dtype: torch.dtype) -> Function:
    return Attention(copy.deepcopy(_block(case)).to(device, dtype))


def _compiled(case: AttentionCase, device: str, dtype: torch.dtype) -> Function:
    return compiled_for_gpu(_timm(case, device, dtype), device)


def _accelerated(name: str, backend: str) -> Peer:
    def build(case: AttentionCase, device: str, dtype: torch.dtype) -> Function:
        layer = _timm(case, device, dtype)
        accelerate(layer, backend=backend)  # type: ignore[arg-type]
        return layer

    return Peer(name, build, ours=True)


ACCELERATED_ATTENTION = Subject(
    "accelerated_attention",
    (
        _accelerated("accelerated", "auto"),
        _accelerated("triton", "triton"),
        Peer("timm", _timm),
        Peer("compiled", _compiled, note="timm's, compiled; compile time is not counted"),
    ),
    exact="timm",
    plain=("timm",),
    depth=1.5,  # less than other layers': an error of 1% in the attention must show in bf16, too
)


@dataclass(frozen=True)
class ModelCase:
    """A model of timm, by its name there."""

    model: str
    side: int  # of its images
    batch: int

    @property
    def name(self) -> str:
        """timm's."""
        return self.model

    @property
    def shape(self) -> str:
        """For readers."""
        parameters = sum(p.numel() for p in _model(self.model).parameters())
        return (
            f"{self.batch} images of {self.side}x{self.side}, {parameters / 1e6:.1f}M parameters, fused AdamW"
        )

    def inputs(self, device: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        """images [B, 3, S, S], fp32 (fp64 for the exact result): autocast does the rest."""
        images = torch.empty(self.batch, 3, self.side, self.side, device=device, dtype=wide(dtype))
        return {"images": random_like(images, seed)}

    def work(self, mode: str, dtype: torch.dtype) -> Work:
        """FLOPs as torch's counter finds them in timm's forward and backward, per image; bytes are not assumed."""
        return Work(self.batch * _flops(self.model, self.side), 0.0, self.batch, "images")


@cache
def _model(name: str) -> nn.Module:
    """timm's model with random weights, without head and drop path: fp32 on the CPU."""
    try:
        import timm
    except ImportError as error:
        raise Absent(f"timm is not installed ({error})") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(name, num_classes=0, drop_path_rate=0.0)
    return model


@cache
def _flops(name: str, side: int) -> float:
    return training_flops(Features(_model(name)), ModelCase(name, side, 1).inputs("cpu", torch.float32, 0))


def _timm_step(case: ModelCase, device: str, dtype: torch.dtype) -> Function:
    return Trained(Features(copy.deepcopy(_model(case.model))), device, dtype)


def _compiled_step(case: ModelCase, device: str, dtype: torch.dtype) -> Function:
    features = Features(copy.deepcopy(_model(case.model)))
    return Trained(compiled_for_gpu(features, device), device, dtype)


def _accelerated_step(name: str, backend: str) -> Peer:
    def build(case: ModelCase, device: str, dtype: torch.dtype) -> Function:
        model = copy.deepcopy(_model(case.model))
        accelerate(model, backend=backend)
        return Trained(Features(model), device, dtype)

    return Peer(name, build, ours=True)


ACCELERATED_STEP = Subject(
    "accelerated_step",
    (
        _accelerated_step("accelerated", "auto"),
        _accelerated_step("triton", "triton"),
        Peer("timm", _timm_step),
        Peer("compiled", _compiled_step, note="timm's, compiled; compile time is not counted"),
    ),
    exact="timm",
    plain=("timm",),
    depth=4.0,
)
