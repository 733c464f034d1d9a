from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import itertools
import json
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dataload import backends, images
from dataload.images import Picture
from dataload.pipeline import Batch, Loader, LoaderConfig
from dataload.samples import View
from dataload.tokenizer import Tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
needs_dali = pytest.mark.skipif(
    not backends._installed("nvidia.dali"), reason="needs NVIDIA DALI: pip install 'auroraio[gpu]'"
)
PAIRS, ALONE = 24, 8
CPU = torch.device("cpu")


def photo(number: int, width: int = 90, height: int = 70) -> Image.Image:
    """Smooth, with some grain; each number another one."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    field = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    return Image.fromarray(np.clip(field + rng.normal(0, 6, field.shape), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def exif(orientation: int) -> Image.Exif:
    result = Image.Exif()
    result[0x0112] = orientation
    return result


def formats() -> list[tuple[str, bytes]]:
    """Each is a sample: what DALI takes, and what it does not."""
    plain = photo(0)
    jpegs = [("jpg", encoded(photo(i), quality=90, exif=exif(i % 8 + 1))) for i in range(PAIRS + ALONE - 12)]
    return jpegs + [
        ("jpg", encoded(plain.convert("L"))),
        ("jpg", encoded(plain.convert("CMYK"))),
        ("jpg", encoded(plain, progressive=True, subsampling=0)),
        ("jpg", encoded(plain) + b"\0" * 9),
        ("jpg", encoded(plain, "MPO", save_all=True, append_images=[photo(1)])),
        ("png", encoded(plain.convert("RGBA"), "PNG")),
        ("png", encoded(Image.fromarray(np.arange(6400, dtype=np.uint16).reshape(80, 80) * 9), "PNG")),
        ("gif", encoded(plain, "GIF", save_all=True, append_images=[photo(2)])),
        ("webp", encoded(plain, "WEBP")),
        ("bmp", encoded(plain, "BMP")),
        ("tif", encoded(plain, "TIFF")),
        ("jpg", encoded(photo(9, 40, 200))),
    ]


def write(path: Path, pictures: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, (kind, data) in enumerate(pictures):
            files = {kind: data} | (
                {} if number % 4 == 3 else {"txt": f"picture {number} on the left".encode()}
            )
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{number:03d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, 24 pairs and 8 pictures alone, in every format."""
    folder = tmp_path_factory.mktemp("formats")
    pictures = formats()
    write(folder / "a.tar", pictures[:16])
    write(folder / "b.tar", pictures[16:])
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [f"picture {n} on the left or right" for n in range(100)]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "t.model", 400, model_type="bpe")


def config(data: Path, backend: str, **changes: Any) -> LoaderConfig:
    plain = LoaderConfig(
        (str(data),), batch_size=8, image_size=64, text_length=16, backend=backend, device="cpu"
    )
    return dataclasses.replace(plain, **changes)


def take(loader: Loader, count: int) -> list[Batch]:
    with loader:
        return list(itertools.islice(loader, count))


def assert_equal(ours: Sequence[Batch], theirs: Sequence[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys == b.keys
        for field in dataclasses.fields(Batch):
            if field.name != "keys":
                assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


@needs_dali
@pytest.mark.parametrize(
    "changes",
    [{}, {"interpolation": "bicubic", "color_jitter": 0.3}, {"workers": 0, "captions_per_image": 2}],
)
def test_both_backends_give_the_same_batches(
    data: Path, tokenizer: Tokenizer, changes: dict[str, Any]
) -> None:
    with Loader(config(data, "dali"), tokenizer) as loader:
        assert loader.backend == "dali (cpu)"
    assert_equal(
        take(Loader(config(data, "dali", **changes), tokenizer), 8),
        take(Loader(config(data, "cpu", **changes), tokenizer), 8),
    )


@needs_dali
def test_broken_samples_do_not_stop_dali(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Headers, cut files, and JPEGs that look whole until DALI's decoder meets them: same keys, same pixels, same
    reports."""
    pictures = formats()
    whole = encoded(photo(3), quality=90)
    pictures[1] = ("jpg", whole[: len(whole) // 2])
    pictures[5] = ("jpg", whole[: len(whole) // 2] + b"\xff\xd9")  # ends as it should; the middle is gone
    pictures[6] = ("jpg", b"\xff\xd8\xff" + bytes(60) + b"\xff\xd9")
    pictures[7] = ("png", b"nothing")
    start = whole.index(b"\xff\xc4")
    pictures[9] = (
        "jpg",
        whole[: start + 5] + b"\xff" * 16 + whole[start + 21 :],
    )  # an impossible Huffman table
    write(tmp_path / "b.tar", pictures)
    reports = []
    batches = []
    for backend in ("dali", "cpu"):
        loader = Loader(config(tmp_path, backend, max_broken=1.0), tokenizer)
        batches.append(take(loader, 12))
        reports.append(loader.broken)
    assert_equal(*batches)
    assert reports[0].samples == reports[1].samples and reports[0].count == reports[1].count
    assert {"001", "006", "007", "009"} <= {broken.key for broken in reports[0].samples}


@needs_dali
def test_dali_resumes_exactly_on_other_numbers_of_ranks(data: Path, tokenizer: Tokenizer) -> None:
    """1 rank, then 2, then 4; no sample lost, none twice; and the same pixels as one rank sees."""
    one = take(Loader(config(data, "dali", batch_size=8), tokenizer), 12)
    state: dict[str, Any] | None = None
    seen = Counter[str]()
    done = 0
    for ranks, batches in ((1, 3), (2, 4), (4, 5)):
        parts = []
        for rank in range(ranks):
            loader = Loader(
                config(data, "dali", batch_size=8 // ranks), tokenizer, rank=rank, world_size=ranks
            )
            with loader:
                if state is not None:
                    loader.load_state_dict(state)
                parts.append(list(itertools.islice(loader, batches)))
                after = json.loads(json.dumps(loader.state_dict()))
        state = after
        for i in range(batches):
            together = {
                key: image
                for part in parts
                for key, image in zip(
                    part[i].keys, torch.cat([part[i].pair_images, part[i].mim_images]), strict=True
                )
            }
            alone = one[done + i]
            expected = dict(zip(alone.keys, torch.cat([alone.pair_images, alone.mim_images]), strict=True))
            assert together.keys() == expected.keys()
            assert all(torch.equal(image, expected[key]) for key, image in together.items())
            seen.update(together.keys())
        done += batches
    assert len(seen) == PAIRS + ALONE and set(seen.values()) == {3}


@needs_dali
def test_closing_dali_ends_its_threads(data: Path, tokenizer: Tokenizer) -> None:
    before = threading.active_count()
    loader = Loader(config(data, "dali", prefetch=6), tokenizer)
    next(loader)
    loader.close()
    assert threading.active_count() == before
    other = Loader(config(data, "dali"), tokenizer)
    next(other)
    del other  # what waits is still made, and the last job lets go of the threads
    ends = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < ends:
        time.sleep(0.05)
    assert threading.active_count() == before


def views(picture: Picture, count: int) -> list[View]:
    rng = np.random.default_rng(0)
    boxes = [
        images.crop_box(picture.width, picture.height, rng, (0.3, 1.0), (3 / 4, 4 / 3)) for _ in range(count)
    ]
    return [View(picture, box, i % 2 == 1, rng) for i, box in enumerate(boxes)]


def by_pillow(view: View, size: int, interpolation: str) -> np.ndarray:
    """The same crop by Pillow alone."""
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(view.picture.data))).convert("RGB")
    left, top, width, height = view.box
    crop = upright.crop((left, top, left + width, top + height))
    crop = crop.resize((size, size), images.INTERPOLATIONS[interpolation])
    return np.asarray(ImageOps.mirror(crop) if view.flipped else crop)


@needs_dali
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_graph_that_runs_on_gpus_gives_pillows_pixels(interpolation: str) -> None:
    """DALI's own resize and flip, here on the CPU, with every EXIF orientation."""
    from dataload.dali import DaliDecoder

    some = [
        view
        for turn in range(1, 9)
        for view in views(images.read(encoded(photo(turn, 300, 240), quality=92, exif=exif(turn))), 2)
    ]
    decoder = DaliDecoder(len(some), 2, CPU, 128, interpolation)
    errors = [
        np.abs(out.numpy().astype(int) - by_pillow(view, 128, interpolation))
        for out, view in zip(decoder.decode(some), some, strict=True)
    ]
    if interpolation == "bilinear":  # of grain, one value in a million is two levels off
        assert np.mean(np.stack(errors) > 1) < 1e-5 and np.max(errors) <= 2
    else:
        check(np.stack(errors), interpolation)


def check(errors: np.ndarray, interpolation: str) -> None:
    if interpolation == "bilinear":
        assert errors.max() <= 1
    else:
        assert errors.mean() < 0.2 and np.percentile(errors, 99.9) < 4


@needs_dali
def test_photographs_by_both_backends_against_pillow(real_data: Path) -> None:
    """At 448 and 512, a part of the photographs each time: decoding exact, bilinear within a level, bicubic in its
    limits; the graph for GPUs too."""
    from dataload.dali import DaliDecoder
    from dataload.resize import resize

    files = [
        *sorted((real_data / "coco_mini/images").glob("*.jpg"))[::12],
        *sorted((real_data / "flickr8k_2000/images").glob("*"))[::150],
    ]
    some = [views(images.read(path.read_bytes()), 2)[i % 2] for i, path in enumerate(files)]
    assert len(some) >= 20
    crops = DaliDecoder(len(some), 2, CPU, None, "bilinear").decode(some)
    for view, crop in zip(some, crops, strict=True):
        left, top, width, height = view.box
        whole = ImageOps.exif_transpose(Image.open(io.BytesIO(view.picture.data))).convert("RGB")
        exact = np.asarray(whole.crop((left, top, left + width, top + height)))
        assert (crop == exact).all() and (view.picture.cut(view.box) == exact).all()
    for interpolation, size in itertools.product(("bilinear", "bicubic"), (448, 512)):
        in_graph = DaliDecoder(len(some), 2, CPU, size, interpolation).decode(some)
        for part in (0, 1):
            errors = []
            for view, theirs in list(zip(some, in_graph, strict=True))[part::2]:
                exact = by_pillow(view, size, interpolation).astype(int)
                ours = resize(view.picture.cut(view.box), size, interpolation, mirror=view.flipped)
                errors.append(np.abs((ours if part else theirs.numpy()) - exact))
            check(np.stack(errors), interpolation)


CHECK = """
import json, sys, warnings
from pathlib import Path
import numpy as np, torch
from dataload import images
from dataload.dali import DaliDecoder, takes
from dataload.samples import View
warnings.simplefilter("ignore")
decoder = DaliDecoder(8, 1, torch.device("cpu"), None, "bilinear")
results = {}
for name in json.load(sys.stdin):
    data = Path(sys.argv[1], name).read_bytes()
    if not data.startswith(b"\\xff\\xd8"):
        continue  # both backends decode it by images.decode
    try:
        expected = np.asarray(images.decode(data))
    except images.BrokenImage as error:
        expected = None
    result = []
    try:
        picture = images.read(data)
        whole = (0, 0, picture.width, picture.height)
        view = View(picture, whole, False, None)
        pixels = picture.cut(whole)
        if takes(view):
            (crop,) = decoder.decode([view])
            result.append("dali failed" if crop is None else "dali" if np.array_equal(crop, pixels) else "WRONG dali")
        result.append("same" if expected is not None and np.array_equal(pixels, expected) else "WRONG")
    except images.BrokenImage as error:
        result.append("broken" if expected is None else "WRONG: " + str(error))
    results[name] = result
print(json.dumps(results))
"""


@needs_dali
def test_corpus_of_broken_images_by_both_backends(real_data: Path) -> None:
    """In a process of its own, each JPEG through Pillow in full, the cpu backend, and DALI where it takes it."""
    folder = real_data / "broken_images"
    names = [row["path"] for row in csv.DictReader((folder / "manifest.csv").open(encoding="utf-8"))]
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(folder)], input=json.dumps(names), capture_output=True, text=True,
        timeout=280, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) > 30
    wrong = {name: result for name, result in results.items() if "WRONG" in "".join(result)}
    assert not wrong, wrong
    assert sum("dali" in result for result in results.values()) > 10


# which backend


def test_named_backends_are_never_replaced(
    data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Loader(config(data, "auto"), tokenizer) as loader:
        assert loader.backend == "cpu"
    for changes, message in (
        ({"backend": "gpu"}, "supported: auto, cpu, dali"),
        ({"device": "tpu"}, "cuda:N"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config(data, "cpu"), **changes)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch finds no CUDA device"):
            Loader(config(data, "dali", device="cuda:0"), tokenizer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'auroraio\[gpu\]'"):
        Loader(config(data, "dali"), tokenizer)


@pytest.mark.gpu
@needs_dali
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_mixed_decoding_on_a_gpu(data: Path, tokenizer: Tokenizer) -> None:
    """The batches of the cpu backend, on the GPU; nvJPEG's pixels may be a few levels off. Each batch is kept, so that
    memory which is used again too early would show."""
    theirs = take(Loader(config(data, "cpu"), tokenizer), 12)
    ours = take(Loader(config(data, "auto", device="auto"), tokenizer), 12)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys == b.keys and a.pair_images.is_cuda and a.mim_images.is_cuda
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.mim_mask, b.mim_mask)
        for mine, exact in ((a.pair_images, b.pair_images), (a.mim_images, b.mim_images)):
            error = (mine.cpu().int() - exact.int()).abs().float()
            assert error.mean() < 1 and error.max() < 32


def test_workers_leave_torchs_threads_alone(data: Path, tokenizer: Tokenizer) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for workers in (0, 2):
            next(iter(Loader(config(data, "cpu", workers=workers), tokenizer)))
            assert torch.get_num_threads() == 3
            with ThreadPoolExecutor(1) as later:
                assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
