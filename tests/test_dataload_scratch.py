from __future__ import annotations

import gc
import io
import mmap
import os
import platform
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataload.pack.writer import ShardWriter
from dataload.pipeline import Loader, LoaderConfig
from dataload.scratch import Recycled, scratch
from dataload.tokenizer import train_tokenizer


def test_large_buffers_are_not_kept() -> None:
    assert np.shares_memory(scratch("test", 100), scratch("test", 50))
    assert not np.shares_memory(scratch("test", 40 << 20), scratch("test", 40 << 20))


FAULTS = """
import resource, sys
import numpy as np
if sys.argv[1]:
    __import__(sys.argv[1])
def decode():
    return sum(len(part) for part in [np.ones(1 << 19, np.uint8) for _ in range(4)])
decode()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    decode()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="needs glibc: it alone is told to keep what was freed"
)
def test_decoders_use_freed_memory_again() -> None:
    def faults(imported: str, **environment: str) -> float:
        """Pages from the kernel over those that are used."""
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, imported],
            env=os.environ | environment,
            capture_output=True,
            check=True,
        )
        return int(done.stdout) / (10 * 4 * (1 << 19) / mmap.PAGESIZE)

    assert faults("dataload.decode") < 0.1
    assert faults("") > 0.5
    assert faults("dataload.decode", MALLOC_MMAP_THRESHOLD_=str(1 << 18)) > 0.5  # what the user says counts


HOLDS: dict[str, Callable[[torch.Tensor], object]] = {
    "itself": lambda tensor: tensor,
    "a part": lambda tensor: tensor[1:, :2],
    "a view": lambda tensor: tensor.view(torch.int32),
    "its storage": lambda tensor: tensor.untyped_storage(),
    "detached": lambda tensor: tensor.detach(),
    "numpy's": lambda tensor: tensor.numpy(),
    "a part of numpy's": lambda tensor: tensor.numpy()[1],
    "an iterator": lambda tensor: iter(tensor.numpy()),
    "a buffer": lambda tensor: memoryview(tensor.numpy()),
    "by dlpack": lambda tensor: np.from_dlpack(tensor),
}


@pytest.mark.parametrize("hold", HOLDS)
def test_memory_comes_back_when_nothing_refers_to_it(hold: str) -> None:
    memory = Recycled(2)
    first = memory.empty(3, 4, 8)
    assert first.shape == (3, 4, 8) and first.dtype == torch.uint8 and first.is_contiguous()
    place = first.data_ptr()
    held = HOLDS[hold](first)
    del first
    other = memory.empty(3, 4, 8)
    assert other.data_ptr() != place
    del other
    del held
    gc.collect()
    again = [memory.empty(3, 4, 8), memory.empty(3, 4, 8)]
    assert place in [tensor.data_ptr() for tensor in again]


def test_another_size_gets_other_memory() -> None:
    memory = Recycled(2)
    memory.empty(8)
    assert memory.empty(4, 3).shape == (4, 3)
    assert memory.empty(0, 3).shape == (0, 3)


def test_no_more_is_kept_than_wanted() -> None:
    memory = Recycled(2)
    many = [memory.empty(1000) for _ in range(5)]
    assert len({tensor.data_ptr() for tensor in many}) == 5
    del many
    assert memory.kept == 2


def test_what_is_held_holds_nothing_else() -> None:
    memory = Recycled(4)
    held, dropped = memory.empty(100), [memory.empty(50), memory.empty(50)]
    dropped.clear()
    there = weakref.ref(memory)
    assert memory.kept == 2
    del memory
    assert there() is None and held.shape == (100,)


def test_a_closed_one_keeps_nothing() -> None:
    memory = Recycled(4)
    held, dropped = memory.empty(100), memory.empty(100)
    del dropped
    assert memory.kept == 1
    memory.close()
    assert memory.kept == 0
    del held
    assert memory.kept == 0


def test_threads_never_share() -> None:
    """Each writes its number, lets the others write, and finds it again."""
    memory, wrong = Recycled(3), []

    def use(number: int) -> None:
        for _ in range(300):
            tensor = memory.empty(2000)
            tensor.fill_(number)
            if not bool((tensor == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 1 <= memory.kept <= 3


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_batches_that_are_kept_stay_as_they_are(backend: str, tmp_path: Path) -> None:
    """Batches that all are kept are those that are dropped one by one; the latter stand in few places of memory."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI: pip install 'auroraio[gpu]'")
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path, "train") as writer:
        for i in range(24):
            jpeg = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(jpeg, "JPEG")
            writer.write(f"{i:06d}", "jpg", jpeg.getvalue(), [f"picture {i} of noise"])
    tokenizer = train_tokenizer([f"picture {i} of noise" for i in range(24)], tmp_path / "t.model", 300)
    config = LoaderConfig((str(tmp_path),), 4, 64, 16, prefetch=2, backend=backend, device="cpu")

    loader = Loader(config, tokenizer)
    kept = list(islice(loader, 20))
    loader.close()
    assert len({batch.pair_images.data_ptr() for batch in kept}) == 20
    loader, places = Loader(config, tokenizer), set()
    for batch, made in zip(kept, loader, strict=False):
        places.add(made.pair_images.data_ptr())
        assert torch.equal(made.pair_images, batch.pair_images) and made.keys == batch.keys
        del made
    loader.close()
    assert len(places) <= 5  # two ahead, the one that is made, the reader's, and one while hands change
