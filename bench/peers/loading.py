"""The loader: decoded, cropped, tokenised pairs per second and core, beside webdataset with torchvision's transforms.

Both decode in the calling thread: what is compared is the work per picture, and a worker of either would only do
the same elsewhere. Photographs are made here (smooth random fields of 500 x 375, JPEG quality 90), so that it runs
without data. The check before the clock: a picture resized and cropped for evaluation equals Pillow's own
`ImageOps.fit` to one level, and no training batch is short.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import measure
from bench.record import Accuracy, Row
from bench.subject import Absent, pair_rows, worst

MISSING = ""  # why nothing here can run: a GPU machine may lack what the loader needs, and times its kernels
try:
    from PIL import Image, ImageOps

    from dataload.evalset import EvalSet
    from dataload.pack.writer import ShardWriter
    from dataload.pipeline import Loader, LoaderConfig
    from dataload.tokenizer import Tokenizer, train_tokenizer
except ImportError as error:
    MISSING = f"{error.name} is not installed"

LOADER = "loader"
PICTURES, WIDTH, HEIGHT = 128, 500, 375
CROP, RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
WORDS = "a the small large red green blue dog cat bird horse child runs sleeps jumps near under beside grass water snow".split()


@dataclass(frozen=True)
class LoaderCase:
    """Batches of `batch` pictures of `size` x `size` pixels with captions of `length` tokens."""

    batch: int
    size: int
    length: int

    @property
    def name(self) -> str:
        """ "jpeg-500x375-to-224"."""
        return f"jpeg-{WIDTH}x{HEIGHT}-to-{self.size}"

    @property
    def shape(self) -> str:
        """For readers."""
        return f"{self.batch} JPEGs of {WIDTH}x{HEIGHT}, random crop to {self.size}x{self.size}, flip, {self.length} tokens"


@dataclass(frozen=True)
class Corpus:
    """Where the shards are, and their tokenizer."""

    folder: Path
    shards: tuple[str, ...]
    tokenizer: Tokenizer
    pictures: tuple[Image.Image, ...]  # decoded by Pillow


@cache
def corpus() -> Corpus:
    """Made once per process, in a folder that goes with the process."""
    holder = tempfile.TemporaryDirectory(prefix="auroraio-bench-")
    _HOLDERS.append(holder)
    folder = Path(holder.name)
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.choice(WORDS, size=9)) for _ in range(5 * PICTURES)]
    pictures = []
    with ShardWriter(folder, "train") as writer:
        for i in range(PICTURES):
            jpeg = _jpeg(rng)
            pictures.append(Image.open(io.BytesIO(jpeg)).convert("RGB"))
            writer.write(f"{i:06d}", "jpg", jpeg, captions[5 * i : 5 * i + 5])
    tokenizer = train_tokenizer(captions, folder / "tokenizer.model", vocab_size=400)
    return Corpus(folder, tuple(map(str, writer.shards)), tokenizer, tuple(pictures))


_HOLDERS: list[Any] = []  # temporary folders live as long as the process


def _jpeg(rng: np.random.Generator) -> bytes:
    """A smooth random field with some grain: about as hard to decode as a photograph."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    field = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32)
    grain = rng.normal(0, 12, field.shape)
    out = io.BytesIO()
    Image.fromarray(np.clip(field + grain, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def _ours(case: LoaderCase) -> Iterator[int]:
    """Number of pictures in each batch of the training loader, without end."""
    config = LoaderConfig(
        corpus().shards, case.batch, case.size, case.length, crop_scale=CROP, crop_ratio=RATIO,
        uncaptioned_fraction=0.0, workers=0,
    )  # fmt: skip
    for batch in Loader(config, corpus().tokenizer):
        yield len(batch.pair_images)


def _webdataset(case: LoaderCase) -> Iterator[int]:
    """The same work by webdataset, Pillow and torchvision."""
    try:
        import webdataset
        from torchvision.transforms import v2
    except ImportError as error:
        raise Absent(f"webdataset or torchvision is not installed ({error})") from None
    tokenizer = corpus().tokenizer
    crop = v2.Compose([
        v2.RandomResizedCrop(case.size, scale=CROP, ratio=RATIO, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()
    ])  # fmt: skip

    def prepare(sample: tuple[Image.Image, dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        caption = sample[1]["captions"][int(torch.randint(5, ()))]
        return crop(sample[0]), torch.from_numpy(tokenizer.row(tokenizer.encode(caption), case.length))

    data = webdataset.WebDataset(list(corpus().shards), shardshuffle=False, empty_check=False).repeat()
    pairs = data.decode("pilrgb").to_tuple("jpg", "json").map(prepare)

    def batches() -> Iterator[int]:
        waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        for pair in pairs:
            waiting.append(pair)
            if len(waiting) == case.batch:
                images = torch.stack([image for image, _ in waiting])
                torch.stack([tokens for _, tokens in waiting])
                waiting.clear()
                yield len(images)

    return batches()


PEERS: dict[str, Callable[[LoaderCase], Iterator[int]]] = {"auroraio": _ours, "webdataset": _webdataset}


def check(case: LoaderCase) -> Accuracy:
    """The evaluation pictures of this project's reader against Pillow's `ImageOps.fit`, in levels of 255; one level is
    allowed."""
    square, resample = (case.size, case.size), Image.Resampling.BILINEAR
    mine = torch.cat(
        [batch.images for batch in EvalSet(corpus().shards, corpus().tokenizer, case.size, case.length)]
    )
    theirs = np.stack([np.asarray(ImageOps.fit(p, square, resample)) for p in corpus().pictures])
    error = mine.numpy().astype(np.int32) - theirs
    return Accuracy(
        "out", float(np.abs(error).max()), 1.0, float(np.sqrt((error**2).mean()) / theirs.std()), 5e-3
    )


def solve(
    case: LoaderCase, *, budget: float, peers: Collection[str] | None = None, clock: str = "auto"
) -> list[Row]:
    """Rows of both loaders; see bench.subject.solve."""

    def bare(name: str) -> Row:
        return Row(
            LOADER, case.name, "load", name, "uint8", case.shape, name == "auroraio", "absent", MISSING,
            items=case.batch, unit="images",
        )  # fmt: skip

    rows = [bare(name) for name in PEERS if peers is None or name in peers]
    if MISSING:
        return rows
    accuracy = check(case)
    running: dict[str, Iterator[int]] = {}
    for place, row in enumerate(rows):
        row = replace(row, status="ok", accuracy=(accuracy,) if row.ours else ())
        row = replace(row, status="wrong", note=worst([accuracy])) if row.ours and not accuracy.good else row
        if row.status == "ok":
            try:
                running[row.peer] = PEERS[row.peer](case)
                if next(running[row.peer]) != case.batch:
                    row = replace(row, status="wrong", note="a batch is short")
            except Absent as why:
                row = replace(row, status="absent", note=str(why))
            except Exception as error:  # a peer that breaks is a result too
                row = replace(row, status="failed", note=f"{type(error).__name__}: {error}"[:400])
        rows[place] = row
    able = [row.peer for row in rows if row.status == "ok"]
    calls = {name: [lambda name=name: next(running[name])] for name in able}
    timed = measure.interleave(calls, device="cpu", budget=budget, clock=clock) if calls else {}
    return pair_rows([_timed(row, timed) for row in rows])


def _timed(row: Row, timed: dict[str, tuple[str, tuple[float, ...]]]) -> Row:
    if row.peer not in timed:
        return row
    clock, seconds = timed[row.peer]
    return replace(row, clock=clock, seconds=seconds)
