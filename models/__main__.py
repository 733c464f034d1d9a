"""`python -m models`: the table of sizes, counted on the meta device; `--json` for machines."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from models.aurora import AURORA_SIZES
from models.parameters import count_aurora, count_perceiver
from models.perceiver import PERCEIVER_SIZES


def main() -> None:
    """Print each size's shape and parameters, of both models."""
    parser = argparse.ArgumentParser(
        prog="python -m models", description="Sizes of the models and their parameters."
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON with every field of every configuration"
    )
    arguments = parser.parse_args()
    aurora = {name: count_aurora(config) for name, config in AURORA_SIZES.items()}
    perceiver = {name: count_perceiver(config) for name, config in PERCEIVER_SIZES.items()}
    if arguments.json:
        listed = {"aurora": listing(AURORA_SIZES, aurora), "perceiver": listing(PERCEIVER_SIZES, perceiver)}
        print(json.dumps(listed, indent=2))
        return
    print_aurora(aurora)
    print()
    print_perceiver(perceiver)


def listing(sizes: Mapping[str, Any], counts: dict[str, dict[str, int]]) -> dict[str, dict[str, Any]]:
    """Every field of each size's configuration, and its parameters."""
    return {
        name: {"config": dataclasses.asdict(config), "parameters": counts[name]}
        for name, config in sizes.items()
    }


def print_aurora(counts: dict[str, dict[str, int]]) -> None:
    """Shape and parameters of each size."""
    print("Aurora-Vision, parameters in millions, counted on the meta device")
    print(f"{'size':6} {'image':>5} {'width':>5} {'depths':>12} {'windows':>12} {'text':>11} "
          f"{'encoder':>8} {'heads':>7} {'decoder':>8} {'total':>8}")  # fmt: skip
    for name, config in AURORA_SIZES.items():
        text = f"{config.decoder_width}x({config.unimodal_layers}+{config.crossmodal_layers})"
        millions = [counts[name][part] / 1e6 for part in ("encoder", "heads", "decoder", "total")]
        print(f"{name:6} {config.image_size:5} {config.width:5} {','.join(map(str, config.depths)):>12} "
              f"{','.join(map(str, config.windows)):>12} {text:>11} "
              f"{millions[0]:8.1f} {millions[1]:7.1f} {millions[2]:8.1f} {millions[3]:8.1f}")  # fmt: skip


def print_perceiver(counts: dict[str, dict[str, int]]) -> None:
    """The same for PerceiverIO; tokens are those of an image, the longest sound, the longest clip and text."""
    print("PerceiverIO-Multimodal, parameters in millions, counted on the meta device")
    print(f"{'size':6} {'latents':>8} {'width x layers':>14} {'image/audio/video/text tokens':>30} "
          f"{'encoders':>8} {'latent':>8} {'text dec':>8} {'queries':>8} {'total':>8}")  # fmt: skip
    for name, config in PERCEIVER_SIZES.items():
        grids = (config.image_grid, config.audio_grid, config.video_grid, (config.text_length,))
        tokens = "/".join(str(math.prod(grid)) for grid in grids)
        parts = ("encoders", "latent", "text_decoder", "query_decoders", "total")
        millions = " ".join(f"{counts[name][part] / 1e6:8.1f}" for part in parts)
        print(f"{name:6} {config.latents:8} {f'{config.latent_width}x{config.latent_layers}':>14} {tokens:>30} "
              f"{millions}")  # fmt: skip


if __name__ == "__main__":
    main()
