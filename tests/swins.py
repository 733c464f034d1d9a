"""What the tests of kernels/patch.py share: small Swin models of three libraries, and a count of the kernel's calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.accelerated import attend

timm = pytest.importorskip("timm", reason="needs timm: install the test extra")
tv = pytest.importorskip(
    "torchvision.models.swin_transformer", reason="needs torchvision: install the test extra"
)
hf = pytest.importorskip("transformers", reason="needs transformers: install the test extra")

# Two stages; the second layer of each is shifted, where its map is larger than the window.
SIZES = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
LAYERS = 4


def of_timm(version: str, size: int, window: int, **options: Any) -> nn.Module:
    model = {"1": timm.models.SwinTransformer, "2": timm.models.SwinTransformerV2}[version]
    return model(img_size=size, window_size=window, num_classes=3, drop_path_rate=0.0, **SIZES, **options)


def of_torchvision(version: str, size: int, window: int, **options: Any) -> nn.Module:
    if version == "2":
        options |= {"block": tv.SwinTransformerBlockV2, "downsample_layer": tv.PatchMergingV2}
    sizes = {name: list(value) if isinstance(value, tuple) else value for name, value in SIZES.items()}
    return tv.SwinTransformer([4, 4], window_size=[window, window], stochastic_depth_prob=0.0, num_classes=3,
                              **sizes, **options)  # fmt: skip


def of_transformers(version: str, size: int, window: int, **options: Any) -> nn.Module:
    config, model = {
        "1": (hf.SwinConfig, hf.SwinForImageClassification),
        "2": (hf.Swinv2Config, hf.Swinv2ForImageClassification),
    }[version]
    return model(
        config(image_size=size, window_size=window, drop_path_rate=0.0, num_labels=3, **SIZES, **options)
    )


LIBRARIES = {"timm": of_timm, "torchvision": of_torchvision, "transformers": of_transformers}
ALL = [(library, version) for library in LIBRARIES for version in "12"]
# (image, window): maps that the windows divide, that they do not, whose last stage is one window
FITS, PADS, COVERED = (64, 4), (72, 7), (56, 7)
SMALLER = (40, 7)  # maps of 10 and 5: the second is smaller than the window


def build(library: str, version: str, size: int, window: int, **options: Any) -> nn.Module:
    """A model whose every parameter matters, in float64, training."""
    torch.manual_seed(0)
    model = LIBRARIES[library](version, size, window, **options).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def small(library: str, version: str = "1", **options: Any) -> tuple[nn.Module, Tensor]:
    return build(library, version, 40, 4, **options), images(40)


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def outcome(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradients of a sum of them weighted 1, 2, 3."""
    out = model(x)
    logits = getattr(out, "logits", out)
    named = dict(model.named_parameters())
    loss = (logits * torch.arange(1, 4, dtype=x.dtype)).sum()
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {"": logits.detach()} | {n: g for n, g in zip(named, grads, strict=True) if g is not None}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets the backend of every call of the kernel that an accelerated layer makes from now on."""
    made: list[str] = []
    real: Callable[..., Tensor] = attend.window_attention

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        made.append(kwargs["backend"])
        return real(*args, **kwargs)

    monkeypatch.setattr(attend, "window_attention", counting)
    return made
