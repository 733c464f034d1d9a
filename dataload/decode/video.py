"""The part of video.py that touches bytes from outside: it runs in a sandbox's child, or here for trusted files."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from PIL import Image

from dataload.broken import BrokenAudio, BrokenVideo
from dataload.decode import RATE
from dataload.decode.crops import crop_box
from dataload.decode.video_packets import Video

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_RETRIES = 8
"""times that a clip is planned anew because something in it is damaged"""
_SHORT = 0.5
"""seconds by which a whole video may be shorter than declared"""
_MAX_BYTES = 1 << 30
"""of a clip's frames"""


def decode_here(data: bytes, plan: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Clip; `plan` is what video.decode makes of its arguments."""
    if not data:
        raise BrokenVideo("no bytes")
    video = Video(data, plan["max_pixels"])
    try:
        start = _read(video, plan)
        for _ in range(_RETRIES):
            end = _end(video, start, plan)
            chosen = _chosen(video, start, end, plan)
            pictures = Pictures(plan)
            for time, frame in video.frames(chosen):
                pictures.add(time, frame)
            if pictures.have(chosen):
                break
        else:
            raise BrokenVideo(video.problem or "its frames cannot be decoded")
        problem = video.problem or _cut_short(data, video, start, plan)
        sound, said = _sound(data, video.origin + start, end - start) if plan["sound"] else (None, "")
        return {
            "frames": pictures.stacked(chosen),
            "times": np.array([video.seconds(time) for time in chosen], np.float64),
            "start": start,
            "seconds": end - start,
            "distinct": len(set(chosen)),
            "sound": sound,
            "problem": "; ".join(filter(None, (problem, said))),
        }
    finally:
        video.close()


def _read(video: Video, plan: dict[str, Any]) -> float:
    """Reads the packets of the clip, and returns where it starts, in seconds."""
    seconds, limit = plan["seconds"], plan["max_seconds"]
    start = plan["start"]
    if seconds is None:
        start = start or 0.0
        if video.duration - start > limit:
            raise BrokenVideo(f"{video.duration:.0f} seconds declared, over the limit of {limit:g}")
        video.read(start, start + limit + 1)
        if video.times and video.end() - start > limit + 0.5:
            raise BrokenVideo(f"more than {limit:g} seconds, the limit")
        return float(start)
    if start is None and video.duration:
        start = plan["place"] * max(0.0, video.duration - seconds)
        video.read(start, start + seconds)
        if video.times and video.end() >= min(start + seconds, video.duration) - _SHORT:
            return float(start)
        start = None
    if start is not None:
        video.read(start, start + seconds)
        return float(start)
    # The length is not declared, or not true: the place is one of what there is.
    video.read(0.0, None)
    return float(plan["place"] * max(0.0, video.end() - seconds)) if video.times else 0.0


def _end(video: Video, start: float, plan: dict[str, Any]) -> float:
    """Where the clip ends: where it should, or where the whole frames do."""
    if not video.times:
        raise BrokenVideo(video.problem or "no frames")
    end = video.end()
    if start >= end:
        raise BrokenVideo(video.problem or f"no frames at {start:.2f} s: it ends at {end:.2f}")
    return min(end, start + plan["seconds"]) if plan["seconds"] is not None else end


def _chosen(video: Video, start: float, end: float, plan: dict[str, Any]) -> list[int]:
    """The times, in the stream's units, of the frames of the clip."""
    count = plan["frames"]
    within = plan["jitter"] if plan["jitter"] is not None else np.full(count, 0.5)
    return [video.at(start + (end - start) * (k + float(within[k])) / count) for k in range(count)]


class Pictures:
    """Decoded frames as RGB, upright, cropped and resized."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self._found: dict[int, np.ndarray] = {}
        self._box: tuple[float, float, float, float] | None = None  # in shares of the frame

    def add(self, time: int, frame: Any) -> None:
        """Takes a frame of FFmpeg's."""
        plan, size = self._plan, self._plan["size"]
        if frame.width * frame.height > plan["max_pixels"]:
            raise BrokenVideo(f"{frame.width}x{frame.height} pixels, over the limit of {plan['max_pixels']}")
        try:
            # Chroma is repeated, as FFmpeg does for 8 bits whatever is asked for; this way also for 10.
            rgb = frame.to_ndarray(format="rgb24", interpolation="POINT")
        except (ValueError, OSError) as error:
            raise BrokenVideo(f"FFmpeg: no RGB of {frame.format.name} ({error})") from None
        turns = round(frame.rotation / 90) % 4
        if turns:
            rgb = np.ascontiguousarray(np.rot90(rgb, turns))
        height, width = rgb.shape[:2]
        method = _FILTERS[plan["interpolation"]]
        if size is not None:
            if self._box is None:
                self._box = self._draw(width, height)
            left, top, right, bottom = (s * n for s, n in zip(self._box, (width, height) * 2, strict=True))
            if (
                plan["crop"] is not None or plan["box"] is not None
            ):  # cut out: pixels outside do not show at its edge
                rgb = rgb[round(top) : round(bottom), round(left) : round(right)]
                picture = Image.fromarray(rgb).resize((size, size), method)
            else:  # as images.resize_center_crop
                picture = Image.fromarray(rgb).resize((size, size), method, box=(left, top, right, bottom))
            rgb = np.asarray(picture)[:, ::-1] if plan["flip"] else np.asarray(picture)
        elif plan["short_side"] is not None:
            scale = plan["short_side"] / min(width, height)
            shape = max(1, round(width * scale)), max(1, round(height * scale))
            rgb = np.asarray(Image.fromarray(rgb).resize(shape, method))
        if rgb.size * plan["frames"] > _MAX_BYTES:
            raise BrokenVideo(
                f"{plan['frames']} frames of {width}x{height} are more than {_MAX_BYTES >> 20} MiB"
            )
        self._found[time] = rgb

    def _draw(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The crop's left, top, right and bottom as shares of a frame of this size."""
        plan = self._plan
        if plan["box"] is not None:
            left, top, wide, high = plan["box"]
            if left < 0 or top < 0 or wide < 1 or high < 1 or left + wide > width or top + high > height:
                raise BrokenVideo(f"the box {plan['box']} is not within {width}x{height}")
        elif plan["crop"] is not None:
            replay = cast(np.random.Generator, Replay(plan["crop"]))
            left, top, wide, high = crop_box(width, height, replay, plan["scale"], plan["ratio"])
        else:
            wide = high = min(width, height)
            left, top = (width - wide) / 2, (height - high) / 2
        return left / width, top / height, (left + wide) / width, (top + high) / height

    def have(self, times: list[int]) -> bool:
        """Whether all of these frames came."""
        return all(time in self._found for time in times)

    def stacked(self, times: list[int]) -> np.ndarray:
        """uint8 [F, H, W, 3]. Raises BrokenVideo where frames change their size and none was asked for."""
        shapes = {self._found[time].shape for time in times}
        if len(shapes) > 1:
            raise BrokenVideo(f"its frames change their size: {sorted(shape[:2] for shape in shapes)}")
        return np.stack([self._found[time] for time in times])


class Replay:
    """Random numbers that were drawn before, in another process, for a function that takes a generator."""

    def __init__(self, draws: np.ndarray) -> None:
        self._left = iter(draws.tolist())

    def random(self) -> float:
        """The next one, 0..1."""
        return next(self._left)


def _sound(data: bytes, start: float, seconds: float) -> tuple[np.ndarray | None, str]:
    """(16 kHz samples from `start` in the container's time, what is wrong). Silence where the sound begins later."""
    from dataload.decode.audio import check, stretch
    from dataload.decode.audio_av import AvReader

    try:
        with AvReader(data) as reader:
            check(reader)
            late = max(0.0, reader.start - start)
            count = round(seconds * RATE)
            silence = min(count, round(late * RATE))
            if silence == count:
                return np.zeros(count, np.float32), ""
            begin = max(0.0, start - reader.start)
            samples = stretch(reader, begin, (count - silence) / RATE, seconds + 1)
            return np.concatenate(
                [np.zeros(silence, np.float32), samples]
            ), reader.problem and f"sound: {reader.problem}"
    except BrokenAudio as error:
        return None, "" if str(error) == "no sound track" else f"sound: {error}"


def _cut_short(data: bytes, video: Video, start: float, plan: dict[str, Any]) -> str:
    """Whether the clip ends before it should because the file does."""
    wanted = start + (plan["seconds"] or float("inf"))
    end = video.end()
    if (declared := min(wanted, video.declared)) > end + _SHORT:
        return f"cut short: {end:.1f} of {declared:.1f} seconds"
    if (missing := _missing_bytes(data)) and wanted > end + _SHORT:
        return f"cut short: {missing} bytes are missing"
    return ""


def _missing_bytes(data: bytes) -> int:
    """Bytes that a Matroska or RIFF (AVI) file says it has and has not."""
    if data.startswith(b"RIFF"):
        return max(0, int.from_bytes(data[4:8], "little") + 8 - len(data))
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        size, at = _ebml_size(data, 4)
        if data[at + size : at + size + 4] == b"\x18\x53\x80\x67":
            length, begin = _ebml_size(data, at + size + 4)
            return max(0, begin + length - len(data))
    return 0


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """(a size of EBML at this place, the place behind it); an unknown size is 0."""
    if at >= len(data) or data[at] == 0:
        return 0, at
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length], "big") & ((1 << 7 * length) - 1)
    return (0 if value == (1 << 7 * length) - 1 else value), at + length
