"""Sounds and videos by their headers: how long, of what rate or size. soundfile and PyAV, where they are installed, read
them in a child process, which a damaged file may crash."""

from __future__ import annotations

import io
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
    if kind == "audio":
        import soundfile

        try:
            info = soundfile.info(io.BytesIO(data))
            channels = "1 channel" if info.channels == 1 else f"{info.channels} channels"
            return info.frames / info.samplerate, f"{info.samplerate:,} Hz, {channels}"
        except (soundfile.LibsndfileError, RuntimeError, ZeroDivisionError):
            pass  # AAC and others, which PyAV may know
    return _by_av(data, kind)


def _by_av(data: bytes, kind: str) -> tuple[float, str]:
    import av

    try:
        with av.open(io.BytesIO(data), "r") as container:
            seconds = (container.duration or 0) / av.time_base
            if kind == "audio":
                if not container.streams.audio:
                    raise BrokenMedia("no sound in it")
                sound = container.streams.audio[0]
                channels = "1 channel" if sound.channels == 1 else f"{sound.channels} channels"
                return (seconds, f"{sound.rate:,} Hz, {channels}")
            if not container.streams.video:
                raise BrokenMedia("no video in it")
            video = container.streams.video[0]
            rate = float(video.average_rate or Fraction(0))
            tracks = "with sound" if container.streams.audio else "silent"
            return (seconds, f"{video.width}x{video.height}, {rate:.3g} fps, {tracks}")
    except BrokenMedia:
        raise
    except (av.FFmpegError, ValueError, TypeError) as error:
        raise BrokenMedia(f"{type(error).__name__}: {error}") from error
