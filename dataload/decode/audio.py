"""The part of audio.py that touches bytes from outside: it runs in a sandbox's child, or here for trusted files.

A reader (of libsndfile or of PyAV) gives mono blocks at the file's rate from a frame on; a resampler takes them to 16 kHz.
"""

from __future__ import annotations

import functools
import io
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import numpy as np

from dataload.broken import BrokenAudio, CannotSeek
from dataload.decode import RATE
from dataload.decode.audio_av import AvReader, container_of
from dataload.decode.mp3 import counted

T = TypeVar("T")

MAX_CHANNELS = 64
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000
MARGIN = 0.1
"""seconds decoded before and after a segment: the resampler's filter, and what codecs need before they are exact"""
BLOCK = 1 << 16
"""frames per block"""
_MISSING = 0.1  # seconds by which headers of whole files are wrong: MP3s declare a frame or two too many
_NATIVE = (b"RIFF", b"RIFX", b"RF64", b"FORM", b".snd", b"caff")
"""how files begin for which libsndfile is the faster one, as it is for MP3"""


class Reader(AbstractContextManager["Reader"], Protocol):
    """An open sound. `frames` is what the header declares, 0 for unknown; `exact` is False where that was reckoned from the bit
    rate; `problem` is set while reading."""

    rate: int
    channels: int
    frames: int
    exact: bool
    problem: str

    def blocks(self, first: int, count: int | None) -> Iterator[np.ndarray]:
        """float32 [n] blocks, mono, from frame `first` on; `count` frames are wanted (None: all), and not many more are
        decoded. Raises CannotSeek where `first` cannot be reached directly."""
        ...


def decode_here(
    data: bytes, start: float | None, seconds: float | None, place: float, max_seconds: float
) -> tuple[np.ndarray, float, str]:
    """(samples, start, problem); see audio.decode."""
    return _by_either(data, lambda reader: _decode(reader, start, seconds, place, max_seconds))


def header_here(data: bytes) -> tuple[float, int, int]:
    """(seconds, rate, channels), by the header alone; 0 seconds where it does not say. Raises BrokenAudio."""
    return _by_either(data, lambda reader: (reader.frames / reader.rate, reader.rate, reader.channels))


def _by_either(data: bytes, use: Callable[[Reader], T]) -> T:
    """What `use` makes of a reader: of the next one where it, or opening the one before, raises BrokenAudio."""
    if not data:
        raise BrokenAudio("no bytes")
    reasons = []
    for opener in _openers(data):
        try:
            with opener(data) as reader:
                check(reader)
                return use(reader)
        except OverLimit:
            raise
        except BrokenAudio as error:
            if opener is not _trusting_reader:  # of which the careful one, which comes next, says what it is
                reasons.append(str(error))
    raise BrokenAudio("; ".join(dict.fromkeys(reasons)))


class OverLimit(BrokenAudio):
    """A limit was exceeded: another library would not change that."""


def _openers(data: bytes) -> tuple[Callable[[bytes], Reader], ...]:
    """The two libraries, the one that is better for these bytes first."""
    if data.startswith(_NATIVE) or _mpeg(data):
        return SndfileReader, AvReader
    if container_of(data):  # to trust the headers saves half a millisecond of ten
        return _trusting_reader, AvReader, SndfileReader
    return AvReader, SndfileReader


def _trusting_reader(data: bytes) -> Reader:
    """Raises BrokenAudio for limits that its headers exceed, too: they may be wrong."""
    reader = AvReader(data, trusting=True)
    try:
        check(reader)
    except OverLimit as error:
        reader.close()
        raise BrokenAudio(str(error)) from None
    return reader


def _mpeg(data: bytes) -> bool:
    """Whether MPEG audio begins here, or what looks like it. (Tags before anything else are rare; libsndfile skips those.)"""
    return data.startswith(b"ID3") or (len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0)


def check(reader: Reader) -> None:
    """Raises OverLimit for a rate or a number of channels beyond the limits."""
    if not 1 <= reader.channels <= MAX_CHANNELS:
        raise OverLimit(f"{reader.channels} channels; 1 to {MAX_CHANNELS} are read")
    if not LOWEST_RATE <= reader.rate <= HIGHEST_RATE:
        raise OverLimit(f"{reader.rate} samples per second; {LOWEST_RATE} to {HIGHEST_RATE} are read")


def _decode(
    reader: Reader, start: float | None, seconds: float | None, place: float, max_seconds: float
) -> tuple[np.ndarray, float, str]:
    declared = reader.frames / reader.rate
    if seconds is None and declared - (start or 0) > max_seconds:
        raise OverLimit(f"{declared:.0f} seconds declared, over the limit of {max_seconds:g}")
    if start is None and seconds is not None and place > 0:
        if reader.frames:
            drawn = place * max(0.0, declared - seconds)
            samples = stretch(reader, drawn, seconds, max_seconds)
            if len(samples) >= min(seconds, declared) * RATE - 1:
                return samples, drawn, reader.problem
        # The length is not declared, or not true: the place is one of what there is.
        samples = stretch(reader, 0.0, None, max_seconds)
        first = round(place * max(0, len(samples) - round(seconds * RATE)))
        return _some(samples[first : first + round(seconds * RATE)], reader), first / RATE, reader.problem
    samples = stretch(reader, start or 0.0, seconds, max_seconds)
    return _some(samples, reader), start or 0.0, reader.problem


def _some(samples: np.ndarray, reader: Reader) -> np.ndarray:
    if len(samples) == 0:
        raise BrokenAudio(reader.problem or "no samples")
    return samples


def stretch(reader: Reader, start: float, seconds: float | None, max_seconds: float) -> np.ndarray:
    """16 kHz samples [start, start + seconds) of the file, whose first sample is at time 0; fewer where it ends."""
    first = round(start * RATE)
    count = None if seconds is None else round(seconds * RATE)
    # Where both rates have a sample at the same time, so that a segment's samples are those of the whole file.
    grid = reader.rate // math.gcd(reader.rate, RATE)
    source = max(0, int((start - MARGIN) * reader.rate)) // grid * grid
    skipped = first - source // grid * (RATE * grid // reader.rate)
    wanted = (
        None if count is None else math.ceil((skipped + count) * reader.rate / RATE + MARGIN * reader.rate)
    )
    try:
        samples = _resampled(reader, source, wanted, max_seconds)
    except CannotSeek:  # then everything before is decoded too
        skipped, wanted = first, None if wanted is None else source + wanted
        samples = _resampled(reader, 0, wanted, max_seconds)
    return samples[skipped : None if count is None else skipped + count]


def _resampled(reader: Reader, first: int, wanted: int | None, max_seconds: float) -> np.ndarray:
    """16 kHz samples of `wanted` frames (None: all) from frame `first` on."""
    resampler, parts, taken = Resampler(reader.rate), [], 0
    limit = max_seconds * reader.rate + 2 * MARGIN * reader.rate + reader.rate
    for block in reader.blocks(first, wanted):
        if wanted is not None and taken + len(block) >= wanted:
            parts.append(resampler(block[: wanted - taken]))
            break
        taken += len(block)
        if taken > limit:
            raise OverLimit(f"more than {max_seconds:g} seconds, the limit")
        parts.append(resampler(block))
    else:
        if reader.exact and not reader.problem and first + taken + _MISSING * reader.rate < reader.frames:
            reader.problem = f"cut short: {first + taken} of {reader.frames} samples"
    parts.append(resampler.end())
    return np.concatenate(parts)


class Resampler:
    """Blocks at any rate to float32 blocks at 16 kHz, -1..1."""

    def __init__(self, rate: int) -> None:
        self._stream = None
        if rate != RATE:
            try:
                import soxr
            except ImportError as error:
                raise missing(error) from error
            self._stream = soxr.ResampleStream(rate, RATE, 1, dtype="float32", quality="HQ")

    def __call__(self, block: np.ndarray) -> np.ndarray:
        """float32 [n] to float32 [m]."""
        with np.errstate(over="ignore", invalid="ignore"):
            calm = np.dot(block, block) <= _LOUDEST**2  # one pass; more, or not a number: look at each
        if not calm:
            block = np.clip(np.nan_to_num(block, nan=0.0, posinf=0.0, neginf=0.0), -_LOUDEST, _LOUDEST)
        return _within(block if self._stream is None else self._stream.resample_chunk(block))

    def end(self) -> np.ndarray:
        """What is left."""
        empty = np.zeros(0, np.float32)
        return empty if self._stream is None else _within(self._stream.resample_chunk(empty, last=True))


def _within(block: np.ndarray) -> np.ndarray:
    loud = block.max(initial=1) > 1 or block.min(initial=-1) < -1
    return np.clip(block, -1, 1) if loud else block


_LOUDEST = 1e6  # beyond, float32 sums in a resampler overflow


@functools.cache
def _steady() -> type[Any]:
    """soundfile.SoundFile without its seek, after each read, to where that ended: in some MP3s it lands somewhere else."""
    import soundfile

    class Steady(soundfile.SoundFile):
        def seekable(self) -> bool:
            return False

    return Steady


class SndfileReader:
    """Through libsndfile. Raises BrokenAudio for what it does not open."""

    def __init__(self, data: bytes) -> None:
        try:
            import soundfile
        except (ImportError, OSError) as error:  # OSError: without libsndfile
            raise missing(error) from error
        self._error = soundfile.SoundFileError
        data, self._lost = counted(data) if _mpeg(data) else (data, 0)
        try:
            self._file = _steady()(io.BytesIO(data))
        except (self._error, ValueError, TypeError, OverflowError) as error:
            raise BrokenAudio(f"libsndfile: {_plain(error)}") from None
        self.rate, self.channels = self._file.samplerate, self._file.channels
        self.frames = self._file.frames + self._lost
        self.problem, self.exact = "", True
        if found := _SHORT.search(self._file.extra_info):
            declared, there = int(found[1]), int(found[2])
            if (
                declared < 0xFFFF_FF00 and declared != 0x7FFF_FFFF
            ):  # what a recorder writes that cannot go back
                self.problem = f"cut short: {there} of {declared} bytes of samples"

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __enter__(self) -> SndfileReader:
        return self

    def blocks(self, first: int, count: int | None) -> Iterator[np.ndarray]:
        """See Reader."""
        weights = np.full(self.channels, 1 / self.channels, np.float32)
        size = max(1, min(BLOCK, (1 << 22) // self.channels))
        left = sys.maxsize if count is None else count
        if first < self._lost:
            yield np.zeros(min(self._lost - first, left), np.float32)
            left -= min(self._lost - first, left)
        try:
            self._file.seek(min(max(0, first - self._lost), self._file.frames))
        except (self._error, ValueError, OverflowError) as error:
            raise CannotSeek(f"libsndfile: {_plain(error)}") from None
        while left > 0:
            try:
                block = self._file.read(min(size, left), dtype="float32", always_2d=True)
            except (self._error, ValueError, OverflowError) as error:
                self.problem = f"libsndfile: {_plain(error)}"
                return
            if len(block) == 0:
                return
            left -= len(block)
            yield block[:, 0] if self.channels == 1 else block @ weights


_SHORT = re.compile(r"^\s*(?:data|SSND)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)


def _plain(error: Exception) -> str:
    """libsndfile's words without the address of our buffer, which differs each time."""
    return re.sub(r"Error opening <.*?>: ", "", str(error))


def missing(error: Exception) -> ImportError:
    """What to say when a library is not there."""
    return ImportError(f"sound needs soundfile, soxr and PyAV ({error}): pip install 'auroraio[data]'")
