"""What the loader hands out: batches, sources, and how its threads end."""

from __future__ import annotations

import dataclasses
import io
import itertools
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import png, write_tar
from pairs import ALONE, PAIRS, config, data, equal, numbers, partly_broken, sample, take, tokenizer
from PIL import Image

from dataload.batch import IGNORE
from dataload.images import normalize
from dataload.pipeline import Batch, Loader
from dataload.tokenizer import BOS, EOS, MASK, PAD, Tokenizer

__all__ = ["data", "partly_broken", "tokenizer"]  # fixtures

ROOT = Path(__file__).resolve().parent.parent


# what a batch holds


def test_batch(data: Path, tokenizer: Tokenizer) -> None:
    with Loader(config(data), tokenizer) as loader:
        assert loader.counts == {"captioned": PAIRS, "uncaptioned": ALONE, "shards": 4}
        total_alone = 0
        for batch in itertools.islice(loader, 14):
            pairs, alone = len(batch.pair_images), len(batch.mim_images)
            total_alone += alone
            assert pairs + alone == 8 == len(batch.keys)
            assert batch.pair_images.shape == (pairs, 32, 32, 3) and batch.pair_images.dtype == torch.uint8
            assert batch.mim_images.shape == (alone, 32, 32, 3) and batch.mim_images.dtype == torch.uint8
            assert batch.mim_mask.shape == (alone, 1, 1) and batch.mim_mask.dtype == torch.bool
            for tokens in (batch.tokens, batch.mlm_tokens, batch.mlm_targets):
                assert tokens.shape == (pairs, 16) and tokens.dtype == torch.int64
            # images, texts and keys belong together
            red = [*batch.pair_images[:, 0, 0, 0].tolist(), *batch.mim_images[:, 0, 0, 0].tolist()]
            assert red == numbers(batch)
            for row, number in zip(batch.tokens.tolist(), numbers(batch), strict=False):
                assert f"picture {number} " in tokenizer.decode(row)
                end = row.index(EOS)
                assert row[0] == BOS and set(row[end + 1 :]) <= {PAD} and MASK not in row
            asked = batch.mlm_targets != IGNORE
            assert asked.any(dim=1).all() and (batch.mlm_targets[asked] == batch.tokens[asked]).all()
            assert (batch.mlm_tokens[~asked] == batch.tokens[~asked]).all()
            assert normalize(batch.pair_images).shape == (pairs, 3, 32, 32)
    assert total_alone == 14 * 8 * ALONE // (PAIRS + ALONE)


def test_flipped_pictures_have_flipped_words(data: Path, tokenizer: Tokenizer) -> None:
    flipped = Counter[bool]()
    for batch in take(Loader(config(data), tokenizer), 20):
        for image, row in zip(batch.pair_images, batch.tokens.tolist(), strict=True):
            mirrored = bool(image[0, 0, 1] > image[0, -1, 1])
            text = tokenizer.decode(row)
            flipped[mirrored] += 1
            assert ("a right word" in text or "the left side" in text) == mirrored, text
    assert 0.35 < flipped[True] / flipped.total() < 0.65
    for batch in take(Loader(config(data, flip=0.0), tokenizer), 5):
        assert (batch.pair_images[:, 0, 0, 1] < batch.pair_images[:, 0, -1, 1]).all()


def test_all_captions_of_a_picture_are_drawn(data: Path, tokenizer: Tokenizer) -> None:
    texts = {
        tokenizer.decode(row) for b in take(Loader(config(data, flip=0.0), tokenizer), 60) for row in b.tokens
    }
    of_three = {text for text in texts if "picture 3 " in text}
    assert of_three == {"picture 3 with a left word", "again picture 3 on the right side"}


def test_several_captions_per_image(data: Path, tokenizer: Tokenizer) -> None:
    for per_image in (2, 3):
        batch = take(Loader(config(data, captions_per_image=per_image), tokenizer), 1)[0]
        pairs = len(batch.pair_images)
        assert batch.tokens.shape == batch.mlm_targets.shape == (pairs * per_image, 16)
        for i, number in enumerate(numbers(batch)[:pairs]):
            rows = [
                tokenizer.decode(row) for row in batch.tokens[i * per_image : (i + 1) * per_image].tolist()
            ]
            assert all(f"picture {number} " in row for row in rows)
            assert len(set(rows)) == 2, "both captions, before one comes again"


def test_masked_words_for_a_share_of_the_captions(data: Path, tokenizer: Tokenizer) -> None:
    whole = take(Loader(config(data, captions_per_image=2), tokenizer), 2)
    part = take(Loader(config(data, captions_per_image=2, mlm_share=0.25), tokenizer), 2)
    asked = 0
    for all_rows, some in zip(whole, part, strict=True):
        assert sorted(some.keys) == sorted(all_rows.keys)
        asked += len(some.mlm_tokens)
        rows = {key: i for i, key in enumerate(all_rows.keys)}
        for i in range(len(some.mlm_tokens)):
            same = 2 * rows[some.keys[i // 2]] + i % 2
            assert torch.equal(some.tokens[i], all_rows.tokens[same])
            assert torch.equal(some.mlm_tokens[i], all_rows.mlm_tokens[same])
            assert torch.equal(some.mlm_targets[i], all_rows.mlm_targets[same])
    assert 0 < asked and abs(asked - 0.25 * sum(len(batch.tokens) for batch in whole)) <= 2


def test_which_captions_are_asked_does_not_depend_on_ranks(data: Path, tokenizer: Tokenizer) -> None:
    def asked(batches: list[Batch]) -> set[str]:
        return {key for batch in batches for key in batch.keys[: len(batch.mlm_tokens)]}

    one = take(Loader(config(data, batch_size=8, mlm_share=0.5), tokenizer), 2)
    ranks = [
        take(Loader(config(data, batch_size=4, mlm_share=0.5), tokenizer, rank=rank, world_size=2), 2)
        for rank in range(2)
    ]
    assert asked(one) == asked(ranks[0]) | asked(ranks[1]) != set()


def test_crops_differ_between_epochs_and_pictures(data: Path, tokenizer: Tokenizer) -> None:
    batches = take(Loader(config(data, flip=0.0), tokenizer), 21)
    of_seven = [
        image
        for batch in batches
        for image, n in zip(batch.pair_images, numbers(batch), strict=False)
        if n == 7
    ]
    assert len(of_seven) == 3
    assert not torch.equal(of_seven[0], of_seven[1])
    widths = {int(image[0, -1, 1]) - int(image[0, 0, 1]) for batch in batches for image in batch.pair_images}
    assert len(widths) > 10


def test_whole_pictures_without_augmentation(data: Path, tokenizer: Tokenizer) -> None:
    plain = config(data, flip=0.0, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    batch = take(Loader(plain, tokenizer), 1)[0]
    for image, number in zip(batch.pair_images, numbers(batch), strict=False):
        assert (image.numpy() == np.asarray(Image.open(io.BytesIO(png(number))))).all()
    jittered = take(Loader(dataclasses.replace(plain, color_jitter=0.4), tokenizer), 1)[0]
    assert jittered.keys == batch.keys and not torch.equal(jittered.pair_images, batch.pair_images)
    assert torch.equal(jittered.mlm_tokens, batch.mlm_tokens), "other draws are left alone"


# sources


def test_uncaptioned_pictures_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_tar(tmp_path / "u.tar", {f"{n:03d}": sample(n, captioned=False) for n in range(10)})
    batch = take(Loader(config(tmp_path), tokenizer), 1)[0]
    assert batch.pair_images.shape == (0, 32, 32, 3) and batch.tokens.shape == (0, 16)
    assert len(batch.mim_images) == 8
    with pytest.raises(ValueError, match=r"uncaptioned_fraction is 0\.5, but no sample has a caption"):
        Loader(config(tmp_path, uncaptioned_fraction=0.5), tokenizer)


def test_pairs_alone(tmp_path: Path, data: Path, tokenizer: Tokenizer) -> None:
    write_tar(tmp_path / "p.tar", {f"{n:03d}": sample(n) for n in range(10)})
    with Loader(config(tmp_path), tokenizer) as loader:
        assert loader.pairs == 8
        batch = next(loader)
    assert batch.mim_images.shape == (0, 32, 32, 3) and batch.mim_mask.shape == (0, 1, 1)
    with pytest.raises(ValueError, match="every sample has a caption"):
        Loader(config(tmp_path, uncaptioned_fraction=0.1), tokenizer)
    with Loader(config(data, uncaptioned_fraction=0.0), tokenizer) as loader:
        assert all(len(next(loader).mim_images) == 0 for _ in range(9))
    assert Loader(config(data, uncaptioned_fraction=0.25), tokenizer).pairs == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 40}, "image_size is 40; supported: multiples of 32"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"text_length": 2}, "text_length is 2"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"flip": 1.5}, "flip is 1.5; supported: 0 to 1"),
        ({"interpolation": "lanczos"}, "'lanczos'; supported: bilinear, bicubic"),
        ({"uncaptioned_fraction": 2.0}, "uncaptioned_fraction"),
        ({"seed": -1}, "seed is -1"),
        ({"workers": -1}, "workers is -1"),
        ({"shards": ("nowhere.tar",)}, "no shard at nowhere.tar$"),
        ({"shards": ("gone/*.tar",)}, r"no shard at gone/\*.tar: there is no folder /.*gone$"),
    ],
)
def test_impossible_settings(data: Path, tokenizer: Tokenizer, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Loader(config(data, **changes), tokenizer)


def test_impossible_ranks(data: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="rank is 2 of world_size 2"):
        Loader(config(data), tokenizer, rank=2, world_size=2)


# threads


def test_errors_of_workers_are_raised_and_nothing_is_skipped(
    data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = take(Loader(config(data), tokenizer), 3)
    with Loader(config(data), tokenizer) as loader:
        next(loader)
        with monkeypatch.context() as patch:
            patch.setattr("dataload.samples.mlm_mask", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                for _ in range(9):
                    next(loader)
            done = loader.state_dict()["batches"]
        assert 1 <= done <= 1 + loader.config.prefetch
        loader.load_state_dict({**loader.state_dict(), "captioned": 0, "uncaptioned": 0, "batches": 0})
        assert all(equal(next(loader), batch) for batch in expected)


def test_closing(data: Path, tokenizer: Tokenizer) -> None:
    before = threading.active_count()
    loader = Loader(config(data, workers=4), tokenizer)
    next(loader)
    assert threading.active_count() > before
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    assert loader.state_dict()["batches"] == 1


SCRIPT = """
import atexit, os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
decoded = []
atexit.register(lambda: print(len(decoded), "decoded in the end", flush=True))  # the first is run last

from dataload import images
from dataload.pipeline import Loader, LoaderConfig
from dataload.tokenizer import Tokenizer

decode = images.decode_array
images.decode_array = lambda *arguments: decoded.append(1) or decode(*arguments)
config = LoaderConfig((sys.argv[1],), batch_size=64, image_size=448, text_length=16, workers=2, prefetch=64)
loader = Loader(config, Tokenizer.load(sys.argv[2]))
next(loader)
if sys.argv[3] == "fork":
    child = os.fork()
    if child == 0:
        os.write(1, repr(next(loader).keys).encode() + b"\\n")
        os._exit(0)
    os.waitpid(child, 0)
    os.write(1, repr(next(loader).keys).encode() + b"\\n")
try:
    print("ready", flush=True)
    while sys.argv[3] == "interrupt":
        next(loader)
finally:
    print(len(decoded), "decoded", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs os.fork and signals")
@pytest.mark.parametrize("case", ["fork", "interrupt"])
def test_processes_fork_and_end(data: Path, tokenizer: Tokenizer, tmp_path: Path, case: str) -> None:
    """A forked process goes on by itself. And a process ends at once, whether its script ends or Ctrl-C
    comes: the 4,096 pictures that wait in the pool are not decoded first."""
    tokenizer.save(tmp_path / "t.model")
    command = [sys.executable, "-c", SCRIPT, str(data), str(tmp_path / "t.model"), case]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            lines = list(itertools.takewhile(lambda line: line != "ready\n", process.stdout))
            if case == "interrupt":
                process.send_signal(signal.SIGINT)
            output, errors = process.stdout.read(), process.stderr.read()
            process.wait(timeout=60)
        finally:
            process.kill()
    before, after = (int(line.split()[0]) for line in output.splitlines())
    assert 64 <= before <= after < before + 100
    if case == "fork":
        assert process.returncode == 0, errors
        assert len(lines) == 2 and lines[0] == lines[1]
    else:
        assert process.returncode == -signal.SIGINT and errors.endswith("KeyboardInterrupt\n"), errors
