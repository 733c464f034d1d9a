"""How often altered copies of pictures are found, and different pictures taken for copies:

    python -m dataload.stats.trial 'shards/test-*.tar'

Every picture is altered in the ways below and compared with itself; every pair of different pictures is compared
too. The corpus should hold no duplicates (`python -m dataload.stats --duplicates` says whether it does), or they
count as mistakes.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageEnhance

from dataload import images, shards
from dataload.progress import counted
from dataload.stats.looks import LOOK, WHOLE, look
from dataload.stats.near import CHECK, DISTANCE, search


def _jpeg(image: Image.Image, quality: int = 90) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def _scaled(image: Image.Image, x: float, y: float) -> Image.Image:
    size = (max(1, round(image.width * x)), max(1, round(image.height * y)))
    return image.resize(size, Image.Resampling.BILINEAR)


def _cut(image: Image.Image, share: float, corner: bool = False) -> Image.Image:
    """Without `share` of width and of height: half of it on each side, or all at the right and the bottom."""
    width, height = image.size
    left, top = (0, 0) if corner else (width * share / 2, height * share / 2)
    box = (left, top, left + width * (1 - share), top + height * (1 - share))
    return image.crop(tuple(round(x) for x in box))  # type: ignore[arg-type]


MIRROR = Image.Transpose.FLIP_LEFT_RIGHT
ALTERED: dict[str, Callable[[Image.Image], bytes]] = {
    "recompressed (JPEG 50)": lambda i: _jpeg(i, 50),
    "recompressed (JPEG 20)": lambda i: _jpeg(i, 20),
    "half the size, JPEG 50": lambda i: _jpeg(_scaled(i, 0.5, 0.5), 50),
    "twice the size": lambda i: _jpeg(_scaled(i, 2, 2)),
    "stretched by a third": lambda i: _jpeg(_scaled(i, 4 / 3, 1)),
    "brighter by a fifth": lambda i: _jpeg(ImageEnhance.Brightness(i).enhance(1.2)),
    "more contrast (1.3)": lambda i: _jpeg(ImageEnhance.Contrast(i).enhance(1.3)),
    "grey": lambda i: _jpeg(i.convert("L")),
    "mirrored": lambda i: _jpeg(i.transpose(MIRROR)),
    "cropped by 4%": lambda i: _jpeg(_cut(i, 0.04)),
    "cropped by 4%, mirrored, JPEG 50": lambda i: _jpeg(_cut(i.transpose(MIRROR), 0.04), 50),
    "cropped by 6%": lambda i: _jpeg(_cut(i, 0.06)),
    "cropped by 10%": lambda i: _jpeg(_cut(i, 0.1)),
    "a corner's 5% cut off": lambda i: _jpeg(_cut(i, 0.05, corner=True)),
}


def measure(
    pictures: Sequence[bytes],
    distance: int = DISTANCE,
    check: int = CHECK,
    ways: Sequence[str] = tuple(ALTERED),
) -> tuple[dict[str, float], int, int]:
    """(share found by way of altering, different pairs taken for copies, different pairs in all)."""
    with ThreadPoolExecutor() as pool:
        originals = _looks(list(pool.map(lambda data: look(data, True)[0], pictures)))
        found = {}
        for way in ways:
            rows = pool.map(lambda data: look(ALTERED[way](images.decode(data)), True)[0], pictures)  # noqa: B023
            copies = _looks(list(counted(rows, f"pictures {way}", len(pictures))))
            hits = search(copies, originals, distance=distance, check=check)
            found[way] = int(np.count_nonzero(hits.query == hits.found)) / len(pictures)
    wrong = search(originals, originals, distance=distance, check=check, within=True)
    whole = int(np.count_nonzero(originals["state"] == WHOLE))
    return found, len(wrong), whole * (whole - 1) // 2


def _looks(rows: Sequence[np.void]) -> np.ndarray:
    return np.array(rows, dtype=LOOK)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dataload.stats.trial",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="+", metavar="PATTERN", help="shards of pictures")
    parser.add_argument("--most", type=int, default=1500, help="pictures that are used (default 1500)")
    parser.add_argument("--distance", type=int, default=DISTANCE, help=f"bits of 64 (default {DISTANCE})")
    parser.add_argument("--check", type=int, default=CHECK, help=f"bits of 256 (default {CHECK})")
    options = parser.parse_args(arguments)
    try:
        index = shards.index(shards.expand(options.shards))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    pictures = [index.image(sample) for sample in range(min(options.most, len(index)))]
    found, wrong, pairs = measure(pictures, options.distance, options.check)
    print(f"{len(pictures):,} pictures, distance {options.distance}, check {options.check}")
    for way, share in found.items():
        print(f"  {way:34} {100 * share:6.2f}% found")
    print(f"{wrong:,} of {pairs:,} pairs of different pictures were taken for copies")
    return 0


if __name__ == "__main__":
    sys.exit(main())
