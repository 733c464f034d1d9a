"""What `python -m dataload.verify` does with a file, in a process of its own: decodes it to the end.

Each function takes the bytes and a limit of pixels and returns what is missing of the file, in words; empty:
nothing. It raises BrokenSample for bytes that cannot be used.
"""

from __future__ import annotations


def image(data: bytes, max_pixels: int) -> str:
    """A picture."""
    from dataload.decode import picture as picture_decode

    picture_decode.decode(data, max_pixels)
    return ""


def audio(data: bytes, max_pixels: int) -> str:
    """A sound, all of it."""
    from dataload import audio as sounds

    return sounds.decode(data).problem


def video(data: bytes, max_pixels: int) -> str:
    """A video: 32 frames from all over it, and all of its sound."""
    from dataload import video as videos

    return videos.decode(data, frames=32, short_side=64, max_pixels=max_pixels).problem
