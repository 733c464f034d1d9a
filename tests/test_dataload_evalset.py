"""Held-out pictures: each once, in order, with all of its captions; what is broken or stuck is named."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import write_tar
from pairs import ALONE, PAIRS, data, partly_broken, sample, tokenizer
from PIL import Image

from dataload import images, workers
from dataload.multimodal import ImageConfig, MixtureConfig, PairSet, SourceConfig, TextConfig
from dataload.pipeline import EvalSet
from dataload.prefetch import Limits, WorkerStuck
from dataload.tokenizer import Tokenizer

__all__ = ["data", "partly_broken", "tokenizer"]  # fixtures


def eval_keys(batches: Iterator[Any]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def test_eval_set(data: Path, tokenizer: Tokenizer) -> None:
    subset = EvalSet((str(data),), tokenizer, 64, 16, batch_size=7)
    assert len(subset) == PAIRS and subset.uncaptioned == ALONE
    batches = list(subset)
    assert [len(batch.keys) for batch in batches] == [7] * 5 + [5]
    assert eval_keys(iter(batches)) == [
        f"train-{shard}/{n:03d}" for shard in range(4) for n in range(shard, PAIRS, 4)
    ]
    for batch in batches:
        assert batch.images.shape == (len(batch.keys), 64, 64, 3) and batch.images.dtype == torch.uint8
        assert batch.images[:, 0, 0, 0].tolist() == [int(key.split("/")[1]) for key in batch.keys]
        assert batch.image_of_caption.tolist() == [i for i in range(len(batch.keys)) for _ in range(2)]
        flat = [text for texts in batch.captions for text in texts]
        assert torch.equal(batch.tokens, tokenizer.encode_batch(flat, 16))
        for key, texts in zip(batch.keys, batch.captions, strict=True):
            n = int(key.split("/")[1])
            assert texts == [f"picture {n} with a left word", f"again picture {n} on the right side"]
    again = list(subset)
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, again, strict=True))


def test_several_views_of_each_picture_in_both_kinds_of_sets(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (2, 40, 56, 3), np.uint8)
    samples = {}
    for name, picture in zip("ab", pixels, strict=True):
        Image.fromarray(picture).save(buffer := io.BytesIO(), "PNG")
        samples[name] = {"png": buffer.getvalue(), "txt": b"a picture"}
    write_tar(tmp_path / "val-000000.tar", samples)
    subset = EvalSet((str(tmp_path),), tokenizer, 32, 16)
    (plain,), (several,) = subset, subset.batches(5)
    assert plain.crops is None and several.crops is not None and several.crops.shape == (2, 4, 32, 32, 3)
    assert torch.equal(plain.images, several.images)
    for made, picture in zip(several.crops, pixels, strict=True):
        assert np.array_equal(made, images.views(Image.fromarray(picture), 32, 5)[1:])

    source = SourceConfig((str(tmp_path),), modalities=("image", "text"), needs=("image", "text"))
    config = MixtureConfig({"pairs": source}, 1, image=ImageConfig(32, "bilinear"), text=TextConfig(16))
    pairs = PairSet("image-text", source, config, tokenizer)
    (alone,), (pair,) = pairs.first(2), pairs.first(2, views=5)
    assert alone.crops is None and pair.crops is not None
    for made, picture in zip(
        pair.crops, pixels, strict=True
    ):  # of the square by itself: no pixel beside it is seen
        square = Image.fromarray(np.ascontiguousarray(picture[:, 8:48]))
        assert np.array_equal(made, images.views(square, 32, 5)[1:])
    assert torch.equal(pair.media.images, alone.media.images)


def test_eval_set_reports_broken_pictures_and_leaves_them_out(
    partly_broken: Path, tokenizer: Tokenizer
) -> None:
    subset = EvalSet((str(partly_broken),), tokenizer, 32, 16)
    for _ in range(2):
        assert len(eval_keys(iter(subset))) == PAIRS - 2
    assert [broken.key for broken in subset.broken] == ["005", "017"]


def test_eval_set_needs_captions_and_can_be_left_half_way(
    data: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    before = threading.active_count()
    for _ in EvalSet((str(data),), tokenizer, 32, 16, batch_size=4):
        break
    assert threading.active_count() == before
    write_tar(tmp_path / "u.tar", {"0": sample(0, captioned=False)})
    with pytest.raises(ValueError, match="no sample of .* has a caption"):
        EvalSet((str(tmp_path),), tokenizer, 32, 16)


def test_captions_that_cannot_be_fetched(
    data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    subset = EvalSet((str(data),), tokenizer, 32, 16)
    fetch = subset.index.captions

    def fails(number: int) -> list[str]:
        if number == 3:
            raise OSError("the server hung up")
        return fetch(number)

    monkeypatch.setattr(subset.index, "captions", fails)
    assert len(eval_keys(iter(subset))) == PAIRS - 1
    assert [broken.reason for broken in subset.broken] == ["the server hung up"]


def test_a_picture_that_never_comes(
    data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_PATIENCE", 0.1)
    subset = EvalSet((str(data),), tokenizer, 32, 16, limits=Limits(warn=30, stop=0.2))
    released = threading.Event()
    monkeypatch.setattr(subset.index, "image", lambda _: released.wait(60) and b"")
    with pytest.raises(WorkerStuck, match=r"stall_limit is 0\.2.*reading 000 of .*train-0"):
        list(subset)
    released.set()
