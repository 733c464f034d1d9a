"""Video: bytes to a few frames of a stretch of time, and its sound; tubelets. Letters: F frames, H W height and width.

Policies, in one place:
- Time is the file's own: the frame at time T is the one that a player shows then, so that variable frame rates, missing
  durations and videos of one frame need no case of their own. 0 is the first frame's time.
- Frames are upright (rotation metadata is applied; mirroring metadata and the shape of pixels are not).
- The crop and the flip are drawn once per clip and shared by its frames.
- A clip of a video that is shorter has the frames and the sound that there are; frames may repeat (`Clip.distinct`).
- What is cut short or damaged is used up to the damage, and `Clip.problem` says so. No whole frame is a BrokenVideo.
- Without a sound track the sound is None; a sound track that cannot be read is None too, and a problem. Sound without
  frames is a BrokenVideo. Of several tracks the one counts that FFmpeg thinks best (players
  show it), and the first of sound.
- Limits are on pixels, frames and seconds. Playlists that would open other files are not read (see audio_av.CONTAINERS).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dataload.broken import BrokenVideo

if TYPE_CHECKING:
    import torch

    from dataload.sandbox import Sandbox

MAX_PIXELS = 4096 * 2304
"""default limit on width * height"""
MAX_SECONDS = 600.0
"""default limit on the stretch of time that one clip covers"""
MAX_FRAMES = 1024
TIMEOUT = 60.0
"""seconds that a sandbox gets for a clip"""
CROP_DRAWS = 22
"""random numbers that crops.crop_box takes at most"""


@dataclass(frozen=True)
class Clip:
    """What was decoded."""

    frames: np.ndarray
    """uint8 [F, H, W, 3], RGB"""
    times: np.ndarray
    """float64 [F]: seconds at which each frame begins, from the video's first frame on"""
    start: float
    """seconds in the video at which the clip begins"""
    seconds: float
    """its length: what was asked for, or less where the video ends"""
    distinct: int
    """different frames among the F"""
    sound: np.ndarray | None
    """float32 [S], mono, 16 kHz, from `start` on; at most `seconds` of it. None: no sound track, or not asked for"""
    problem: str
    """what is missing, in words; empty: nothing"""


def decode(
    data: bytes,
    *,
    frames: int = 8,
    seconds: float | None = None,
    start: float | None = None,
    place: float = 0.0,
    rng: np.random.Generator | None = None,
    size: int | None = None,
    short_side: int | None = None,
    box: tuple[int, int, int, int] | None = None,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    interpolation: str = "bilinear",
    sound: bool = True,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
    sandbox: Sandbox | None = None,
    timeout: float = TIMEOUT,
) -> Clip:
    """Decodes `frames` frames of `seconds` of a video (None: all of it), and its sound, with the policies above.

    When: from `start` on, or from the share `place` (0..1) of all possible places, or, with `rng` and neither, from any.
    The clip is divided into `frames` equal parts; of each the frame in its middle is taken, with `rng` that at a random
    time (jitter). Only what those frames need is decoded.

    Where: without `size` and `short_side`, whole frames; with `short_side`, whole frames of which the shorter side is that;
    with `size`, squares: of `box` (left, top, width, height in upright pixels), or with `rng` of a random resized crop
    (`scale`, `ratio`: see crops.crop_box) that is mirrored with probability `flip`, or else the largest in the centre.
    Pillow's antialiased filters resize.

    The same number of random numbers is drawn from `rng` in every case. With a `sandbox` FFmpeg's libraries run in a child
    process, so that no file can take this process down; without one they run here: for files that you trust.

    Raises BrokenVideo, and nothing else, for bytes that are no video, have no frames, or exceed a limit; ImportError for a
    missing library.
    """
    if not 1 <= frames <= MAX_FRAMES:
        raise ValueError(f"frames={frames}: 1 to {MAX_FRAMES}")
    if not 0 <= place <= 1 or (start is not None and start < 0):
        raise ValueError(f"start={start}, place={place}: at least 0, and a place at most 1")
    if seconds is not None and not 0 < seconds <= max_seconds:
        raise ValueError(f"seconds={seconds}: more than 0, and at most max_seconds={max_seconds:g}")
    if (size is not None and short_side is not None) or (box is not None and size is None):
        raise ValueError("size or short_side, not both; a box needs a size")
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolation={interpolation!r}: bilinear or bicubic")
    draws = None if rng is None else rng.random(2 + CROP_DRAWS + MAX_FRAMES)
    if draws is not None and start is None and place == 0:
        place = float(draws[0])
    random_crop = draws is not None and size is not None and box is None
    plan = {
        "frames": frames, "seconds": seconds, "start": start, "place": float(place),
        "jitter": None if draws is None else draws[2 + CROP_DRAWS :][:frames],
        "size": size, "short_side": short_side, "box": box,
        "crop": draws[2 : 2 + CROP_DRAWS] if draws is not None and random_crop else None,
        "scale": tuple(map(float, scale)), "ratio": tuple(map(float, ratio)),
        "flip": bool(random_crop and draws is not None and draws[1] < flip),
        "interpolation": interpolation, "sound": sound, "max_pixels": max_pixels, "max_seconds": float(max_seconds),
    }  # fmt: skip
    if sandbox is None:
        from dataload.decode.video import decode_here

        return Clip(**decode_here(bytes(data), plan))
    needs = [
        "av",
        "PIL.Image",
        *(["soundfile", "soxr"] if sound else []),
    ]
    answer = sandbox.call(
        "dataload.decode.video:decode_here",
        bytes(data),
        plan,
        timeout=timeout,
        needs=needs,
        broken=BrokenVideo,
    )
    return _checked(answer, frames)


def _checked(answer: Any, frames: int) -> Clip:
    """A Clip of what a child answered, if it has the right types: a child that went over to its file may answer anything."""
    match answer:
        case {
            "frames": np.ndarray() as pictures, "times": np.ndarray() as times, "start": float(), "seconds": float(),
            "distinct": int(), "sound": None | np.ndarray() as sound, "problem": str(),
        } if (
            len(answer) == 7
            and pictures.dtype == np.uint8 and pictures.ndim == 4 and pictures.shape[::3] == (frames, 3)
            and times.dtype == np.float64 and times.shape == (frames,)
            and (sound is None or (sound.dtype == np.float32 and sound.ndim == 1))
        ):  # fmt: skip
            return Clip(**answer)
    raise BrokenVideo("the decoder answered with something else than a clip")


def tubelets(frames: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """[..., F, H, W, C] to [..., n, t*h*w*C]: the boxes of `shape` (t, h, w), in order of time, rows, columns.

    A view's worth of work: no value changes. Raises ValueError where `shape` does not divide F, H, W.
    """
    *batch, f, height, width, channels = frames.shape
    t, h, w = shape
    if min(shape) < 1 or f % t or height % h or width % w:
        raise ValueError(f"tubelets of {t}x{h}x{w} do not divide {f}x{height}x{width}")
    split = frames.reshape(*batch, f // t, t, height // h, h, width // w, w, channels)
    n = len(batch)
    order = [*range(n), n, n + 2, n + 4, n + 1, n + 3, n + 5, n + 6]
    return split.permute(order).reshape(*batch, (f // t) * (height // h) * (width // w), t * h * w * channels)


def untubelets(values: torch.Tensor, shape: tuple[int, int, int], size: tuple[int, int, int]) -> torch.Tensor:
    """The inverse of `tubelets`: [..., n, t*h*w*C] to [..., F, H, W, C], with `size` = (F, H, W)."""
    *batch, count, length = values.shape
    (t, h, w), (f, height, width) = shape, size
    if min(shape) < 1 or f % t or height % h or width % w:
        raise ValueError(f"tubelets of {t}x{h}x{w} do not divide {f}x{height}x{width}")
    if count != (f // t) * (height // h) * (width // w) or length % (t * h * w):
        raise ValueError(
            f"{count} tubelets of {length} values are not {f}x{height}x{width} in boxes of {t}x{h}x{w}"
        )
    split = values.reshape(*batch, f // t, height // h, width // w, t, h, w, length // (t * h * w))
    n = len(batch)
    order = [*range(n), n, n + 3, n + 1, n + 4, n + 2, n + 5, n + 6]
    return split.permute(order).reshape(*batch, f, height, width, length // (t * h * w))
