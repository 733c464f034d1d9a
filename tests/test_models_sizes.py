"""The ladder of sizes against the published table, counted from real modules on the meta device."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from models import AURORA_SIZES, PERCEIVER_SIZES, AuroraConfig
from models.parameters import count_aurora, count_perceiver

MILLIONS = {  # encoder, heads, decoder, total
    "tiny": (2.9, 3.0, 2.5, 8.5),
    "small": (43.5, 26.5, 24.8, 94.8),
    "base": (195.0, 54.7, 67.9, 317.6),
    "large": (722.5, 176.8, 124.0, 1023.2),
    "xl": (2708.6, 398.6, 596.0, 3703.1),
}

PERCEIVER_MILLIONS = {  # encoders, latent transformer, text decoder, query decoders, total
    "tiny": (1.8, 4.2, 1.2, 1.8, 9.0),
    "small": (24.5, 41.6, 9.8, 11.1, 87.0),
    "base": (70.1, 166.3, 59.0, 28.0, 323.5),
    "large": (174.4, 536.5, 257.3, 85.8, 1054.0),
    "xl": (505.4, 11898.2, 4577.5, 1045.7, 18026.9),
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


@pytest.mark.parametrize("name", list(PERCEIVER_MILLIONS))
def test_perceiver_parameters_agree_with_the_table(name: str) -> None:
    config, counted = PERCEIVER_SIZES[name], count_perceiver(PERCEIVER_SIZES[name])
    parts = ("encoders", "latent", "text_decoder", "query_decoders", "total")
    for part, millions in zip(parts, PERCEIVER_MILLIONS[name], strict=True):
        assert counted[part] / 1e6 == pytest.approx(millions, rel=0.02, abs=0.05), part
    # The latent transformer by arithmetic alone: the array, reads, blocks, the last norm.
    dim, inputs, head = config.latent_width, config.encoder_width, config.latent_head_dim
    feed = 3 * dim * (-(-8 * dim // 384) * 128) + 2 * dim
    read = 2 * dim * dim + 2 * dim * inputs + 2 * head + 2 * dim + inputs + feed
    block = 4 * dim * dim + 2 * head + 2 * dim + feed
    array = config.latents * dim + dim
    assert counted["latent"] == array + config.input_reads * read + config.latent_layers * block


def test_perceiver_xl_is_within_one_percent_of_its_specification() -> None:
    counted = count_perceiver(PERCEIVER_SIZES["xl"])
    assert counted["total"] == pytest.approx(18e9, rel=0.01)
    assert counted["latent"] + counted["text_decoder"] + counted["query_decoders"] > 0.95 * counted["total"]
    assert list(PERCEIVER_SIZES) == list(PERCEIVER_MILLIONS)


def test_command_prints_the_table_and_json() -> None:
    text = subprocess.run([sys.executable, "-m", "models"], capture_output=True, text=True, check=True).stdout
    aurora, perceiver = (line.split() for line in text.splitlines() if line.startswith("xl"))
    assert aurora[-4:] == ["2708.6", "398.6", "596.0", "3703.1"]
    assert perceiver[-5:] == ["505.4", "11898.2", "4577.5", "1045.7", "18026.9"]
    data = json.loads(
        subprocess.run([sys.executable, "-m", "models", "--json"], capture_output=True, check=True).stdout
    )
    assert data["aurora"]["xl"]["parameters"] == count_aurora(AURORA_SIZES["xl"])
    assert data["perceiver"]["xl"]["parameters"] == count_perceiver(PERCEIVER_SIZES["xl"])
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
