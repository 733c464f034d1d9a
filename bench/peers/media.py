"""Sound to 16 kHz mono and clips of videos: ours, in a sandbox as a loader uses it and without one, beside what people take.

The files are made by the ffmpeg command in a temporary folder. The clock counts CPU seconds, of the sandbox's child too.
"""

from __future__ import annotations

import functools
import io
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import measure
from bench.record import Accuracy, Row
from bench.subject import Absent, pair_rows, worst

AUDIO, VIDEO = "audio", "video"
OURS = ("auroraio", "auroraio, no sandbox")
CLEAN = "torchaudio, -90 dB"
"""torchaudio with a filter that lets through as little as ours has to; as it is by default, tones just beyond 8 kHz come
back hardly weaker"""
CLOCK = "cpu, sandbox too"
SECONDS = 10
FRAMES, SIDE = 8, 224
CODECS = {
    "wav": (), "flac": (), "mp3": ("-c:a", "libmp3lame", "-b:a", "192k"), "ogg": ("-c:a", "libvorbis", "-q:a", "5"),
    "opus": ("-c:a", "libopus", "-b:a", "128k"), "m4a": ("-c:a", "aac", "-b:a", "160k"),
}  # fmt: skip
ALIAS = 10 ** (-90 / 20)
"""largest amplitude, over a tone's, at which a tone beyond 8 kHz may come back: -90 dB"""
TONES = (8_050, 9_000, 12_000, 15_900, 21_000)
"""Hz, of the tones that are looked for afterwards"""
_FILTER = {
    "lowpass_filter_width": 32, "rolloff": 0.92, "resampling_method": "sinc_interp_kaiser", "beta": 9.0
}  # fmt: skip
"""of CLEAN: the narrower ones that hold -90 dB lose 3 dB and more at 7 kHz, this one half a dB, ours nothing"""

Call = Callable[[], object]


@dataclass(frozen=True)
class SoundCase:
    """10 seconds of 44.1 kHz stereo in a format."""

    kind: str

    @property
    def name(self) -> str:
        """ "mp3-44100-stereo"."""
        return f"{self.kind}-44100-stereo"

    @property
    def shape(self) -> str:
        """For readers."""
        return f"{SECONDS} s of 44.1 kHz stereo, {self.kind}, to 16 kHz mono"


@dataclass(frozen=True)
class ClipCase:
    """10 seconds of 640x360 H.264 at 30 frames per second with a keyframe at least every `keyframes` frames."""

    keyframes: int

    @property
    def name(self) -> str:
        """ "h264-640x360-gop250"."""
        return f"h264-640x360-gop{self.keyframes}"

    @property
    def shape(self) -> str:
        """For readers."""
        return f"{FRAMES} of the frames of {SECONDS} s of 640x360 H.264, a keyframe every {self.keyframes}, to {SIDE}x{SIDE}"


@functools.cache
def encoded(case: SoundCase | ClipCase) -> bytes:
    """The case's file. Raises Absent without the ffmpeg command or its encoder."""
    if shutil.which("ffmpeg") is None:
        raise Absent("the ffmpeg command makes the files; it is not here")
    with tempfile.TemporaryDirectory(prefix="auroraio-bench-") as folder:
        if isinstance(case, SoundCase):
            path = Path(folder) / f"a.{case.kind}"
            # Noise in which tones rise and fall: neither silence nor as hard as white noise.
            left = "0.3*sin(2*PI*(200+90*t)*t)+0.2*sin(2*PI*3000*t)*sin(7*t)+0.05*(random(0)-0.5)"
            source = f"aevalsrc='{left}|0.8*({left})':s=44100:d={SECONDS}"
            options = ["-i", source, *CODECS[case.kind]]
        else:
            path = Path(folder) / "v.mp4"
            source = f"testsrc2=size=640x360:rate=30:duration={SECONDS},noise=alls=8:allf=t"
            options = ["-i", source, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", str(case.keyframes)]
        done = subprocess.run(
            ["ffmpeg", "-v", "error", "-f", "lavfi", *options, str(path)], capture_output=True
        )
        if done.returncode:
            raise Absent(f"ffmpeg cannot make it: {done.stderr.decode(errors='replace')[-200:]}")
        return path.read_bytes()


@functools.cache
def _sandbox() -> Any:
    from dataload.sandbox import Sandbox

    return Sandbox()


def _seconds() -> float:
    """CPU seconds of this process and of the sandbox's child."""
    return time.process_time() + float(_sandbox().call("time:process_time", timeout=60.0))


def _ours_audio(data: bytes, sandboxed: bool) -> Call:
    from dataload import audio

    return lambda: audio.decode(data, sandbox=_sandbox() if sandboxed else None).samples


def _torchaudio(data: bytes, **options: Any) -> Call:
    """torchaudio as people use it: load, mean of the channels, resample."""
    try:
        import torchaudio
        import torchaudio.functional as functional
    except (ImportError, OSError) as error:
        raise Absent(f"torchaudio cannot be imported ({str(error)[:120]})") from None

    def run() -> torch.Tensor:
        waveform, rate = torchaudio.load(io.BytesIO(data))
        return functional.resample(waveform.mean(dim=0), rate, 16000, **options)

    return run


def _torchcodec_audio(data: bytes) -> Call:
    """Its decoder with FFmpeg's resampler."""
    decoders = _torchcodec()
    return lambda: decoders.AudioDecoder(data, sample_rate=16000, num_channels=1).get_all_samples().data


def _torchcodec() -> Any:
    try:
        from torchcodec import decoders
    except (ImportError, OSError, RuntimeError) as error:
        raise Absent(f"torchcodec cannot be imported ({str(error)[:120]})") from None
    return decoders


def _ours_video(data: bytes, sandboxed: bool) -> Call:
    from dataload import video

    def run() -> np.ndarray:
        box = _sandbox() if sandboxed else None
        return video.decode(
            data, frames=FRAMES, size=SIDE, box=(0, 0, 640, 360), sound=False, sandbox=box
        ).frames

    return run


def _wanted(count: int) -> list[int]:
    return [int((k + 0.5) * count / FRAMES) for k in range(FRAMES)]


def _torchcodec_video(data: bytes) -> Call:
    decoders = _torchcodec()

    def run() -> torch.Tensor:
        decoder = decoders.VideoDecoder(data, seek_mode="approximate", num_ffmpeg_threads=1)
        frames = decoder.get_frames_at(_wanted(decoder.metadata.num_frames)).data
        return torch.nn.functional.interpolate(frames, (SIDE, SIDE), mode="bilinear", antialias=True)

    return run


def _decord(data: bytes) -> Call:
    try:
        import decord
    except (ImportError, OSError) as error:
        raise Absent(f"decord cannot be imported ({str(error)[:120]})") from None

    def run() -> np.ndarray:
        reader = decord.VideoReader(
            io.BytesIO(data), ctx=decord.cpu(0), width=SIDE, height=SIDE, num_threads=1
        )
        return reader.get_batch(_wanted(len(reader))).asnumpy()

    return run


def _pyav(data: bytes) -> Call:
    """PyAV as its examples use it: decode in order, convert what is wanted."""
    try:
        import av
    except ImportError as error:
        raise Absent(f"PyAV cannot be imported ({str(error)[:120]})") from None

    def run() -> np.ndarray:
        with av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            wanted, out = set(_wanted(stream.frames)), []
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    out.append(frame.to_ndarray(format="rgb24", width=SIDE, height=SIDE))
                    if len(out) == FRAMES:
                        break
            return np.stack(out)

    return run


PEERS: dict[str, dict[str, Callable[[bytes], Call]]] = {
    AUDIO: {
        OURS[0]: lambda data: _ours_audio(data, True),
        OURS[1]: lambda data: _ours_audio(data, False),
        "torchaudio": _torchaudio,
        CLEAN: lambda data: _torchaudio(data, **_FILTER),
        "torchcodec": _torchcodec_audio,
    },
    VIDEO: {
        OURS[0]: lambda data: _ours_video(data, True),
        OURS[1]: lambda data: _ours_video(data, False),
        "torchcodec": _torchcodec_video,
        "decord": _decord,
        "pyav": _pyav,
    },
}


@functools.cache
def leak(name: str) -> float:
    """The amplitude, over the tone's, of what comes back of tones beyond 8 kHz through a peer of AUDIO; the worst of TONES.
    Raises Absent."""
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise Absent(f"soundfile cannot be imported ({error})") from None
    found = []
    for hertz in TONES:
        tone, out = 0.5 * np.sin(2 * np.pi * hertz * np.arange(44100) / 44100), io.BytesIO()
        soundfile.write(out, np.stack([tone, tone], axis=1), 44100, format="WAV", subtype="PCM_24")
        samples = np.asarray(PEERS[AUDIO][name](out.getvalue())()).ravel()[2000:-2000]
        window = np.hanning(len(samples))
        found.append(float(np.abs(np.fft.rfft(samples * window)).max() / (0.25 * window.sum())))
    return max(found)


def check_video(case: ClipCase) -> Accuracy:
    """Our frames against those of PyAV's plain decoding, uncropped, in levels of 255."""
    import av

    from dataload import video

    clip = video.decode(encoded(case), frames=FRAMES, sound=False)
    with av.open(io.BytesIO(encoded(case)), "r") as container:
        every = list(container.decode(video=0))
    theirs = np.stack([every[round(t * 30)].to_ndarray(format="rgb24") for t in clip.times])
    error = float(np.abs(clip.frames.astype(np.int16) - theirs).max())
    return Accuracy("frames", error, 0.0, error / 255, 0.0)


def _checked(row: Row, case: SoundCase | ClipCase) -> Row:
    """The row with what was found out about its results. What ours and CLEAN promise they have to hold."""
    if isinstance(case, ClipCase):
        verdict = check_video(case) if row.ours else None
    else:
        found = leak(row.peer)
        verdict = Accuracy("alias", found, ALIAS, found, ALIAS)
        if not (row.ours or row.peer == CLEAN):
            loudest = 20 * np.log10(max(found, 1e-12))
            return replace(row, note=f"tones of 8 to 21 kHz come back at up to {loudest:.0f} dB")
    if verdict is None:
        return row
    if not verdict.good:
        return replace(row, accuracy=(verdict,), status="wrong", note=worst([verdict]))
    return replace(row, accuracy=(verdict,))


def solve(case: SoundCase | ClipCase, *, budget: float, peers: Collection[str] | None = None) -> list[Row]:
    """Rows of all; see bench.subject.solve. The clock is CPU seconds, whatever was asked for."""
    subject = AUDIO if isinstance(case, SoundCase) else VIDEO
    kind, items, unit = (
        ("float32", float(SECONDS), "seconds") if subject == AUDIO else ("uint8", 1.0, "clips")
    )
    measure.HOST_CLOCKS[CLOCK] = _seconds
    rows, calls = [], {}
    for name, build in PEERS[subject].items():
        if peers is not None and name not in peers:
            continue
        row = Row(
            subject, case.name, "decode", name, kind, case.shape, name in OURS, "ok", items=items, unit=unit
        )
        try:
            call = build(encoded(case))
            call()
            row = _checked(row, case)
            if row.status == "ok":
                calls[name] = [call]
        except (Absent, ImportError) as why:
            row = replace(row, status="absent", note=str(why))
        except Exception as error:  # a peer that breaks is a result too
            row = replace(row, status="failed", note=f"{type(error).__name__}: {error}"[:400])
        rows.append(row)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timed = measure.interleave(calls, device="cpu", budget=budget, clock=CLOCK) if calls else {}
    finally:
        torch.set_num_threads(threads)
    return pair_rows([
        replace(row, clock=timed[row.peer][0], seconds=timed[row.peer][1]) if row.peer in timed else row for row in rows
    ])  # fmt: skip
