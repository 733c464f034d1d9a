"""Sounds and videos by their headers: how long, of what rate or size. soundfile and PyAV, where they are installed, read
them in a child process, which a damaged file may crash."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec

from dataload.broken import BrokenSample
from dataload.sandbox import Sandbox

TIMEOUT = 30.0
"""seconds for a header"""


@dataclass(frozen=True)
class Header:
    """What a file says of itself. Seconds are 0 where it does not say."""

    seconds: float
    kind: str
    """ "8,000 Hz, 1 channel", "360x288, 25 fps" """


class BrokenMedia(BrokenSample):
    """No header that can be read."""


def missing() -> str:
    """The packages that are not here, for a sentence; empty = all are."""
    return " and ".join(name for name in ("soundfile", "av") if find_spec(name) is None)


def header(data: bytes, kind: str, sandbox: Sandbox) -> Header:
    """Of a file of `kind` "audio" or "video". Raises BrokenMedia, and ImportError where a package is missing."""
    if lacking := missing():
        raise ImportError(f"{lacking} must be installed: pip install 'auroraio[data]'")
    answer = sandbox.call(
        "dataload.stats.media:read",
        data,
        kind,
        timeout=TIMEOUT,
        needs=("av", "soundfile"),
        broken=BrokenMedia,
    )
    match answer:
        case (float() | int() as seconds, str(words)) if math.isfinite(seconds):
            return Header(float(seconds), words)
    raise BrokenMedia("the reader answered with something else than a header")


def read(data: bytes, kind: str) -> tuple[float, str]:
    """What `header` runs in the child: seconds, and the rest in words."""
    return _sound(data) if kind == "audio" else _video(data)


def _sound(data: bytes) -> tuple[float, str]:
    from dataload.decode.audio import header_here

    try:
        seconds, rate, channels = header_here(data)
    except BrokenSample as error:
        raise BrokenMedia(str(error)) from error
    return seconds, f"{rate:,} Hz, {channels} {'channel' if channels == 1 else 'channels'}"


def _video(data: bytes) -> tuple[float, str]:
    from dataload.decode.audio_av import open_container

    with open_container(data, BrokenMedia) as container:
        if not container.streams.video:
            raise BrokenMedia("no video in it")
        video = container.streams.video[0]
        codec = video.codec_context
        if codec is None:
            raise BrokenMedia("FFmpeg: no decoder for its pictures")
        rate = float(video.average_rate or Fraction(0))
        tracks = "with sound" if container.streams.audio else "silent"
        return (container.duration or 0) / 1e6, f"{codec.width}x{codec.height}, {rate:.3g} fps, {tracks}"
