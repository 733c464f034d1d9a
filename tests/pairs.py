"""Pairs and pictures alone whose number is their key, and loaders of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import png, write_tar

from dataload.pipeline import Batch, Loader, LoaderConfig
from dataload.tokenizer import Tokenizer, train_tokenizer

PAIRS, ALONE = 40, 16


def sample(number: int, captioned: bool = True) -> dict[str, bytes]:
    files = {"png": png(number)}
    if captioned:
        captions = [f"picture {number} with a left word", f"again picture {number} on the right side"]
        files["json"] = json.dumps({"captions": captions}).encode()
    return files


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards with 40 pairs and 16 pictures alone; the number of a sample is its key."""
    folder = tmp_path_factory.mktemp("data")
    for shard in range(4):
        numbers = range(shard, PAIRS + ALONE, 4)
        write_tar(folder / f"train-{shard}.tar", {f"{n:03d}": sample(n, n < PAIRS) for n in numbers})
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [f"again picture {n} on the right left side with a word" for n in range(100)]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "t.model", 400, model_type="bpe")


def config(data: Path, **changes: Any) -> LoaderConfig:
    plain = LoaderConfig((str(data),), batch_size=8, image_size=32, text_length=16, crop_scale=(0.6, 1.0))
    return dataclasses.replace(plain, **changes)


def take(loader: Loader, count: int) -> list[Batch]:
    with loader:
        return list(itertools.islice(loader, count))


def equal(first: Batch, second: Batch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in ((getattr(first, f.name), getattr(second, f.name)) for f in dataclasses.fields(Batch))
    )


def numbers(batch: Batch) -> list[int]:
    return [int(key.split("/")[1]) for key in batch.keys]


@pytest.fixture
def partly_broken(tmp_path: Path) -> Path:
    """40 pairs and 16 pictures alone, of which 2 pairs and 1 picture are broken."""
    samples = {f"{n:03d}": sample(n, n < PAIRS) for n in range(PAIRS + ALONE)}
    samples["005"]["png"] = png(5)[:60]
    samples["017"]["png"] = b""
    samples["050"]["png"] = b"no picture"
    write_tar(tmp_path / "b.tar", samples)
    return tmp_path
