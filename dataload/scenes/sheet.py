"""A picture of what a generated corpus looks like, for people."""

from __future__ import annotations

import io
import json
import tarfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from dataload.scenes.text import CAPTIONS_PER_SCENE


def contact_sheet(shards: Sequence[Path], count: int, columns: int = 6) -> Image.Image:
    """The first `count` pictures of `shards` at twice their size, each above its captions."""
    shown: list[tuple[Image.Image, list[str]]] = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in [name for name in files if name.endswith(".png")][: count - len(shown)]:
            sidecar = files.get(name.removesuffix("png") + "json", b'{"captions": ["(uncaptioned)"]}')
            shown.append((Image.open(io.BytesIO(files[name])), json.loads(sidecar)["captions"]))
    side = 2 * shown[0][0].width
    width, height = max(side, 256) + 12, side + 12 * 3 * CAPTIONS_PER_SCENE + 12
    sheet = Image.new("RGB", (width * min(columns, len(shown)), height * -(-len(shown) // columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (picture, captions) in enumerate(shown):
        left, top = width * (number % columns) + 6, height * (number // columns) + 6
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, top))
        lines = [
            line
            for text in captions
            for line in textwrap.wrap(text, 44, initial_indent="- ", subsequent_indent="  ")
        ]
        pen.multiline_text((left, top + side + 4), "\n".join(lines), fill="black", spacing=1)
    return sheet
