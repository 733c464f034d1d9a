"""Which files are pictures, sounds and videos, by their names."""

from __future__ import annotations

from pathlib import PurePath

from dataload.shards.tarindex import KIND_OF, MEDIA


def suffix_of(path: PurePath) -> str:
    """The suffix in small letters, without its dot."""
    return path.suffix.lower().lstrip(".")


def kind_of(path: PurePath) -> str:
    """ "image", "audio", "video", or "" for any other file."""
    kind = KIND_OF.get(suffix_of(path), "")
    return kind if kind in MEDIA else ""
