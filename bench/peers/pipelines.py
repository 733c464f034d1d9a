"""Whole image pipelines: pictures per CPU-second from JPEGs in tar shards, each in a process of its own.

What is counted is the CPU time of a pipeline's process and of all its children, over batches consumed, queues refilled:
threads, workers and whatever is prefetched count for the pipeline that they belong to, and other work on the machine does
not. Pipelines take turns, in rounds of a few batches.

Ours are the whole training loader: own order, exact resume, broken samples replaced, captions tokenised and masked. The
others do pictures alone. Photographs are made here: smooth random fields with grain, 640 x 480, JPEG quality 90, 122 KB.
"""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.importing import make_torchvision_importable
from bench.record import Row
from bench.subject import Absent, pair_rows

PIPELINE = "image_pipeline"
PICTURES, WIDTH, HEIGHT = 128, 640, 480
CROP, RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
THREADS = 2
BATCHES = 3  # a round
ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class PipelineCase:
    """Batches of `batch` pictures of `size` x `size` pixels."""

    batch: int
    size: int

    @property
    def name(self) -> str:
        """ "jpeg-640x480-to-448"."""
        return f"jpeg-{WIDTH}x{HEIGHT}-to-{self.size}"

    @property
    def shape(self) -> str:
        """For readers."""
        return f"{self.batch} JPEGs of {WIDTH}x{HEIGHT}, random crop to {self.size}x{self.size}, flip, uint8"


def make_corpus(folder: Path) -> None:
    """One tar of JPEGs with a caption each, the same JPEGs as files, and a tokenizer."""
    import numpy as np
    from PIL import Image

    from dataload.pack.writer import ShardWriter
    from dataload.tokenizer import train_tokenizer

    rng = np.random.default_rng(0)
    words = "a small large red green dog cat bird runs sleeps near under beside grass water snow".split()
    captions = [" ".join(rng.choice(words, size=9)) for _ in range(PICTURES)]
    (folder / "files").mkdir()
    with ShardWriter(folder, "train") as writer:
        for i, caption in enumerate(captions):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            field = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32)
            grain = rng.normal(0, 9, (HEIGHT, WIDTH, 1)) + rng.normal(0, 4, field.shape)
            out = io.BytesIO()
            Image.fromarray(np.clip(field + grain, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
            writer.write(f"{i:06d}", "jpg", out.getvalue(), [caption])
            (folder / "files" / f"{i:06d}.jpg").write_bytes(out.getvalue())
    train_tokenizer(captions, folder / "tokenizer.model", vocab_size=300)


def _ours(backend: str) -> Callable[[Path, int, int], Iterator[int]]:
    def batches(folder: Path, batch: int, size: int) -> Iterator[int]:
        from dataload.pipeline import Loader, LoaderConfig
        from dataload.tokenizer import Tokenizer

        config = LoaderConfig(
            (str(folder),), batch, size, 64, crop_scale=CROP, crop_ratio=RATIO, workers=THREADS, prefetch=2,
            backend=backend, device="cpu",
        )  # fmt: skip
        for made in Loader(config, Tokenizer.load(folder / "tokenizer.model")):
            yield len(made.pair_images)

    return batches


def _crop(size: int) -> Any:
    from torchvision.transforms import v2

    return v2.Compose([
        v2.RandomResizedCrop(size, scale=CROP, ratio=RATIO, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()
    ])  # fmt: skip


def _webdataset(folder: Path, batch: int, size: int) -> Iterator[int]:
    """webdataset's own loader, Pillow, torchvision's transforms on Pillow's pictures."""
    import torch
    import webdataset

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = (
        webdataset.WebDataset(shards, shardshuffle=False, empty_check=False, nodesplitter=None)
        .shuffle(64)
        .repeat()
    )
    crop = _crop(size)
    pictures = (
        data.decode("pilrgb")
        .to_tuple("jpg")
        .map(lambda sample: crop(sample[0]))
        .batched(batch, collation_fn=torch.stack)
    )
    for images in webdataset.WebLoader(pictures, batch_size=None, num_workers=0):
        yield len(images)


class _Files:
    """A torch dataset of JPEG files, as torchvision's ImageFolder reads them."""

    def __init__(self, folder: Path, size: int) -> None:
        self.paths = sorted((folder / "files").glob("*.jpg"))
        self.crop = _crop(size)

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, i: int) -> Any:
        from PIL import Image

        with Image.open(self.paths[i % len(self.paths)]) as image:
            return self.crop(image.convert("RGB"))


def _torchvision(folder: Path, batch: int, size: int) -> Iterator[int]:
    """torch's DataLoader with workers, Pillow, torchvision's transforms."""
    import torch

    data: Any = _Files(folder, size)
    loader = torch.utils.data.DataLoader(
        data, batch_size=batch, shuffle=False, num_workers=THREADS, prefetch_factor=2
    )
    for images in loader:
        yield len(images)


def _dali(folder: Path, batch: int, size: int) -> Iterator[int]:
    """DALI's own webdataset reader and operators, uint8 out, copied into torch's memory."""
    import torch
    from nvidia import dali
    from nvidia.dali.plugin.pytorch import feed_ndarray

    nv: Any = dali
    pipeline = nv.Pipeline(batch_size=batch, num_threads=THREADS, device_id=None, seed=0)
    with pipeline:
        jpegs = nv.fn.readers.webdataset(
            paths=[str(path) for path in sorted(folder.glob("*.tar"))], ext=["jpg"], random_shuffle=True, initial_fill=64,
        )  # fmt: skip
        images = nv.fn.decoders.image_random_crop(
            jpegs, random_area=list(CROP), random_aspect_ratio=list(RATIO), output_type=nv.types.RGB
        )
        images = nv.fn.resize(images, size=(size, size), interp_type=nv.types.INTERP_LINEAR, antialias=True)
        pipeline.set_outputs(nv.fn.flip(images, horizontal=nv.fn.random.coin_flip()))
    pipeline.build()
    while True:
        (made,) = pipeline.run()
        yield len(feed_ndarray(made.as_tensor(), torch.empty((batch, size, size, 3), dtype=torch.uint8)))


PEERS: dict[str, Callable[[Path, int, int], Iterator[int]]] = {
    "auroraio": _ours("cpu"),
    "auroraio-dali": _ours("dali"),
    "webdataset": _webdataset,
    "torchvision": _torchvision,
    "dali": _dali,
}
OURS = ("auroraio", "auroraio-dali")


class Runner:
    """A pipeline in a process of its own."""

    def __init__(self, peer: str, case: PipelineCase, folder: Path) -> None:
        command = [sys.executable, "-m", __name__, peer, str(folder), str(case.batch), str(case.size)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=environment,
        )  # fmt: skip
        self.before = self._ask()

    def __call__(self) -> float:
        """CPU seconds per batch over one round."""
        now = self._ask()
        taken, self.before = now - self.before, now
        return taken / BATCHES

    def _ask(self) -> float:
        assert self.process.stdin and self.process.stdout and self.process.stderr
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line.startswith("cpu "):
            self.process.kill()
            errors = self.process.stderr.read().strip().splitlines()
            reason = errors[-1] if errors else "it ended"
            raise Absent(reason) if "Error" in reason and "No module" in reason else RuntimeError(reason)
        return float(line.split()[1])

    def close(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream:
                stream.close()


def solve(
    case: PipelineCase, *, budget: float, peers: Collection[str] | None = None, fewest: int = 5
) -> list[Row]:
    """Rows of all pipelines (or of those that are named), in turns for some `budget` seconds, at least `fewest` rounds."""
    rows = {
        name: Row(
            PIPELINE, case.name, "load", name, "uint8", case.shape, name in OURS, "ok", items=case.batch,
            unit="images", clock="tree",
        )
        for name in PEERS
        if peers is None or name in peers
    }  # fmt: skip
    runners: dict[str, Runner] = {}
    with tempfile.TemporaryDirectory(prefix="auroraio-bench-") as folder:
        try:
            try:
                make_corpus(Path(folder))
            except (
                ImportError
            ) as error:  # a GPU machine may lack what the loader needs, and times its kernels
                missing = f"{error.name} is not installed"
                return [replace(row, status="absent", note=missing) for row in rows.values()]
            for name in rows:
                try:
                    runners[name] = Runner(name, case, Path(folder))
                except Absent as why:
                    rows[name] = replace(rows[name], status="absent", note=str(why))
                except RuntimeError as error:
                    rows[name] = replace(rows[name], status="failed", note=str(error)[:400])
            taken: dict[str, list[float]] = {name: [] for name in runners}
            order, rng, start = list(runners), random.Random(0), time.monotonic()
            while order and (len(taken[order[0]]) < fewest or time.monotonic() - start < budget):
                rng.shuffle(order)
                for name in order:
                    taken[name].append(runners[name]())
            rows |= {name: replace(rows[name], seconds=tuple(each)) for name, each in taken.items()}
        finally:
            for runner in runners.values():
                runner.close()
    return pair_rows(list(rows.values()))


def tree_seconds() -> float:
    """CPU seconds of this process and of its children that are alive (Linux: /proc)."""
    ticks, waiting, total = os.sysconf("SC_CLK_TCK"), [os.getpid()], time.process_time()
    while waiting:
        pid = waiting.pop()
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                waiting += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
            if pid != os.getpid():
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / ticks
        except OSError:  # it ended meanwhile, or this is not Linux
            continue
    return total


def main() -> None:
    """The child: a round for each line that comes in; then, when the queues are full again, its CPU seconds so far."""
    peer, folder, batch, size = sys.argv[1:]
    kept = make_torchvision_importable()
    batches = PEERS[peer](Path(folder), int(batch), int(size))
    for _ in sys.stdin:
        for _ in range(BATCHES):
            if next(batches) != int(batch):
                raise ValueError("a batch is short")
        now = -1.0
        while tree_seconds() - now > 0.005:
            now = tree_seconds()
            time.sleep(0.2)
        print("cpu", tree_seconds(), flush=True)
    del kept


if __name__ == "__main__":
    main()
