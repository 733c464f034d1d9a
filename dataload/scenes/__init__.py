"""The built-in corpus: generated pictures of colored, sized, placed, textured shapes with five true captions
each, the boxes and masks of their objects, and questions with answers (truth.py).

It is what runs when nothing is downloaded. `build` draws it once (seconds) and finds it again later:

    sample scenes -> write captions -> draw and pack shards, one process per shard -> train the tokenizer ->
    rename into place

Training and held-out pictures share no (shape, color, texture) triple, so whoever describes a held-out
picture has put known words together in a new way. Within the held-out split no caption is true of two
pictures.

    python -m dataload.scenes --output DIR --show 48
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataload.pack.writer import ShardWriter
from dataload.scenes.draw import draw_with_masks, encode_png
from dataload.scenes.sheet import contact_sheet
from dataload.scenes.text import (
    COLORS,
    SHAPES,
    Claim,
    Scene,
    SceneObject,
    claim_of,
    heldout_triples,
    sample_scene,
    words_of,
    write_captions,
)
from dataload.scenes.truth import CLASSES, annotate, question_texts

__all__ = ["COLORS", "SHAPES", "ScenePaths", "build", "default_directory", "heldout_triples", "words_of"]

VERSION = 3  # of pictures and captions: to be raised whenever the same parameters would give other bytes
SAMPLES_PER_SHARD = 2000
TIMES = 50  # that the tokenizer reads each question, so that BPE makes its words one piece
VOCABULARY = 2000  # asked of the tokenizer; these few words allow about 700 pieces


@dataclass(frozen=True)
class ScenePaths:
    """Where a built corpus lies: tar shards (img2dataset's layout) and the tokenizer's model file."""

    train: tuple[Path, ...]
    heldout: tuple[Path, ...]
    tokenizer: Path


@dataclass(frozen=True)
class Parameters:
    """What the bytes of a corpus depend on; see `build`."""

    size: int
    train: int
    uncaptioned: int
    heldout: int
    seed: int

    def __post_init__(self) -> None:
        if self.size < 32 or min(self.train, self.heldout) < 1 or min(self.uncaptioned, self.seed) < 0:
            raise ValueError(
                "scenes need size >= 32, train >= 1, uncaptioned >= 0, heldout >= 1 and seed >= 0; "
                f"this was asked for: {asdict(self)}"
            )


@dataclass(frozen=True)
class Sample:
    """One picture to draw: its number picks its random stream; no captions = it is an uncaptioned picture."""

    number: int
    scene: Scene
    captions: list[str]


def default_directory() -> Path:
    """Where corpora are kept: $XDG_CACHE_HOME/auroraio, or ~/.cache/auroraio."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "auroraio"


def build(
    directory: Path,
    *,
    size: int = 64,
    train: int = 8000,
    uncaptioned: int = 4000,
    heldout: int = 500,
    seed: int = 0,
    workers: int | None = None,
) -> ScenePaths:
    """Finds the corpus with these parameters under `directory`, or draws it there.

    `train` and `heldout` count captioned pictures of `size` x `size` pixels; `uncaptioned` more lie among the
    training pictures. The bytes depend on `size`, the counts and `seed` alone, not on `workers` (processes;
    None = all cores). The corpus gets a folder of its own, named by its parameters, which appears complete or
    not at all.
    """
    parameters = Parameters(size, train, uncaptioned, heldout, seed)
    home = directory / f"scenes-v{VERSION}-{size}px-{train}+{uncaptioned}-{heldout}-seed{seed}"
    settle(home, lambda made: _make(made, parameters, workers or os.cpu_count() or 1))
    return ScenePaths(
        tuple(sorted(home.glob("train-*.tar"))),
        tuple(sorted(home.glob("heldout-*.tar"))),
        home / "tokenizer.model",
    )


def settle(home: Path, make: Callable[[Path], None]) -> None:
    """Unless it is there, has `make` fill a folder, which becomes `home`: complete or not at all."""
    if _complete(home):
        return
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=home.name + ".", dir=home.parent) as scratch:
        made = Path(scratch) / "corpus"
        made.mkdir()
        make(made)
        if not _complete(home):
            shutil.rmtree(home, ignore_errors=True)  # damaged: scenes.json lists other files or sizes
        try:
            made.rename(home)
        except OSError:  # another process was faster; what it made is the same
            if not _complete(home):
                raise


def write_listing(home: Path, version: int, parameters: Any) -> None:
    """scenes.json: what `home` was made from (a dataclass), and the size of every file."""
    sizes = {path.name: path.stat().st_size for path in sorted(home.iterdir())}
    (home / "scenes.json").write_text(
        json.dumps({"version": version, "parameters": asdict(parameters), "files": sizes}, indent=1) + "\n"
    )


def _complete(home: Path) -> bool:
    """Whether every file that scenes.json lists is there with its size."""
    listing = home / "scenes.json"
    if not listing.is_file():
        return False
    sizes = json.loads(listing.read_text())["files"]
    return all(
        (home / name).is_file() and (home / name).stat().st_size == size for name, size in sizes.items()
    )


def _make(home: Path, parameters: Parameters, workers: int) -> None:
    from dataload.tokenizer import train_tokenizer  # SentencePiece is needed only when a corpus is made

    samples, held = training_samples(parameters), heldout_samples(parameters)
    with ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(
                _draw_elsewhere if workers > 1 else draw_shard, home, prefix, number, parameters, shard
            )
            for prefix, part in (("train", samples), ("heldout", held))
            for number, shard in enumerate(_chunks(part, SAMPLES_PER_SHARD))
        ]
        # BPE makes each of these few words one piece; unigram would cut most of them up.
        texts = [text for sample in samples for text in sample.captions] + TIMES * question_texts()
        train_tokenizer(texts, home / "tokenizer.model", VOCABULARY, model_type="bpe")
        for job in jobs:
            job.result()  # raises what went wrong in it
    (home / "classes.json").write_text(json.dumps(CLASSES, indent=1) + "\n")
    write_listing(home, VERSION, parameters)


def training_samples(parameters: Parameters) -> list[Sample]:
    """Captioned pictures, no two of the same scene, with the uncaptioned ones among them in random order."""
    rng = random.Random(f"scenes train {parameters.seed}")
    scenes: dict[Scene, None] = {}
    while len(scenes) < parameters.train:
        scenes[sample_scene(rng, heldout=False)] = None
    # In training a short caption may be true of a few other pictures as well: that is what captions are like.
    described = [(scene, write_captions(scene, rng, lambda claim: True)) for scene in scenes]
    described += [(sample_scene(rng, heldout=False), []) for _ in range(parameters.uncaptioned)]
    rng.shuffle(described)
    return [Sample(number, *pair) for number, pair in enumerate(described)]


def heldout_samples(parameters: Parameters) -> list[Sample]:
    """Captioned pictures of held-out triples; each caption is true of exactly one of them."""
    rng = random.Random(f"scenes heldout {parameters.seed}")
    scenes: list[Scene] = []
    # (shape, color) -> the scenes with such an object
    showing: dict[tuple[str, str], list[Scene]] = defaultdict(list)

    def hits(claim: Claim) -> int:
        return sum(claim.true_of(scene) for scene in showing[claim.objects[0][:2]])

    while len(scenes) < parameters.heldout:
        scene = sample_scene(rng, heldout=True)
        named = {(item.shape, item.color) for item in scene.objects}
        # Neither of two scenes may hold all that the other holds, or even a full caption is true of both.
        similar = (other for pair in named for other in showing[pair])
        if not hits(claim_of(scene)) and not any(claim_of(other).true_of(scene) for other in similar):
            scenes.append(scene)
            for pair in named:
                showing[pair].append(scene)
    return [
        Sample(number, scene, write_captions(scene, rng, lambda claim: hits(claim) == 1))
        for number, scene in enumerate(scenes)
    ]


def _chunks(samples: list[Sample], length: int) -> Iterator[list[Sample]]:
    for start in range(0, len(samples), length):
        yield samples[start : start + length]


def draw_shard(
    home: Path, prefix: str, number: int, parameters: Parameters, samples: Iterable[Sample]
) -> None:
    """Draws `samples` into the one shard HOME/PREFIX-<number>.tar."""
    split = ("train", "heldout").index(prefix)
    with ShardWriter(home, prefix, max_samples=SAMPLES_PER_SHARD, first_shard=number) as writer:
        for sample in samples:
            stream = np.random.Generator(np.random.Philox(key=[parameters.seed, 2 * sample.number + split]))
            picture, masks = draw_with_masks(sample.scene, parameters.size, stream)
            image = encode_png(picture)
            words = random.Random(f"scenes {prefix} questions {parameters.seed} {sample.number}")
            facts = annotate(sample.scene, masks, sample.number, words) if sample.captions else {}
            writer.write(f"{sample.number:08d}", "png", image, sample.captions, facts)


def _draw_elsewhere(
    home: Path, prefix: str, number: int, parameters: Parameters, samples: Iterable[Sample]
) -> None:
    """`draw_shard` in a process of its own.

    A plain child and not multiprocessing, whose children import the caller's main module again: torch and all
    under train.pretrain, and an endless chain under a script without `if __name__ == "__main__"`.
    """
    job = json.dumps([str(home), prefix, number, asdict(parameters), [asdict(sample) for sample in samples]])
    run_child("dataload.scenes", job)


def run_child(module: str, job: str) -> None:
    """`_child()` of a module in a process of its own, with `job` as its standard input."""
    paths = (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", f"from {module} import _child; _child()"]
    subprocess.run(command, input=job.encode(), env=environment, check=True)


def _child() -> None:
    home, prefix, number, parameters, samples = json.loads(sys.stdin.buffer.read())
    draw_shard(Path(home), prefix, number, Parameters(**parameters), map(_sample, samples))


def _sample(record: dict[str, Any]) -> Sample:
    objects = tuple(SceneObject(**item) for item in record["scene"]["objects"])
    return Sample(record["number"], Scene(record["scene"]["background"], objects), record["captions"])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dataload.scenes", description="Make the built-in generated corpus."
    )
    parser.add_argument(
        "--output", type=Path, default=default_directory(), help="parent folder (default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=int, default=64, help="width and height in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--train", type=int, default=8000, help="captioned training pictures (default: %(default)s)"
    )
    parser.add_argument(
        "--uncaptioned", type=int, default=4000, help="uncaptioned ones (default: %(default)s)"
    )
    parser.add_argument("--heldout", type=int, default=500, help="held-out pictures (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="other seeds, other pictures (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="also write N held-out pictures as one PNG"
    )
    options = vars(parser.parse_args(arguments))
    output, show = options.pop("output"), options.pop("show")
    started = time.monotonic()
    try:
        paths = build(output, **options)
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(paths.train)} training and {len(paths.heldout)} held-out shards in {paths.tokenizer.parent}")
    print(f"({time.monotonic() - started:.1f} s; train on {paths.train[0].parent}/train-*.tar)")
    if show:
        sheet = output / f"scenes-{options['size']}px-seed{options['seed']}.png"
        contact_sheet(paths.heldout, show).save(sheet)
        print(f"contact sheet: {sheet}")
