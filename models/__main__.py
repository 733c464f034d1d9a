"""`python -m models`: the table of sizes, counted on the meta device; `--json` for machines."""

from __future__ import annotations

import argparse
import dataclasses
import json

from models.aurora import AURORA_SIZES
from models.parameters import count_aurora


def main() -> None:
    """Print each size's shape and parameters."""
    parser = argparse.ArgumentParser(
        prog="python -m models", description="Sizes of the models and their parameters."
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON with every field of every configuration"
    )
    arguments = parser.parse_args()
    counts = {name: count_aurora(config) for name, config in AURORA_SIZES.items()}
    if arguments.json:
        sizes = {
            name: {"config": dataclasses.asdict(config), "parameters": counts[name]}
            for name, config in AURORA_SIZES.items()
        }
        print(json.dumps({"aurora": sizes}, indent=2))
        return
    print("Aurora-Vision, parameters in millions, counted on the meta device")
    print(f"{'size':6} {'image':>5} {'width':>5} {'depths':>12} {'windows':>12} {'text':>11} "
          f"{'encoder':>8} {'heads':>7} {'decoder':>8} {'total':>8}")  # fmt: skip
    for name, config in AURORA_SIZES.items():
        text = f"{config.decoder_width}x({config.unimodal_layers}+{config.crossmodal_layers})"
        millions = [counts[name][part] / 1e6 for part in ("encoder", "heads", "decoder", "total")]
        print(f"{name:6} {config.image_size:5} {config.width:5} {','.join(map(str, config.depths)):>12} "
              f"{','.join(map(str, config.windows)):>12} {text:>11} "
              f"{millions[0]:8.1f} {millions[1]:7.1f} {millions[2]:8.1f} {millions[3]:8.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
