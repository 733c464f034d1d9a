"""Sound: bytes to a float32 waveform, mono at 16 kHz; segments of it; log-mel spectrograms. Letters: B batch, S samples.

Policies, in one place:
- Channels are averaged, whatever they are. Rates of 1 to 768 kHz are resampled by soxr HQ, which lets nothing through
  that would be heard at another pitch (aliases under -90 dB; DALI's and FFmpeg's resamplers do not hold that).
- Values are -1..1: what floats in a file have beyond is clipped, and what is not finite becomes 0.
- Tags, pictures and other chunks are passed over. Of several sound tracks the first counts.
- What is cut short or damaged in the middle is used as far as it is whole, and `Sound.problem` says so. Nothing whole at
  all, and no samples, is a BrokenAudio.
- Limits are on what a header declares and on what then really comes: channels, rate, seconds that are decoded.
- WAV, AIFF, AU, MP3 and other formats of libsndfile are read by it; FLAC, Ogg (Vorbis, Opus, Speex), MP4/M4A (AAC, ALAC),
  WMA, WavPack and the rest by FFmpeg's libraries in PyAV, which is faster for those; either tries what the other refuses.
- The frames of an MP3 are counted where its first one declares too few, or none and they differ in size: libsndfile would
  stop too early.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dataload.broken import BrokenAudio
from dataload.decode import RATE

if TYPE_CHECKING:
    import torch

    from dataload.sandbox import Sandbox

MAX_SECONDS = 3600.0
"""default limit on what one call decodes"""
TIMEOUT = 60.0
"""seconds that a sandbox gets for a file; an hour of Opus takes 20"""
FFT, WINDOW, HOP, MELS = 1024, 400, 160, 128
"""Of log_mel: samples (64, 25 and 10 ms) and filters. With a shorter FFT the lowest filters lie between its bins."""
FLOOR = 1e-10
"""least power that log_mel tells from silence"""
_NEEDS = ("soundfile", "soxr", "av")


@dataclass(frozen=True)
class Sound:
    """What was decoded."""

    samples: np.ndarray
    """float32 [S], -1..1, at 16 kHz"""
    start: float
    """seconds in the file at which it starts"""
    problem: str
    """what is missing of it, in words; empty: nothing"""


def decode(
    data: bytes,
    *,
    start: float | None = None,
    seconds: float | None = None,
    place: float = 0.0,
    max_seconds: float = MAX_SECONDS,
    sandbox: Sandbox | None = None,
    timeout: float = TIMEOUT,
) -> Sound:
    """Decodes an encoded sound, or `seconds` of it, with the policies at the top of this file.

    `start` is in seconds from the beginning. Where it is None, `place` (0..1) says which of all possible places the
    segment is taken from: 0 the first, 0.5 the middle, rng.random() any. A segment is sought in the file: the rest is not
    decoded. A file that is shorter than `seconds` gives all it has.

    With a `sandbox` the libraries run in a child process, so that no file can take this process down: for files from
    anywhere. Without one they run here: for files that you trust.

    Raises BrokenAudio, and nothing else, for bytes that are no sound, that have none at `start`, or that exceed a limit;
    ImportError for a missing library.
    """
    if not 0 <= place <= 1 or (start is not None and start < 0):
        raise ValueError(f"start={start}, place={place}: at least 0, and a place at most 1")
    if seconds is not None and not 0 < seconds <= max_seconds:
        raise ValueError(f"seconds={seconds}: more than 0, and at most max_seconds={max_seconds:g}")
    arguments = (bytes(data), start, seconds, float(place), float(max_seconds))
    if sandbox is None:
        from dataload.decode.audio import decode_here

        return Sound(*decode_here(*arguments))
    return Sound(*_checked(sandbox.call(
        "dataload.decode.audio:decode_here", *arguments, timeout=timeout, needs=_NEEDS, broken=BrokenAudio
    )))  # fmt: skip


def _checked(answer: object) -> tuple[np.ndarray, float, str]:
    """What a child answered, if it has the right types: a child that went over to its file may answer anything."""
    match answer:
        case (np.ndarray() as samples, float(start), str(problem)) if (
            samples.ndim == 1 and samples.dtype == np.float32 and len(samples)
        ):
            return samples, start, problem
    raise BrokenAudio("the decoder answered with something else than a sound")


def segment(
    waveform: np.ndarray, length: int, rng: np.random.Generator | None = None, where: str = "centre"
) -> tuple[np.ndarray, int]:
    """(float32 [length], true length): `length` samples of a waveform [S].

    From a random place with `rng` (training), else from the "centre" or the "start" (evaluation). What is shorter is
    padded with zeros behind; the true length says where they begin.
    """
    if where not in ("centre", "start"):
        raise ValueError(f"where={where!r}: centre or start")
    if length < 1:
        raise ValueError(f"length={length}: at least one sample")
    spare = len(waveform) - length
    if spare <= 0:
        return np.pad(waveform, (0, -spare)).astype(np.float32, copy=False), len(waveform)
    first = int(rng.integers(spare + 1)) if rng is not None else spare // 2 if where == "centre" else 0
    return waveform[first : first + length].astype(np.float32, copy=False), length


def log_mel(waveform: torch.Tensor, mels: int = MELS) -> torch.Tensor:
    """float [B, S] at 16 kHz to float32 [B, mels, S // 160], on the tensor's device: ln(power + 1e-10) in `mels` bands.

    One frame per 10 ms, centred on it (the ends are mirrored), 25 ms of a Hann window, an FFT of 1024 that has no band
    without a bin. Slaney's mel scale with bands of equal area, 0 to 8 kHz, as in librosa and Whisper.

    Raises ValueError for fewer than 513 samples (the mirror needs them) or so many bands that one would be empty.
    """
    import torch

    if waveform.ndim != 2 or waveform.shape[1] <= FFT // 2:
        raise ValueError(
            f"log_mel takes [B, S] with more than {FFT // 2} samples, not {list(waveform.shape)}"
        )
    window = torch.hann_window(WINDOW, device=waveform.device)
    spectrum = torch.stft(
        waveform.float(), FFT, HOP, WINDOW, window, center=True, pad_mode="reflect", return_complex=True
    )
    power = spectrum[..., : waveform.shape[1] // HOP].abs().square()  # the last frame lies beyond the end
    filters = torch.from_numpy(mel_filters(mels)).to(waveform.device)
    with torch.autocast(power.device.type, enabled=False):
        return (filters @ power).add(FLOOR).log()


@functools.cache
def mel_filters(mels: int = MELS, fft: int = FFT) -> np.ndarray:
    """float32 [mels, fft // 2 + 1]: triangles on Slaney's mel scale (linear to 1 kHz, then 27 steps per factor of 6.4),
    each of area 1 (Slaney 1998, Auditory Toolbox). Raises ValueError where one would be empty."""
    bins = np.linspace(0, RATE / 2, fft // 2 + 1)
    edges = _hertz(np.linspace(0, _mel(RATE / 2), mels + 2))
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    empty = int((filters.max(axis=1) == 0).sum())
    if empty:
        raise ValueError(f"{empty} of {mels} mel bands would be empty with an FFT of {fft}: take fewer bands")
    return filters.astype(np.float32)


_LINEAR = 200 / 3  # Hz per mel below 1 kHz
_STEP = math.log(6.4) / 27  # above


def _mel(hertz: float) -> float:
    return hertz / _LINEAR if hertz < 1000 else 15 + math.log(hertz / 1000) / _STEP


def _hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * _LINEAR, 1000 * np.exp((mel - 15) * _STEP))
