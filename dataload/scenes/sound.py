"""Sounds that belong to the scenes: how a shape, a color, a texture and a size sound, and captions that are true of it.

    shape    timbre      the strengths of the harmonics; a ring's tone trembles
    color    pitch       four semitones from one color to the next, from red at 220 Hz to brown at 1,109 Hz
    texture  rhythm      solid: one held note; striped: three beats; dotted: six short taps
    size     loudness    small ones are a quarter as loud as large ones

A sound is one object, or two one after the other; its labels are their shapes, which are heard as timbres. Place and background
cannot be heard and are not said. Held-out sounds consist of held-out triples, as the pictures do.
"""

from __future__ import annotations

import io
import random
import wave
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dataload.scenes.text import (
    CAPTIONS_PER_SCENE,
    COLORS,
    SIZES,
    Claim,
    Scene,
    SceneObject,
    claim_of,
    phrase,
    split_triples,
)

RATE = 16_000
SECONDS = 1.0
TWO_SOUNDS = 0.5  # share of the training sounds that have two objects
HARMONICS: dict[str, tuple[float, ...]] = {
    "circle": (1.0,),
    "square": (1.0, 0.0, 0.9, 0.0, 0.7),
    "triangle": (1.0, 0.9),
    "star": (0.5, 0.4, 0.5, 0.6, 0.6),
    "cross": (0.6, 0.0, 0.0, 1.0),
    "ring": (1.0,),
}
PITCH = {color: 220.0 * 2.0 ** (4 * number / 12) for number, color in enumerate(COLORS)}
NOTES = {"solid": 1, "striped": 3, "dotted": 6}
LENGTH = {"solid": 0.9, "striped": 0.6, "dotted": 0.3}  # of a note, as a share of its time
LOUDNESS = {"small": 0.12, "large": 0.48}
TREMBLE = 14.0  # Hz
SILENT = frozenset(("background", "place"))
"""What a sound does not tell."""


def sample_sound(rng: random.Random, *, heldout: bool) -> Scene:
    """A random sounding scene, its objects in the order in which they sound. Held-out ones have two objects: of single ones
    there are too few."""
    count = 2 if heldout or rng.random() < TWO_SOUNDS else 1
    chosen = rng.sample(split_triples(heldout), count)
    return Scene("", tuple(SceneObject(*triple, rng.choice(tuple(SIZES)), "") for triple in chosen))


def labels_of(scene: Scene) -> list[str]:
    """The classes of a sound: what is in it, one or two of HARMONICS, in their order."""
    heard = {item.shape for item in scene.objects}
    return [name for name in HARMONICS if name in heard]


def claim_of_sound(scene: Scene, left_out: frozenset[str] = frozenset()) -> Claim:
    """What a caption claims that leaves out these; the order of two objects is not claimed."""
    return claim_of(scene, left_out | SILENT)


def write_sound_captions(scene: Scene, rng: random.Random, unique: Callable[[Claim], bool]) -> list[str]:
    """Five different true captions. The first three say everything; the others leave out the size or the texture, unless
    `unique` says that what is left would also be true of another sound."""
    captions: list[str] = []
    for left_out in ((), (), (), ("size",), ("texture",))[:CAPTIONS_PER_SCENE]:
        unsaid = frozenset(left_out)
        if unsaid and not unique(claim_of_sound(scene, unsaid)):
            unsaid = frozenset()
        caption = _caption(scene, unsaid | SILENT, rng)
        while caption in captions:
            caption = _caption(scene, unsaid | SILENT, rng)
        captions.append(caption)
    return captions


def _caption(scene: Scene, left_out: frozenset[str], rng: random.Random) -> str:
    phrases = [phrase(item, left_out, False, rng) for item in scene.objects]
    start = rng.choice(("", "", "sound of ", "the sound of ", "hear "))
    return start + rng.choice((" and ", ", ")).join(phrases)


def render(scene: Scene, rng: np.random.Generator, seconds: float = SECONDS) -> NDArray[np.float32]:
    """The sound of a scene: float32 [seconds * RATE], -1..1."""
    total = round(seconds * RATE)
    sound = np.zeros(total)
    slot = total // len(scene.objects)
    for number, item in enumerate(scene.objects):
        jitter = rng.uniform(-1.0, 1.0, size=3)
        pitch = PITCH[item.color] * (1.0 + 0.01 * jitter[0])
        level = LOUDNESS[item.size] * (1.0 + 0.15 * jitter[1])
        each = slot // NOTES[item.texture]
        note = level * _note(item.shape, pitch, round(each * LENGTH[item.texture]))
        shift = round(0.05 * each * (1.0 + jitter[2]))
        for beat in range(NOTES[item.texture]):
            first = number * slot + beat * each + shift
            heard = note[: total - first]
            sound[first : first + len(heard)] += heard
    noise = rng.uniform(-1.0, 1.0, size=total)
    return (sound + 0.002 * noise).astype(np.float32)


def _note(shape: str, pitch: float, samples: int) -> NDArray[np.float64]:
    """A tone of this timbre, greatest amplitude 1, that begins and ends softly."""
    time = np.arange(samples) / RATE
    tone = np.zeros(samples)
    for number, strength in enumerate(HARMONICS[shape], 1):
        tone += strength * np.sin(2 * np.pi * pitch * number * time)
    tone /= sum(HARMONICS[shape])
    if shape == "ring":
        tone *= 0.5 + 0.5 * np.cos(2 * np.pi * TREMBLE * time)
    edge = min(samples // 2, RATE // 100)
    fade = np.linspace(0.0, 1.0, edge)
    tone[:edge] *= fade
    tone[-edge:] *= fade[::-1]
    return tone


def encode_wav(sound: NDArray[np.float32]) -> bytes:
    """A waveform [S] of RATE as 16-bit WAV."""
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(sound, -1.0, 1.0) * 32767.0).round().astype("<i2").tobytes())
    return data.getvalue()
