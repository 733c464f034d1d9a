"""kernels.WindowAttention against timm's, whose weights it loads by name; and the READMEs' examples, which run."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import WindowAttention, window_attention
from kernels.accelerated.attend import continuous_table
from kernels.backend import BackendError
from kernels.modules import log_spaced_coords

ROOT = Path(__file__).resolve().parent.parent
V2: dict[str, Any] = {"cosine": True, "position_bias": "continuous"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_continuous_position_bias_is_not_rounded_to_half(dtype: torch.dtype) -> None:
    """Of up to 16: bfloat16 would be off by 1/32 there, in a logit."""
    raw = torch.linspace(-4, 4, 25 * 3, dtype=dtype).view(
        1, 5, 5, 3
    )  # what an MLP that is the identity makes
    table = continuous_table(nn.Identity(), raw, 3)
    assert table.dtype == (dtype if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(table, (16 / (1 + (-raw.double()).exp())).view(25, 3).to(table.dtype))


def timm_block(
    version: int, size: tuple[int, int], window: tuple[int, int], shift: Any, **options: Any
) -> Any:
    from timm.models import swin_transformer, swin_transformer_v2

    cls = (swin_transformer.SwinTransformerBlock, swin_transformer_v2.SwinTransformerV2Block)[version - 1]
    block = cls(24, size, 3, window_size=window, shift_size=shift, **options).double()
    for parameter in block.attn.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def assert_equal(ours: WindowAttention, block: Any, size: tuple[int, int]) -> None:
    """Outputs, and the gradients of the input and of the parameters that both call by one name and shape."""
    x = torch.randn(2, *size, 24, dtype=torch.float64, requires_grad=True)
    got, want = ours(x), block._attn(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    theirs = dict(block.attn.named_parameters())
    pairs = [(p, theirs[name]) for name, p in ours.named_parameters() if p.shape == theirs[name].shape]
    assert len(pairs) >= 4
    direction = torch.randn_like(want)
    mine = torch.autograd.grad(got, [x, *(p for p, _ in pairs)], direction)
    other = torch.autograd.grad(want, [x, *(p for _, p in pairs)], direction)
    torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def same_coordinates(ours: WindowAttention, block: Any) -> None:
    """timm rounds SwinV2's coordinates to float32; give it ours, which have to be the same up to that."""
    if ours.position_bias == "continuous":
        (wy, wx), (cut_y, cut_x) = ours.window, block.window_size
        coords = ours.relative_coords_table[wy - cut_y : wy + cut_y - 1, wx - cut_x : wx + cut_x - 1][None]
        torch.testing.assert_close(coords.float(), block.attn.relative_coords_table.float())
        block.attn.relative_coords_table = coords


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [((8, 12), (4, 4), (2, 2)), ((9, 7), (4, 3), (1, 0)), ((9, 7), (4, 3), (0, 0))],
)
def test_loads_timm_by_name(
    timm: ModuleType,
    version: int,
    bias: bool,
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    block = timm_block(version, size, window, shift, qkv_bias=bias)
    kind = V2 if version == 2 else {}
    ours = WindowAttention(
        24, 3, window=window, shift=shift, qkv_bias=bias, padding="keys", dtype=torch.float64, **kind
    )
    ours.load_state_dict(block.attn.state_dict())  # strict
    same_coordinates(ours, block)
    assert_equal(ours, block, size)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(3, 11), (4, 4), (9, 4), (2, 3)])
def test_maps_that_the_window_covers(timm: ModuleType, version: int, size: tuple[int, int]) -> None:
    """timm builds its block for one map, cutting window and shift; the bias of a relative position stays."""
    torch.manual_seed(0)
    cut = (min(4, size[0]), min(4, size[1]))
    options = {"pretrained_window_size": (4, 4)} if version == 2 else {}
    block = timm_block(version, size, (4, 4), (2, 2), **options)
    assert tuple(block.window_size) == cut
    ours = WindowAttention(
        24, 3, window=4, shift=2, padding="keys", dtype=torch.float64, **(V2 if version == 2 else {})
    )
    weights = block.attn.state_dict()
    if version == 1:
        whole = torch.randn(49, 3, dtype=torch.float64)
        rows = [(dy + 3) * 7 + dx + 3 for dy in range(1 - cut[0], cut[0]) for dx in range(1 - cut[1], cut[1])]
        block.attn.relative_position_bias_table.data = whole[rows]
        weights = weights | {"relative_position_bias_table": whole}
    ours.load_state_dict(weights)
    same_coordinates(ours, block)
    assert_equal(ours, block, size)


@pytest.mark.parametrize("pretrained", [None, (8, 8), (6, 12), (1, 1)])
def test_coordinates_are_timms(timm: ModuleType, pretrained: tuple[int, int] | None) -> None:
    from timm.models.swin_transformer_v2 import WindowAttention as TimmAttention

    for window in ((4, 6), (1, 5)):
        theirs = TimmAttention(
            8, window, 2, pretrained_window_size=pretrained or (0, 0)
        ).relative_coords_table[0]
        torch.testing.assert_close(log_spaced_coords(window, pretrained or window).float(), theirs)
        ours = WindowAttention(8, 2, window=window, pretrained_window=pretrained, **V2)
        torch.testing.assert_close(ours.relative_coords_table, theirs)


def test_masked_padding_and_no_bias() -> None:
    ours = WindowAttention(16, 2, window=4, shift=1, position_bias=None, backend="reference")
    x = torch.randn(2, 6, 9, 16)
    qkv = ours.qkv(x).unflatten(-1, (3, 2, 8))
    want = ours.proj(window_attention(qkv, window=4, shift=1, backend="eager"))
    torch.testing.assert_close(ours(x), want)
    assert set(ours.state_dict()) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}


def test_compiles_for_maps_of_several_sizes() -> None:
    module = WindowAttention(16, heads=2, window=4, shift=2)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for size in (8, 12, 16, 3):
        x = torch.randn(2, size, size, 16)
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize(
    "kind", [{}, V2, {"cosine": True}, {"position_bias": "continuous", "qkv_bias": False}]
)
@pytest.mark.parametrize("padding", ["masked", "keys"])
def test_every_parameter_learns_and_it_compiles(kind: dict[str, Any], padding: str) -> None:
    module = WindowAttention(16, 2, window=4, shift=2, padding=padding, **kind)  # type: ignore[arg-type]
    x = torch.randn(2, 7, 9, 16)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(compiled, module(x))
    compiled.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert (module(x).float() - compiled).abs().max() < 0.02
    assert module(x[:0]).shape == (0, 7, 9, 16)


def test_initial_values() -> None:
    module = WindowAttention(96, 3, window=7, device="meta", **V2)
    module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.fill_(float("nan"))
    module.reset_parameters()
    fresh = WindowAttention(96, 3, window=7, **V2)
    for (name, got), want in zip(module.named_parameters(), fresh.parameters(), strict=True):
        if name == "logit_scale":
            assert torch.equal(got, torch.full((3, 1, 1), math.log(10)))
        elif name.endswith("bias"):
            assert not got.any()
        else:
            assert got.std().item() == pytest.approx(0.02, rel=0.1) and got.shape == want.shape
    assert torch.equal(module.relative_coords_table, fresh.relative_coords_table)
    table = WindowAttention(96, 3, window=7).relative_position_bias_table
    assert table.shape == (169, 3) and table.std().item() == pytest.approx(0.02, rel=0.15)
    assert "96, heads=3, window=(7, 7), shift=(0, 0), position_bias='continuous', cosine=True" in repr(module)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"heads": 5}, ValueError, "dim must be a multiple of heads, got dim 16, heads 5"),
        ({"heads": 0}, ValueError, "got dim 16, heads 0"),
        ({"window": 0}, ValueError, r"window .* must be at least 1, got \(0, 0\)"),
        ({"window": 4.0}, ValueError, r"window must be an int or \(y, x\) of ints, got 4.0"),
        ({"window": (4, 4, 4)}, ValueError, r"an int or \(y, x\) of ints, got \(4, 4, 4\)"),
        ({"shift": 4}, ValueError, r"shift must be from 0 to less than the window's \(4, 4\), got \(4, 4\)"),
        ({"shift": (0, -1)}, ValueError, r"got \(0, -1\)"),
        (
            {"position_bias": "mlp"},
            ValueError,
            "position_bias must be 'table', 'continuous' or None, got 'mlp'",
        ),
        (
            {"pretrained_window": 8},
            ValueError,
            "pretrained_window is for position_bias='continuous', got 'table'",
        ),
        ({"pretrained_window": 0, **V2}, ValueError, "must be at least 1"),
        ({"padding": "zeros"}, ValueError, "padding must be 'masked' or 'keys', got 'zeros'"),
        ({"backend": "fast"}, ValueError, "WindowAttention: unknown backend 'fast'; supported: 'auto'"),
        ({"backend": "flash_attn"}, BackendError, "WindowAttention: backend 'flash_attn' cannot run"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"dim": 16, "heads": 2, "window": 4} | change
    with pytest.raises(error, match=message):
        WindowAttention(**arguments)


@pytest.mark.parametrize("shape", [(2, 64, 16), (2, 8, 8, 12)])
def test_errors_of_a_call(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"x must be \[B, H, W, 16\], got \[{', '.join(map(str, shape))}\]"):
        WindowAttention(16, 2, window=4)(torch.zeros(shape))


@pytest.mark.parametrize("file", ["README.md", "kernels/README.md"])
def test_examples_in_the_readme_run(timm: ModuleType, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    names: dict[str, Tensor] = {}
    blocks = [block for block in blocks if "from models import" not in block]  # those need a trained model
    for block in blocks:
        exec(compile(block, file, "exec"), names)
    assert len(blocks) >= 2 and "on window_attention" in capsys.readouterr().out
