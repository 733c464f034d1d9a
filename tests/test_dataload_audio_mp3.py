"""MP3s whose headers do not say all, and streams without a container; what is expected is what the ffmpeg command decodes."""

from __future__ import annotations

import functools
import io
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from dataload import audio
from dataload.stats import media

SWEEP = "0.3*sin(2*PI*(200+9*t)*t)+0.2*sin(2*PI*3000*t)*sin(7*t)+0.05*(random(0)-0.5)"
BARE = ("-q:a", "5", "-write_xing", "0", "-id3v2_version", "0")
"""varying bit rate, and not a word on the length"""


@functools.cache
def made(expression: str, seconds: int, *options: str, name: str = "a.mp3") -> bytes:
    """A sound at 44.1 kHz, encoded by the ffmpeg command."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs the ffmpeg command to make the file")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        source = f"aevalsrc='{expression}':s=44100:d={seconds}"
        command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, *options, str(path)]
        subprocess.run(command, check=True, timeout=60)
        return path.read_bytes()


def decoded(data: bytes) -> np.ndarray:
    """float32 [S] at 16 kHz, by the ffmpeg command and soxr."""
    done = subprocess.run(
        ["ffmpeg", "-v", "error", "-i", "-", "-f", "wav", "-c:a", "pcm_f32le", "-"],
        input=data, capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    samples, rate = soundfile.read(io.BytesIO(done.stdout), dtype="float32")
    return soxr.resample(samples, rate, audio.RATE)


@pytest.mark.parametrize(
    ("expression", "options"),
    [
        ("0.1*sin(2*PI*440*t)", ("-q:a", "5")),  # a few bits per frame, which borrow from the frames before
        (SWEEP, ("-q:a", "5")),
        (SWEEP, ("-b:a", "64k")),
        (SWEEP, ("-b:a", "64k", "-write_xing", "0")),
    ],
)
def test_blocks_are_seamless(expression: str, options: tuple[str, ...]) -> None:
    data = made(expression, 7, *options)
    sound, expected = audio.decode(data), decoded(data)
    assert sound.problem == ""
    assert abs(len(sound.samples) - len(expected)) < 50  # versions of FFmpeg cut the encoder's padding or not
    n = min(len(sound.samples), len(expected)) - 100
    assert np.abs(sound.samples[:n] - expected[:n]).max() < 1e-4


def test_a_varying_bit_rate_without_a_header_is_read_to_its_end() -> None:
    data = made(SWEEP, 30, *BARE)
    assert soundfile.info(io.BytesIO(data)).duration < 15, "libsndfile takes all frames to be like the first"
    sound, expected = audio.decode(data), decoded(data)
    assert sound.problem == ""
    assert abs(len(sound.samples) - len(expected)) < 50 and len(expected) > 29.9 * audio.RATE
    assert 25 < media.read(data, "audio")[0] < 31
    last = audio.decode(data, seconds=2.0, place=1.0)
    first = round(last.start * audio.RATE)
    assert 25 < last.start <= 28.1 and last.problem == ""
    assert np.abs(last.samples - sound.samples[first : first + len(last.samples)]).max() < 1e-4


def test_what_stands_behind_the_length_of_the_first_header_is_read_or_named() -> None:
    one, bare, tagged = made(SWEEP, 3), made(SWEEP, 3, *BARE), made(SWEEP, 3, "-id3v2_version", "3")
    assert audio.decode(one + b"TAG".ljust(128, b"\0")).problem == ""
    both = audio.decode(one + bare)
    assert len(both.samples) > 5.9 * audio.RATE
    with_tags = audio.decode(one + tagged)  # FFmpeg stops at the tags in the middle
    assert len(with_tags.samples) > 2.9 * audio.RATE and with_tags.problem


@pytest.mark.parametrize("name", ["a.aac", "a.ac3", "a.mp3"])
def test_a_length_that_was_reckoned_from_the_bit_rate_accuses_nobody(name: str) -> None:
    options = BARE if name == "a.mp3" else ()
    sound = audio.decode(made("0", 3, *options, name=name) + made(SWEEP, 3, *options, name=name))
    assert len(sound.samples) > 5.9 * audio.RATE and sound.problem == ""
