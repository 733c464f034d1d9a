"""Pictures decoded on a GPU: `python -m bench.decoding [--step IMAGES_PER_S]`.

Shards of generated JPEGs (smooth fields with grain; 500x375 and 1000x750) through our loader, by DALI on the device and by
the CPU's decoder, and through a plain pipeline of DALI's own webdataset reader: crop while decoding, resize to 448 and 512,
flip. Each for some seconds after a warm-up. --step is what the training step takes, to which each rate is set in relation.
Needs a CUDA device for a result that counts; --device cpu walks through it.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench import machine
from bench.options import end_with, folder_path, positive_float, positive_int
from dataload.pack.writer import ShardWriter
from dataload.pipeline import Loader, LoaderConfig
from dataload.tokenizer import Tokenizer, train_tokenizer

SOURCES = ((500, 375), (1000, 750))
SIZES = (448, 512)
SCALE, RATIO = (0.5, 1.0), (0.75, 4 / 3)
WORDS = "a red dog runs near the green house under snow".split()
WARM_UP = 4  # batches


def corpus(folder: Path, width: int, height: int, count: int) -> float:
    """Shards and a tokenizer in `folder`; kB of a picture."""
    rng, size = np.random.default_rng(0), 0
    captions = [" ".join(rng.choice(WORDS, size=9)) for _ in range(count)]
    with ShardWriter(folder, "train") as out:
        for i, caption in enumerate(captions):
            small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            field = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)
            pixels = np.clip(field + rng.normal(0, 9, (height, width, 1)), 0, 255).astype(np.uint8)
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "JPEG", quality=90)
            size += data.tell()
            out.write(f"{i:06d}", "jpg", data.getvalue(), [caption])
    train_tokenizer(captions, folder / "tokenizer.model", vocab_size=280)
    return size / count / 1000


def ours(folder: Path, size: int, backend: str, device: str, batch: int, threads: int) -> Iterator[int]:
    """Pictures of each batch."""
    config = LoaderConfig(
        (str(folder),), batch, size, 64, crop_scale=SCALE, crop_ratio=RATIO, workers=threads, prefetch=2,
        backend=backend, device=device,
    )  # fmt: skip
    for made in Loader(config, Tokenizer.load(folder / "tokenizer.model")):
        yield len(made.pair_images)


def plain(folder: Path, size: int, device: str, batch: int, threads: int) -> Iterator[int]:
    """DALI alone, as its documentation has it."""
    dali: Any = importlib.import_module("nvidia.dali")
    fn, types = dali.fn, dali.types
    on_gpu = device == "cuda"
    pipeline = dali.Pipeline(
        batch_size=batch, num_threads=threads, device_id=0 if on_gpu else None, seed=0, prefetch_queue_depth=2
    )
    with pipeline:
        data = fn.readers.webdataset(
            paths=[str(path) for path in sorted(folder.glob("*.tar"))], ext=["jpg"], random_shuffle=True, initial_fill=64
        )  # fmt: skip
        images = fn.decoders.image_random_crop(
            data, device="mixed" if on_gpu else "cpu", random_area=list(SCALE), random_aspect_ratio=list(RATIO),
            output_type=types.RGB,
        )  # fmt: skip
        images = fn.resize(images, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True)
        pipeline.set_outputs(fn.flip(images, horizontal=fn.random.coin_flip()))
    pipeline.build()
    while True:
        (out,) = pipeline.run()
        yield len(out)


def rate(batches: Iterator[int], seconds: float, device: str) -> tuple[float, float]:
    """Pictures per second, and how many cores this process kept busy meanwhile."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARM_UP):
        next(batches)
    wait()
    start, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        count += next(batches)
    wait()
    wall = time.perf_counter() - start
    return count / wall, (time.process_time() - cpu) / wall


def main(arguments: Sequence[str] | None = None) -> int:
    """One line a rate, and decoding.json."""
    parser = argparse.ArgumentParser(prog="python -m bench.decoding", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=folder_path, default=Path("runs/decoding"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--step", type=positive_float, help="images/s of the training step")
    parser.add_argument("--seconds", type=positive_float, default=6.0)
    parser.add_argument("--pictures", type=positive_int, default=1024)
    parser.add_argument("--batch", type=positive_int, default=64)
    parser.add_argument("--threads", type=positive_int, default=14)
    options = parser.parse_args(arguments)
    device, few = options.device, (options.batch, options.threads)
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --device cpu walks through it")
    rows: list[dict[str, Any]] = []
    options.out.mkdir(parents=True, exist_ok=True)
    for width, height in SOURCES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            kilobytes = corpus(folder, width, height, options.pictures)
            for size in SIZES:
                makers = {
                    "our loader, DALI": partial(ours, folder, size, "dali", device, *few),
                    "our loader, CPU decoding": partial(ours, folder, size, "cpu", device, *few),
                    "plain DALI": partial(plain, folder, size, device, *few),
                }
                for label, make in makers.items():
                    row: dict[str, Any] = {
                        "source": f"{width}x{height}",
                        "kB": round(kilobytes),
                        "size": size,
                        "peer": label,
                    }
                    try:
                        row["images/s"], row["cores"] = rate(make(), options.seconds, device)
                        more = (
                            f", {row['images/s'] / options.step:.2f} times the step's" if options.step else ""
                        )
                        said = f"{row['images/s']:.0f} images/s, {row['cores']:.1f} cores{more}"
                    except Exception as error:  # the others may run
                        row["failed"] = said = f"failed: {type(error).__name__}: {error}"[:300]
                    rows.append(row)
                    print(f"{width}x{height} ({kilobytes:.0f} kB) to {size}, {label}: {said}", flush=True)
                    about = {
                        "device": machine.device_name(device),
                        "versions": machine.versions(),
                        "command": machine.command(),
                    }
                    text = json.dumps(about | {"step": options.step, "rows": rows}, indent=1)
                    (options.out / "decoding.json").write_text(text + "\n")
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    end_with(main)
