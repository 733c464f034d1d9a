"""The built-in sounds and clips: they are what their captions say, held-out ones are new, the same bytes every time."""

from __future__ import annotations

import hashlib
import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataload import audio, shards, video
from dataload.annotations import annotated, read_classes
from dataload.scenes import media as scenes_media
from dataload.scenes.clip import FRAMES, MOTIONS, ROUND, ClipScene, draw_clip
from dataload.scenes.draw import GROUND
from dataload.scenes.sound import HARMONICS, NOTES, PITCH, RATE, SILENT, claim_of_sound, render
from dataload.scenes.text import SHAPES, Scene, SceneObject, heldout_triples, words_of

pytest.importorskip("av", reason="needs PyAV: pip install 'auroraio[data]'")
pytest.importorskip("soundfile", reason="needs soundfile: pip install 'auroraio[data]'")

SMALL: dict[str, Any] = {
    "train": 60,
    "uncaptioned": 0,
    "heldout": 20,
    "sounds": 40,
    "clips": 30,
    "heldout_media": 24,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> scenes_media.MediaPaths:
    return scenes_media.build(tmp_path_factory.mktemp("media"), **SMALL, workers=1)


def samples(shards: tuple[Path, ...]) -> list[tuple[bytes, dict[str, Any]]]:
    """(encoded bytes, sidecar) of every sample."""
    found = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        found += [
            (data, json.loads(files[name.rsplit(".", 1)[0] + ".json"]))
            for name, data in files.items()
            if name.endswith((".wav", ".mp4"))
        ]
    return found


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def lowest_peak(sound: np.ndarray) -> float:
    """Hz of the lowest partial that stands out."""
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
    first = int(np.flatnonzero(spectrum > 0.3 * spectrum.max())[0])
    return (first + int(spectrum[first : first + 12].argmax())) * RATE / len(sound)


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "star", "cross", "ring"])
def test_pitch_is_the_colors(shape: str) -> None:
    for color, pitch in PITCH.items():
        sound = render(Scene("", (SceneObject(shape, color, "solid", "large", ""),)), generator())
        lowest = lowest_peak(sound)
        # A ring trembles: its tone has a partial 14 Hz to either side.
        assert abs(lowest - pitch) < 0.015 * pitch + (15 if shape == "ring" else 2), (color, lowest)


def test_shapes_sound_different() -> None:
    spectra = {}
    for shape in ("circle", "square", "triangle", "star", "cross"):
        sound = render(Scene("", (SceneObject(shape, "green", "solid", "large", ""),)), generator())
        power = np.abs(np.fft.rfft(sound * np.hanning(len(sound)))) ** 2
        spectra[shape] = power / np.linalg.norm(power)
    assert max(float(a @ b) for a, b in itertools.combinations(spectra.values(), 2)) < 0.9


def test_rhythm_is_the_textures_and_loudness_the_sizes() -> None:
    loud = {}
    for texture, size in itertools.product(NOTES, ("small", "large")):
        sound = render(Scene("", (SceneObject("square", "blue", texture, size, ""),)), generator())
        envelope = np.abs(sound).reshape(-1, 160).max(1)
        on = envelope > 0.3 * envelope.max()
        assert int((on[1:] & ~on[:-1]).sum() + on[0]) == (NOTES[texture])
        loud[texture, size] = envelope.max()
    assert all(loud[t, "large"] > 2.5 * loud[t, "small"] for t in NOTES)


def test_sounds_decode_to_a_second_and_their_captions_name_what_sounds(
    corpus: scenes_media.MediaPaths,
) -> None:
    for data, _ in samples(corpus.sounds)[:10]:
        sound = audio.decode(data, seconds=2.0)
        assert len(sound.samples) == RATE and np.abs(sound.samples).max() > 0.05
    for _, sidecar in samples(corpus.sounds) + samples(corpus.heldout_sounds):
        objects = sidecar["scene"]["objects"]
        true = {item["color"] for item in objects}, {item["shape"] for item in objects}
        assert len(set(sidecar["captions"])) == 5
        assert all(words_of(caption) == true for caption in sidecar["captions"])


def test_the_labels_of_a_sound_are_its_timbres(corpus: scenes_media.MediaPaths) -> None:
    classes = read_classes(corpus.sounds[0])
    assert tuple(classes.labels) == tuple(classes.labels.values()) == tuple(HARMONICS) == tuple(SHAPES)
    index = shards.index(list(corpus.sounds))
    found = list(annotated(index, needs=("labels",)))
    assert len(found) == len(index) == SMALL["sounds"]
    for one in found:
        objects = index.record(one.sample)["scene"]["objects"]
        assert set(one.labels) == {item["shape"] for item in objects} and len(set(one.labels)) == len(
            one.labels
        )
    assert {len(one.labels) for one in found} == {1, 2}
    heldout = annotated(shards.index(list(corpus.heldout_sounds)), needs=("labels",))
    assert {label for one in heldout for label in one.labels} == set(HARMONICS)


def test_heldout_triples_were_never_trained_on(corpus: scenes_media.MediaPaths) -> None:
    def triples(shards: tuple[Path, ...]) -> set[tuple[str, ...]]:
        scenes = [sidecar["scene"] for _, sidecar in samples(shards)]
        items = [item for scene in scenes for item in scene.get("objects") or [scene["item"]]]
        return {(item["shape"], item["color"], item["texture"]) for item in items}

    for train, heldout in ((corpus.sounds, corpus.heldout_sounds), (corpus.clips, corpus.heldout_clips)):
        assert triples(heldout) <= heldout_triples()
        assert not triples(train) & heldout_triples()


def test_no_heldout_caption_is_true_of_another() -> None:
    parameters = scenes_media.MediaParameters(64, 1, 1, 150, 0)
    sounds = [one.scene for one in scenes_media.samples_of("sounds", parameters, heldout=True)]
    for scene in sounds:
        assert isinstance(scene, Scene)
        claim = claim_of_sound(scene)
        assert sum(claim.true_of(other) for other in sounds if isinstance(other, Scene)) == 1
    clips = scenes_media.samples_of("clips", parameters, heldout=True)
    assert len({one.scene for one in clips}) == 150
    for kind in ("sounds", "clips"):
        captions = [
            c for one in scenes_media.samples_of(kind, parameters, heldout=True) for c in one.captions
        ]
        assert len(set(captions)) == len(captions)
        assert not any(place in " ".join(captions) for place in ("top", "bottom", "center", "middle"))
    assert SILENT == {"background", "place"}


def middle_of(frame: np.ndarray, ground: tuple[int, int, int]) -> tuple[float, float, int]:
    """x and y of the object's middle as shares of the picture, and its pixels."""
    away = np.abs(frame.astype(int) - np.array(ground)).max(-1) > 60
    y, x = np.nonzero(away)
    return float(x.mean()) / frame.shape[1], float(y.mean()) / frame.shape[0], int(away.sum())


@pytest.mark.parametrize("motion", MOTIONS)
def test_things_move_as_the_caption_says(motion: str) -> None:
    scene = ClipScene(SceneObject("cross", "blue", "solid", "small", ""), motion, "tan")
    frames = draw_clip(scene, 64, generator(1))
    (x0, y0, n0), (x1, y1, n1) = (middle_of(frames[i], GROUND["tan"]) for i in (0, -1))
    across = (x1 - x0 > 0.3) - (x1 - x0 < -0.3)
    down = (y1 - y0 > 0.3) - (y1 - y0 < -0.3)
    grown = (n1 > 2 * n0) - (2 * n1 < n0)
    expected = {"left": (-1, 0, 0), "right": (1, 0, 0), "up": (0, -1, 0), "down": (0, 1, 0)}
    expected |= {"grows": (0, 0, 1), "shrinks": (0, 0, -1), "turns": (0, 0, 0)}
    assert (across, down, grown) == expected[motion]
    changed = np.abs(frames[0].astype(int) - frames[3]).max(-1) > 60
    assert changed.sum() > 40
    assert "circle" in ROUND and "ring" in ROUND


def test_clips_decode_with_frames_and_sound(corpus: scenes_media.MediaPaths) -> None:
    for data, sidecar in samples(corpus.clips)[:5]:
        clip = video.decode(
            data, frames=4, seconds=1.0, size=64, rng=generator(), sound=True, flip=0.0, scale=(1, 1)
        )
        assert clip.frames.shape == (4, 64, 64, 3) and clip.distinct == 4
        assert clip.sound is not None and 0.9 * RATE < len(clip.sound) <= 1.1 * RATE
        item = sidecar["scene"]["item"]
        if item["texture"] == "solid" and item["shape"] != "ring":
            assert abs(lowest_peak(clip.sound) - PITCH[item["color"]]) < 0.03 * PITCH[item["color"]] + 4


def test_the_same_bytes_with_any_number_of_workers(corpus: scenes_media.MediaPaths, tmp_path: Path) -> None:
    again = scenes_media.build(tmp_path, **SMALL, workers=2)
    for a, b in zip(
        (*corpus.sounds, *corpus.clips, *corpus.heldout_sounds, *corpus.heldout_clips, corpus.tokenizer),
        (*again.sounds, *again.clips, *again.heldout_sounds, *again.heldout_clips, again.tokenizer),
        strict=True,
    ):
        assert a.name == b.name
        assert hashlib.sha256(a.read_bytes()).digest() == hashlib.sha256(b.read_bytes()).digest(), a.name
    assert len(samples(corpus.clips)[0][0]) < 40_000
    assert FRAMES == 8


def test_impossible_parameters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one of each"):
        scenes_media.build(tmp_path, **(SMALL | {"sounds": 0}), workers=1)
