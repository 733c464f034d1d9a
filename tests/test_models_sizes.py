"""The ladder of sizes against the published table, counted from real modules on the meta device."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from models import AURORA_SIZES, AuroraConfig
from models.parameters import count_aurora

MILLIONS = {  # encoder, heads, decoder, total
    "tiny": (2.9, 3.0, 2.5, 8.5),
    "small": (43.5, 26.5, 24.8, 94.8),
    "base": (195.0, 54.7, 67.9, 317.6),
    "large": (722.5, 176.8, 124.0, 1023.2),
    "xl": (2708.6, 398.6, 596.0, 3703.1),
}


def encoder_closed_form(config: AuroraConfig) -> int:
    """Parameters of the encoder by arithmetic alone, part by part, without building a module."""
    total = (
        3 * 16 * config.width + config.width + 2 * config.width + config.width
    )  # stem, its norm, mask token
    for i, (dim, depth) in enumerate(zip(config.stage_widths, config.depths, strict=True)):
        heads, hidden = (
            dim // config.head_dim,
            -(-8 * dim // 384) * 128,
        )  # 8 dim / 3, rounded up to a multiple of 128
        block = 4 * dim**2 + 3 * dim + heads + (2 * 512 + 512 + 512 * heads) + 4 * dim + 3 * dim * hidden
        total += depth * block
        if i < 3:
            total += 8 * dim**2 + 4 * dim
    extra = config.depths[2] // config.extra_norm_every if config.extra_norm_every else 0
    return total + 2 * config.stage_widths[3] + extra * 2 * config.stage_widths[2]


@pytest.mark.parametrize("name", list(MILLIONS))
def test_parameters_agree_with_the_table(name: str) -> None:
    counted = count_aurora(AURORA_SIZES[name])
    for part, millions in zip(("encoder", "heads", "decoder", "total"), MILLIONS[name], strict=True):
        assert counted[part] / 1e6 == pytest.approx(millions, rel=0.02), part
    assert counted["encoder"] == encoder_closed_form(AURORA_SIZES[name])


def test_xl_is_within_one_percent_of_its_specification() -> None:
    assert count_aurora(AURORA_SIZES["xl"])["total"] == pytest.approx(3.7e9, rel=0.01)


def test_sizes_are_all_in_the_table() -> None:
    assert list(AURORA_SIZES) == list(MILLIONS)


def test_command_prints_the_table_and_json() -> None:
    text = subprocess.run([sys.executable, "-m", "models"], capture_output=True, text=True, check=True).stdout
    row = next(line for line in text.splitlines() if line.startswith("xl")).split()
    assert row[-4:] == ["2708.6", "398.6", "596.0", "3703.1"]
    data = json.loads(
        subprocess.run([sys.executable, "-m", "models", "--json"], capture_output=True, check=True).stdout
    )
    assert data["aurora"]["xl"]["parameters"] == count_aurora(AURORA_SIZES["xl"])
    assert data["aurora"]["tiny"]["config"]["image_size"] == 64


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("image_size", 50, "multiple of 32"),
        ("head_dim", 24, "multiple of head_dim"),
        ("text_length", 2, "at least 3"),
    ],
)
def test_impossible_configurations_are_refused(field: str, value: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AuroraConfig(**{field: value})
