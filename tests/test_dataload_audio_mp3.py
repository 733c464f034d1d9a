"""MP3s whose headers do not say all, and streams without a container; what is expected is what FFmpeg decodes."""

from __future__ import annotations

import functools
import io
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr

from dataload import audio
from dataload.decode.mp3 import DELAY, counted
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
    """float32 [S] at 16 kHz, by FFmpeg's decoder and soxr."""
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(audio=0))
    samples = np.concatenate([frame.to_ndarray() for frame in frames], axis=1).mean(axis=0)
    return soxr.resample(samples, frames[0].sample_rate, audio.RATE)


def apart(one: np.ndarray, other: np.ndarray, start: float = 0.0) -> float:
    """The largest difference from `start`, in seconds, to the end of the shorter one, but for the resampler's last samples."""
    stretch = slice(round(start * audio.RATE), min(len(one), len(other)) - 100)
    return float(np.abs(one[stretch] - other[stretch]).max())


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
    assert abs(len(sound.samples) - len(expected)) <= 1
    assert apart(sound.samples, expected) < 1e-5


def test_a_varying_bit_rate_without_a_header_is_read_to_its_end() -> None:
    data = made(SWEEP, 30, *BARE)
    assert soundfile.info(io.BytesIO(data)).duration < 15, "libsndfile takes all frames to be like the first"
    sound, expected = audio.decode(data), decoded(data)
    assert sound.problem == ""
    assert abs(len(sound.samples) - len(expected)) <= 1 and len(expected) > 29.9 * audio.RATE
    late = 1.1 * DELAY / 44_100  # before it mpg123 is warming up, and gives nothing
    assert apart(sound.samples, expected, late) < 1e-4 and apart(sound.samples, expected) < 0.02
    assert media.read(data, "audio")[0] == pytest.approx(30, abs=0.1)
    last = audio.decode(data, seconds=2.0, place=1.0)
    first = round(last.start * audio.RATE)
    assert last.start == pytest.approx(28, abs=0.1) and last.problem == ""
    assert np.abs(last.samples - sound.samples[first : first + len(last.samples)]).max() < 1e-4


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_frames_of_every_kind_are_counted(rate: int, channels: int) -> None:
    data = made(SWEEP, 3, *BARE, "-ar", str(rate), "-ac", str(channels))
    more, lost = counted(data)
    assert more.endswith(data) and len(more) > len(data) and lost
    sound, expected = audio.decode(data), decoded(data)
    assert sound.problem == "" and abs(len(sound.samples) - len(expected)) <= 1
    late = 1.1 * DELAY / rate
    assert apart(sound.samples, expected, late) < 1e-4 and apart(sound.samples, expected) < 0.02


TAG = b"ID3\4\0\0\0\0\1\0" + bytes(128)
BEHIND = (
    b"\n", b"\xff", b"\xff" * 20_000, b"\xff\xfb" * 10_000, b"TAG".ljust(128, b"\0"), TAG, TAG * 3, b"APETAGEX" + bytes(24),
)  # fmt: skip


@pytest.mark.parametrize("bare", [False, True])
def test_what_is_no_frame_behind_the_last_one_changes_nothing(bare: bool) -> None:
    data = made(SWEEP, 3, *(BARE if bare else ()))
    whole = audio.decode(data)
    assert whole.problem == "" and (counted(data)[0] is data) == (not bare)
    for more in BEHIND:
        sound = audio.decode(data + more)
        assert sound.problem == "" and np.array_equal(sound.samples, whole.samples), more[:8]


def test_frames_behind_the_end_of_the_first_header_and_behind_tags_are_read() -> None:
    one, bare, tagged = made(SWEEP, 3), made(SWEEP, 3, *BARE), made(SWEEP, 3, "-id3v2_version", "3")
    for first in (one, bare):
        for more in (one, bare, tagged, TAG + bare):
            sound = audio.decode(first + more)
            assert len(sound.samples) == pytest.approx(6.05 * audio.RATE, rel=0.01) and sound.problem == ""
            assert apart(sound.samples, audio.decode(first).samples[:-1500], 1.1 * DELAY / 44_100) < 1e-4
    # Here libsndfile stops, and the count says so.
    stereo = audio.decode(one + made(SWEEP, 3, *BARE, "-ac", "2"))
    assert len(stereo.samples) < 3.1 * audio.RATE and stereo.problem.startswith("cut short: ")


@pytest.mark.parametrize("lost", [1, 777])
def test_lost_bytes_cost_a_few_frames(lost: int) -> None:
    data = made(SWEEP, 6, *BARE)
    for place in (len(data) // 10, len(data) // 2):
        sound = audio.decode(data[:place] + data[place + lost :])
        assert len(sound.samples) > 5.8 * audio.RATE


NOTHING = (
    b"",
    b"\xff",
    b"\xff\xfb",
    b"ID3",
    TAG,
    b"ID3\4\0\0\x7f\x7f\x7f\x7f",
    TAG * 1000,
    b"\xff\xfb\x90" * 100,
)


@pytest.mark.parametrize("data", NOTHING)
def test_nothing_is_counted_where_nothing_is(data: bytes) -> None:
    assert counted(data) == (data, 0)


@pytest.mark.parametrize("name", ["a.aac", "a.ac3", "a.mp3"])
def test_a_length_that_was_reckoned_from_the_bit_rate_accuses_nobody(name: str) -> None:
    options = BARE if name == "a.mp3" else ()
    sound = audio.decode(made("0", 3, *options, name=name) + made(SWEEP, 3, *options, name=name))
    assert len(sound.samples) > 5.9 * audio.RATE and sound.problem == ""


def test_another_rate_behind_is_named() -> None:
    sound = audio.decode(made(SWEEP, 3) + made(SWEEP, 3, *BARE, "-ar", "22050"))
    assert len(sound.samples) > 2.9 * audio.RATE and sound.problem.startswith("cut short: ")


@pytest.mark.parametrize("options", [("-b:a", "64k", *BARE[2:]), BARE])
def test_a_piece_of_a_stream_begins_without_a_burst(options: tuple[str, ...]) -> None:
    data = made(SWEEP, 6, *options)
    for part in range(1, 9):
        piece = audio.decode(data[len(data) * part // 10 :])
        assert np.abs(piece.samples[:4000]).max() < 0.7


def test_bytes_that_look_like_frames_cost_little() -> None:
    three = (bytes.fromhex("fffb1000") + bytes(100)) * 3  # four in a row are frames
    data = made(SWEEP, 3, *BARE)[:3000] + (three + bytes(300)) * 60_000
    start = time.process_time()
    assert counted(data)[0] is data
    assert time.process_time() - start < 2
