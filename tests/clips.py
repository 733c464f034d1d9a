"""Small pictures, sounds and videos whose content says which sample they are, and tars of them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def png(number: int, size: int = 32) -> bytes:
    """A picture whose red is its number; green rises to the right, so that a flip shows."""
    pixels = np.zeros((size, size, 3), dtype=np.uint8)
    pixels[..., 0] = number
    pixels[..., 1] = np.linspace(0, 255, size).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def tone(hertz: float, seconds: float, rate: int) -> np.ndarray:
    """float32 [seconds * rate], amplitude 0.5"""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def wav(hertz: float, seconds: float = 0.5, rate: int = 22_050, channels: int = 1) -> bytes:
    """A tone as a 16-bit WAV."""
    import soundfile

    data = io.BytesIO()
    samples = np.repeat(tone(hertz, seconds, rate)[:, None], channels, axis=1)
    soundfile.write(data, samples, rate, format="WAV", subtype="PCM_16")
    return data.getvalue()


def mp4(number: int, frames: int = 12, size: int = 64, hertz: float | None = 440.0) -> bytes:
    """A clip of 12 frames a second; red is `number`, blue rises by 20 with each frame; with a tone, or (None) silent."""
    import av

    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        picture = container.add_stream("libx264", rate=12, options={"crf": "12", "threads": "1"})
        picture.width = picture.height = size
        picture.pix_fmt = "yuv420p"
        sound = container.add_stream("aac", rate=16_000, layout="mono") if hertz is not None else None
        for i in range(frames):
            pixels = np.zeros((size, size, 3), dtype=np.uint8)
            pixels[..., 0], pixels[..., 2] = number, 20 * i
            for packet in picture.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in picture.encode():
            container.mux(packet)
        if sound is not None:
            wave = tone(hertz or 0.0, frames / 12, 16_000)
            frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
            frame.sample_rate = 16_000
            for packet in [*sound.encode(frame), *sound.encode()]:
                container.mux(packet)
    return data.getvalue()


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    """One tar; `samples` are key -> extension -> content."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for extension, data in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def captions(*texts: str) -> bytes:
    """The JSON file of some captions."""
    return json.dumps({"captions": list(texts)}).encode()
