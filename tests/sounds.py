"""A chirp that is known at every time, in files of many kinds."""

from __future__ import annotations

import functools
import io
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

SECONDS = 2.0


def chirp(rate: int, seconds: float = SECONDS, loud: float = 0.5, late: float = 0.0) -> np.ndarray:
    """float64 [S]: 200 Hz to 3 kHz, known at every time; `late` by so many seconds."""
    t = np.arange(int(rate * seconds)) / rate - late
    return loud * np.sin(2 * np.pi * (200 * t + (2800 / seconds) * t**2 / 2))


def encoded(samples: np.ndarray, rate: int, kind: str = "WAV", subtype: str | None = None) -> bytes:
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind, subtype=subtype)
    return out.getvalue()


@functools.cache
def by_ffmpeg(name: str, *options: str, rate: int = 44100, seconds: float = SECONDS) -> bytes:
    """The chirp in both channels, encoded by the ffmpeg command in a file called `name`."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs the ffmpeg command to make the file")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        stereo = np.stack([chirp(rate, seconds)] * 2, axis=1)
        command = ["ffmpeg", "-v", "error", "-i", "-", *options, str(path)]
        subprocess.run(command, input=encoded(stereo, rate, subtype="FLOAT"), check=True, timeout=60)
        return path.read_bytes()
