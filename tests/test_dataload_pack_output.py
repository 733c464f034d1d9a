"""python -m dataload.pack: what becomes of pictures, and of the output folder."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packing import COLOURS, coco, five_pictures, hashes, listing, picture, read, run, write
from PIL import Image

import dataload.pack
from dataload.shards import expand, index


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return five_pictures(tmp_path)


# --- pictures -----------------------------------------------------------------------------------------------


def test_bytes_are_kept_and_other_formats_converted(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    kept = {name: picture(folder / name, "teal") for name in ("a.jpg", "b.png", "c.webp")}
    kept["d.png"] = (folder / "a.jpg").read_bytes()  # a JPEG whose name says PNG is packed as what it is
    (folder / "d.png").write_bytes(kept["d.png"])
    picture(folder / "e.bmp", "olive")
    picture(folder / "f.gif", "olive")
    status, out, _ = run("folder", "--images", folder, "--output", tmp_path / "out")
    assert status == 0
    assert (
        "1 pictures were converted from BMP to PNG" in out
        and "1 pictures were converted from GIF to PNG" in out
    )
    assert "1 pictures with the same bytes as an earlier one, packed all the same:\n    d.png = a.jpg" in out
    a, b, c, d, e, f = read(tmp_path / "out")
    assert (a["jpg"], b["png"], c["webp"], d["jpg"]) == tuple(kept.values())
    for sample in (e, f):
        image = Image.open(io.BytesIO(sample["png"]))
        assert image.format == "PNG" and image.convert("RGB").getpixel((5, 5)) == (128, 128, 0)


def test_broken_pictures_are_listed(pictures: Path, tmp_path: Path) -> None:
    (pictures / "blue.jpg").write_bytes(b"not a picture")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8))
    noise.save(pictures / "cut.jpg")
    whole = (pictures / "cut.jpg").read_bytes()
    (pictures / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    noise.save(pictures / "cut.png")
    whole = (pictures / "cut.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "empty.jpg").write_bytes(b"")

    status, out, _ = run("folder", "--images", pictures, "--output", tmp_path / "quick")
    assert status == 0 and "3 broken pictures, not packed:" in out
    listed = dict(listing(tmp_path / "quick")["broken"])
    assert listed.keys() == {"blue.jpg", "cut.png", "empty.jpg"}  # half a JPEG has a whole header
    run("folder", "--images", pictures, "--output", tmp_path / "full", "--verify")
    listed = dict(listing(tmp_path / "full")["broken"])
    assert (
        listed.keys() == {"blue.jpg", "cut.jpg", "cut.png", "empty.jpg"} and "truncated" in listed["cut.jpg"]
    )
    assert len(read(tmp_path / "full")) == 4


def test_resize_shrinks_the_shortest_side_and_turns_upright(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    small = picture(folder / "small.jpg", size=(30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    picture(folder / "turned.jpg", size=(200, 100), exif=exif)
    picture(folder / "wide.png", size=(301, 99))
    _, out, _ = run("folder", "--images", folder, "--output", tmp_path / "out", "--resize", "32")
    assert "2 pictures were resized to 32 pixels (JPEG)" in out
    first, turned, wide = read(tmp_path / "out")
    assert first["jpg"] == small
    assert Image.open(io.BytesIO(turned["jpg"])).size == (32, 64)
    assert Image.open(io.BytesIO(wide["jpg"])).size == (97, 32)


# --- the output ---------------------------------------------------------------------------------------------


def test_same_bytes_whatever_the_threads_and_another_order_by_seed(pictures: Path, tmp_path: Path) -> None:
    file = write(
        tmp_path / "captions.json", coco({f"{colour}.jpg": [f"It is {colour}."] for colour in COLOURS})
    )
    common = ("coco", "--captions", file, "--images", pictures, "--output")
    run(*common, tmp_path / "a", "--workers", 1)
    for path in pictures.iterdir():
        os.utime(path, (1, 1))
    run(*common, tmp_path / "b", "--workers", 7)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    run(*common, tmp_path / "c", "--shuffle-seed", 3)
    run(*common, tmp_path / "d", "--shuffle-seed", 3)
    assert hashes(tmp_path / "c") == hashes(tmp_path / "d") != hashes(tmp_path / "a")
    texts = [[sample["txt"] for sample in read(tmp_path / name)] for name in ("a", "c")]
    assert sorted(texts[0]) == sorted(texts[1]) and texts[0] != texts[1]
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def test_shards_end_at_their_limits(pictures: Path, tmp_path: Path) -> None:
    run("folder", "--images", pictures, "--output", tmp_path / "out", "--max-samples", "2")
    assert listing(tmp_path / "out")["splits"]["train"]["shards"] == [
        f"train-00000{number}.tar" for number in range(3)
    ]
    keys = [sample["__key__"] for sample in read(tmp_path / "out")]
    assert keys == [f"{number:08d}" for number in range(5)]
    with dataload.pack.ShardWriter(tmp_path, "big", max_bytes=10_000) as writer:
        for key in "abc":
            writer.write(key, "jpg", bytes(4000))
    assert [path.name for path in writer.shards] == ["big-000000.tar", "big-000001.tar"]


def test_overwrite_replaces_an_earlier_packing_and_nothing_else(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ("folder", "--images", pictures, "--output", out)
    run(*common, "--max-samples", "1")
    index(expand([str(out)]))  # leaves its cache beside the shards
    write(out / "mine.txt", "keep")
    status, _, err = run(*common)
    assert status == 2 and "is not empty" in err and "--overwrite" in err
    assert run(*common, "--overwrite")[0] == 0
    assert {path.name for path in out.iterdir()} == {"train-000000.tar", "dataset.json", "mine.txt"}

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "theirs.tar").write_bytes(b"")
    status, _, err = run("folder", "--images", pictures, "--output", foreign, "--overwrite")
    assert status == 2 and "may be no earlier packing" in err and (foreign / "theirs.tar").exists()


def test_a_failure_leaves_no_shards(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = dataload.pack.read_folder(pictures)
    written = dataload.pack.ShardWriter.write_files

    def fail_at_the_end(self: Any, key: str, *rest: Any) -> None:
        if key == "00000004":
            raise OSError("disk full")
        written(self, key, *rest)

    monkeypatch.setattr(dataload.pack.ShardWriter, "write_files", fail_at_the_end)
    with pytest.raises(OSError, match="disk full"):
        dataload.pack.pack(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_duplicates_across_splits_are_said(pictures: Path, tmp_path: Path) -> None:
    (pictures / "again.jpg").write_bytes((pictures / "red.jpg").read_bytes())
    table = "image,caption,split\nred.jpg,Red,train\nagain.jpg,Red,test\n"
    file = write(tmp_path / "captions.csv", table)
    options = ("--output", tmp_path / "out", "--split-column", "split")
    _, out, _ = run("csv", "--csv", file, "--images", pictures, *options)
    assert "1 pictures with the same bytes as an earlier one (1 of them in another split)" in out


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{", "is not JSON"),
        ([1], "JSON, but a list at its top"),
        ({"a": 1}, "an object with the keys a"),
        ({"images": [{"id": 1, "file_name": "red.jpg"}], "annotations": [{"caption": "x"}]}, "no 'image_id'"),
        (coco({"red.jpg": [7]}), "a caption is text, but this one is 7"),
        (coco({"../red.jpg": []}), "does not lie in the picture folder"),
        (
            {"images": [{"id": 1, "file_name": name} for name in ("red.jpg", "blue.jpg")]},
            "stand for several pictures",
        ),
        (coco({"lost.jpg": ["x"]}), "none of the 1 pictures could be packed: 1 are missing"),
    ],
)
def test_coco_errors(pictures: Path, tmp_path: Path, data: Any, said: str) -> None:
    file = write(tmp_path / "captions.json", data)
    status, _, err = run("coco", "--captions", file, "--images", pictures, "--output", tmp_path / "out")
    assert status == 2 and said in err, err


def test_what_is_not_there_is_said(pictures: Path, tmp_path: Path) -> None:
    status, _, err = run("folder", "--images", tmp_path / "none", "--output", tmp_path / "out")
    assert status == 2 and "no such folder" in err
    status, _, err = run("coco", "--captions", "no.json", "--images", pictures, "--output", tmp_path / "out")
    assert status == 2 and "no.json: no such file" in err
    status, _, err = run("folder", "--images", pictures, "--output", tmp_path / "out", "--split", "a/b")
    assert status == 2 and "'a/b' cannot name a shard" in err
    with pytest.raises(SystemExit):
        run("folder", "--images", pictures, "--output", tmp_path / "out", "--resize", "0")


def test_as_a_user_types_it(pictures: Path, tmp_path: Path) -> None:
    root = Path(dataload.pack.__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "dataload.pack",
        "folder",
        "--images",
        str(pictures),
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "train: 5 pictures" in done.stdout and done.stderr == ""
