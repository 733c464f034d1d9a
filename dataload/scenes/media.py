"""The built-in corpus of all modalities: the pictures of `dataload.scenes`, and sounds and clips that belong to them.

Sounds and clips lie in a folder of their own, with a tokenizer of all captions: sounds-*.tar, clips-*.tar, heldout-sounds-*.tar
and heldout-clips-*.tar. Held-out ones show the triples of shape, color and texture that no training picture, sound or clip
has, and none of their captions is true of another one in the same set. The labels of a sound are the timbres in it.

    python -m dataload.scenes.media --output DIR
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataload import scenes
from dataload.annotations import CLASSES
from dataload.pack.writer import ShardWriter
from dataload.scenes.clip import ClipScene, draw_clip, encode_mp4, sample_clip, write_clip_captions
from dataload.scenes.sound import HARMONICS, encode_wav, labels_of, render, sample_sound, write_sound_captions
from dataload.scenes.text import Claim, Scene

VERSION = 2  # to be raised whenever the same parameters would give other frames, sounds, captions or labels
SAMPLES_PER_SHARD = 250
KINDS = ("sounds", "clips")


@dataclass(frozen=True)
class MediaPaths:
    """Where a built corpus lies: tar shards, and the tokenizer of the captions of pictures, sounds and clips."""

    pictures: scenes.ScenePaths
    sounds: tuple[Path, ...]
    clips: tuple[Path, ...]
    heldout_sounds: tuple[Path, ...]
    heldout_clips: tuple[Path, ...]
    tokenizer: Path


@dataclass(frozen=True)
class MediaParameters:
    """What sounds and clips depend on; see `build`."""

    size: int
    sounds: int
    clips: int
    heldout: int
    seed: int

    def __post_init__(self) -> None:
        if self.size < 32 or self.size % 2 or min(self.sounds, self.clips, self.heldout) < 1 or self.seed < 0:
            raise ValueError(
                "sounds and clips need an even size >= 32, at least one of each, and seed >= 0; "
                f"this was asked for: {asdict(self)}"
            )


@dataclass(frozen=True)
class Media:
    """One sound or clip to make: its number picks its random stream."""

    number: int
    scene: Scene | ClipScene
    captions: list[str]


def build(
    directory: Path,
    *,
    size: int = 64,
    train: int = 8000,
    uncaptioned: int = 4000,
    heldout: int = 500,
    sounds: int = 1500,
    clips: int = 1500,
    heldout_media: int = 150,
    seed: int = 0,
    workers: int | None = None,
) -> MediaPaths:
    """Finds the corpus with these parameters under `directory`, or makes it there. The first four are those of
    `scenes.build`, whose pictures are shared with it; `heldout_media` counts held-out sounds, and held-out clips.

    Raises ImportError without PyAV, which writes and reads clips.
    """
    workers = workers or os.cpu_count() or 1
    pictures = scenes.build(
        directory,
        size=size,
        train=train,
        uncaptioned=uncaptioned,
        heldout=heldout,
        seed=seed,
        workers=workers,
    )
    parameters = MediaParameters(size, sounds, clips, heldout_media, seed)
    name = f"media-v{VERSION}-{size}px-{sounds}+{clips}-{heldout_media}-of-{train}-seed{seed}"
    home = directory / name
    texts = scenes.Parameters(size, train, uncaptioned, heldout, seed)
    scenes.settle(home, lambda made: _make(made, parameters, texts, workers))

    def found(prefix: str) -> tuple[Path, ...]:
        return tuple(sorted(home.glob(f"{prefix}-*.tar")))

    return MediaPaths(
        pictures,
        found("sounds"),
        found("clips"),
        found("heldout-sounds"),
        found("heldout-clips"),
        home / "tokenizer.model",
    )


def _make(home: Path, parameters: MediaParameters, pictures: scenes.Parameters, workers: int) -> None:
    from dataload.tokenizer import train_tokenizer  # SentencePiece is needed only when a corpus is made

    texts = [text for sample in scenes.training_samples(pictures) for text in sample.captions]
    jobs = []
    for kind in KINDS:
        for heldout in (False, True):
            samples = samples_of(kind, parameters, heldout=heldout)
            jobs += [(kind, heldout, shard) for shard in range(-(-len(samples) // SAMPLES_PER_SHARD))]
            texts += [] if heldout else [text for sample in samples for text in sample.captions]

    def make(job: tuple[str, bool, int]) -> None:
        if workers > 1:
            scenes.run_child("dataload.scenes.media", json.dumps([str(home), asdict(parameters), *job]))
        else:
            write_shard(home, parameters, *job)

    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(make, job) for job in jobs]
        train_tokenizer(iter(texts), home / "tokenizer.model", scenes.VOCABULARY, model_type="bpe")
        for one in running:
            one.result()  # raises what went wrong in it
    labels = [{"id": name, "name": name} for name in HARMONICS]
    (home / CLASSES).write_text(json.dumps({"labels": labels}, indent=1) + "\n", encoding="utf-8")
    scenes.write_listing(home, VERSION, parameters)


def samples_of(kind: str, parameters: MediaParameters, *, heldout: bool) -> list[Media]:
    """All sounds or clips of a split. No two training ones, and no two held-out ones, are of the same scene."""
    rng = random.Random(f"{kind} {'heldout' if heldout else 'train'} {parameters.seed}")
    count = parameters.heldout if heldout else getattr(parameters, kind)
    return _sounds(rng, count, heldout) if kind == "sounds" else _clips(rng, count, heldout)


def _sounds(rng: random.Random, count: int, heldout: bool) -> list[Media]:
    found: dict[frozenset[object], Scene] = {}
    while len(found) < count:
        scene = sample_sound(rng, heldout=heldout)
        found.setdefault(
            frozenset(scene.objects), scene
        )  # two objects the other way round are the same claim
    scenes_ = list(found.values())

    def alone(claim: Claim) -> bool:
        return not heldout or sum(claim.true_of(scene) for scene in scenes_) == 1

    return [Media(n, scene, write_sound_captions(scene, rng, alone)) for n, scene in enumerate(scenes_)]


def _clips(rng: random.Random, count: int, heldout: bool) -> list[Media]:
    found: dict[ClipScene, None] = {}
    while len(found) < count:
        found[sample_clip(rng, heldout=heldout)] = None

    def alone(said: tuple[str | None, ...]) -> bool:
        return not heldout or sum(scene.agrees(said) for scene in found) == 1

    return [Media(n, scene, write_clip_captions(scene, rng, alone)) for n, scene in enumerate(found)]


def write_shard(home: Path, parameters: MediaParameters, kind: str, heldout: bool, shard: int) -> None:
    """Makes one shard: HOME/[heldout-]KIND-<shard>.tar."""
    samples = samples_of(kind, parameters, heldout=heldout)
    prefix = f"heldout-{kind}" if heldout else kind
    stream = 2 * KINDS.index(kind) + heldout
    first = shard * SAMPLES_PER_SHARD
    with ShardWriter(home, prefix, max_samples=SAMPLES_PER_SHARD, first_shard=shard) as writer:
        for sample in samples[first : first + SAMPLES_PER_SHARD]:
            # The third word of the counter keeps these streams apart from those of the pictures.
            rng = np.random.Generator(
                np.random.Philox(key=[parameters.seed, 4 * sample.number + stream], counter=[0, 0, 1, 0])
            )
            scene = sample.scene
            facts: dict[str, Any] = {"scene": asdict(scene)}
            if isinstance(scene, ClipScene):
                frames = draw_clip(scene, parameters.size, rng)
                suffix, data = "mp4", encode_mp4(frames, render(Scene("", (scene.item,)), rng))
            else:
                suffix, data = "wav", encode_wav(render(scene, rng))
                facts["labels"] = labels_of(scene)
            writer.write(f"{sample.number:08d}", suffix, data, sample.captions, facts)


def _child() -> None:
    home, parameters, kind, heldout, shard = json.loads(sys.stdin.buffer.read())
    write_shard(Path(home), MediaParameters(**parameters), kind, heldout, shard)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dataload.scenes.media", description="Make the built-in corpus of all modalities."
    )
    parser.add_argument(
        "--output", type=Path, default=scenes.default_directory(), help="parent folder (default: %(default)s)"
    )
    for name, number in (("size", 64), ("sounds", 1500), ("clips", 1500), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=number, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    options = vars(parser.parse_args(arguments))
    started = time.monotonic()
    try:
        paths = build(options.pop("output"), **options)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    print(f"{len(paths.sounds)} shards of sounds and {len(paths.clips)} of clips in {paths.tokenizer.parent}")
    print(f"({time.monotonic() - started:.1f} s)")


if __name__ == "__main__":
    main()
