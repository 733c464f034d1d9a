"""Clips that belong to the scenes: one object that moves, grows, shrinks or turns, with its sound; captions say how.

They are MP4 files (H.264, AAC), written with PyAV: reading video needs it too (`pip install 'auroraio[data]'`). The same
installation writes the same bytes; another version of its encoder may not, while frames and captions stay.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataload.scenes.draw import GROUND, RADIUS, blend
from dataload.scenes.sound import RATE
from dataload.scenes.text import BACKGROUNDS, CAPTIONS_PER_SCENE, SIZES, SceneObject, phrase, split_triples

FRAMES, FPS = 8, 8
MOTIONS: dict[str, tuple[str, ...]] = {
    "left": ("moves left", "goes to the left"),
    "right": ("moves right", "goes to the right"),
    "up": ("moves up", "rises"),
    "down": ("moves down", "falls"),
    "grows": ("grows", "gets bigger"),
    "shrinks": ("shrinks", "gets smaller"),
    "turns": ("turns", "spins"),
}
ROUND = ("circle", "ring")
"""Shapes that nobody sees turning."""
WAY = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
REACH = 0.24  # of the picture's side: from the middle to where a movement starts and ends
GROWTH = 1.8  # of the radius, from the first frame to the last
TURN = 1.2  # radians


@dataclass(frozen=True)
class ClipScene:
    """What happens in a clip; `item.size` is that of its first frame, `item.place` is empty."""

    item: SceneObject
    motion: str
    background: str

    def facts(self, left_out: frozenset[str] = frozenset()) -> tuple[str | None, ...]:
        """What a caption claims; None = not said."""
        said = {
            "shape": self.item.shape,
            "color": self.item.color,
            "texture": self.item.texture,
            "size": self.item.size,
            "motion": self.motion,
            "background": self.background,
        }
        return tuple(None if name in left_out else fact for name, fact in said.items())

    def agrees(self, said: tuple[str | None, ...]) -> bool:
        """Whether such a claim is true of this clip."""
        return all(word is None or word == fact for word, fact in zip(said, self.facts(), strict=True))


def sample_clip(rng: random.Random, *, heldout: bool) -> ClipScene:
    """A random clip of a held-out triple, or of another."""
    triple = rng.choice(split_triples(heldout))
    item = SceneObject(*triple, rng.choice(tuple(SIZES)), "")
    motions = [name for name in MOTIONS if name != "turns" or item.shape not in ROUND]
    return ClipScene(item, rng.choice(motions), rng.choice(BACKGROUNDS))


def write_clip_captions(
    scene: ClipScene, rng: random.Random, unique: Callable[[tuple[str | None, ...]], bool]
) -> list[str]:
    """Five different true captions: two say everything, the others leave something out, unless `unique` says that what is
    left would be true of another clip too. All name shape, color and motion."""
    captions: list[str] = []
    for left_out in ((), (), ("background",), ("size",), ("texture",))[:CAPTIONS_PER_SCENE]:
        unsaid = frozenset(left_out)
        if unsaid and not unique(scene.facts(unsaid)):
            unsaid = frozenset()
        caption = _caption(scene, unsaid, rng)
        while caption in captions:
            caption = _caption(scene, unsaid, rng)
        captions.append(caption)
    return captions


def _caption(scene: ClipScene, left_out: frozenset[str], rng: random.Random) -> str:
    text = f"{phrase(scene.item, left_out | {'place'}, False, rng)} {rng.choice(MOTIONS[scene.motion])}"
    if "background" in left_out:
        return text
    ground = scene.background
    return rng.choice((f"{text} on {ground}", f"on {ground} {text}", f"{text}, {ground} background"))


def draw_clip(scene: ClipScene, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The frames: uint8 [FRAMES, size, size, 3]."""
    light = rng.uniform(-1.0, 1.0, size=4).astype(np.float32)
    jitter = rng.uniform(-1.0, 1.0, size=12)
    ground = (np.asarray(GROUND[scene.background], np.float32) + 6.0 * light[:3]) * (1.0 + 0.05 * light[3])
    frames = np.empty((FRAMES, size, size, 3), np.uint8)
    for number in range(FRAMES):
        done = number / (FRAMES - 1)
        x, y = 0.5 + 0.05 * jitter[0], 0.5 + 0.05 * jitter[1]
        if scene.motion in WAY:
            across, down = WAY[scene.motion]
            x, y = x + across * REACH * (2 * done - 1), y + down * REACH * (2 * done - 1)
        radius = RADIUS[scene.item.size] * (1.0 + 0.03 * jitter[2])
        if scene.motion in ("grows", "shrinks"):
            radius *= GROWTH ** (done if scene.motion == "grows" else -done)
        angle = math.radians(6.0) * jitter[3]
        if scene.motion == "turns":
            angle += TURN * done
        picture = np.empty((size, size, 3), np.float32)
        picture[:] = ground
        blend(picture, scene.item, (x * size, y * size), radius * size, angle, jitter[4:10])
        noise = rng.uniform(-2.0, 2.0, size=picture.shape)
        frames[number] = np.clip(picture + noise, 0.0, 255.0).astype(np.uint8)
    return frames


def encode_mp4(frames: NDArray[np.uint8], sound: NDArray[np.float32]) -> bytes:
    """Frames [F, S, S, 3] at FPS and a waveform at RATE as MP4. Raises ImportError where PyAV is missing."""
    try:
        import av
    except ImportError as error:
        raise ImportError("the built-in clips need PyAV: pip install 'auroraio[data]'") from error
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        options = {"crf": "20", "preset": "ultrafast", "threads": "1"}
        video = container.add_stream("libx264", rate=FPS, options=options)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        audio = container.add_stream(
            "aac", rate=RATE, layout="mono", options={"aac_coder": "fast", "b": "48000"}
        )
        for pixels in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())
        frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        container.mux([*audio.encode(frame), *audio.encode()])
    return data.getvalue()
