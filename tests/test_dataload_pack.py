"""python -m dataload.pack: real annotation files, small ones made here, everything that can be wrong with
them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

import dataload.pack
from dataload.pack.__main__ import main
from dataload.shards import expand, index

COLOURS = ("red", "green", "blue", "gold", "gray")


def _picture(path: Path, colour: str = "red", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path.read_bytes()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """pictures/red.jpg ... gray.jpg, five JPEGs of 40 x 30."""
    for colour in COLOURS:
        _picture(tmp_path / "pictures" / f"{colour}.jpg", colour)
    return tmp_path / "pictures"


def _coco(captions: dict[str, list[str]], first_id: int = 2**31 + 7) -> dict[str, Any]:
    numbers = {name: first_id + number for number, name in enumerate(captions)}
    return {
        "images": [{"id": number, "file_name": name} for name, number in numbers.items()],
        "annotations": [
            {"id": 10 * number + place, "image_id": number, "caption": text}
            for name, number in numbers.items()
            for place, text in enumerate(captions[name])
        ],
    }


def _write(path: Path, data: Any) -> str:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return str(path)


def _read(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """All samples of a split, through the webdataset library."""
    shards = sorted(str(path) for path in folder.glob(f"{split}-*.tar"))
    return [dict(sample) for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)]


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def _listing(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "dataset.json").read_text(encoding="utf-8"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: (exit status, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        status = main([str(word) for word in words])
        return (status, *capsys.readouterr())

    return call


# --- real data ----------------------------------------------------------------------------------------------


def test_flickr8k_karpathy(real_data: Path, tmp_path: Path, run: Any) -> None:
    folder = real_data / "flickr8k_2000"
    status, out, _ = run(
        "karpathy",
        "--json",
        folder / "dataset_karpathy.json",
        "--images",
        folder / "images",
        "--output",
        tmp_path,
    )
    assert status == 0 and "1,200 with 6,000 captions, 0 without" in out
    splits = _listing(tmp_path)["splits"]
    counts = {name: (split["pictures"], split["captions"]) for name, split in splits.items()}
    assert counts == {"train": (1200, 6000), "val": (150, 750), "test": (150, 750)}
    assert splits["train"]["shards"] == ["train-000000.tar", "train-000001.tar"]

    given = json.loads((folder / "dataset_karpathy.json").read_text())["images"]
    for split in counts:
        expected = [entry for entry in given if entry["split"] == split]
        samples = _read(tmp_path, split)
        assert len(samples) == len(expected)
        for sample, entry in zip(samples, expected, strict=True):
            sidecar = json.loads(sample["json"])
            assert sample["jpg"] == (folder / "images" / entry["filename"]).read_bytes()
            assert [" ".join(s["raw"].split()) for s in entry["sentences"]] == sidecar["captions"]
            assert sample["txt"].decode() == sidecar["captions"][0]
            assert sidecar["imgid"] == entry["imgid"] and sidecar["file_name"] == entry["filename"]


def test_our_own_index_finds_every_sample_captioned(real_data: Path, tmp_path: Path, run: Any) -> None:
    folder = real_data / "coco_mini"
    assert (
        run(
            "coco",
            "--captions",
            folder / "captions.json",
            "--images",
            folder / "images",
            "--output",
            tmp_path,
        )[0]
        == 0
    )
    found = index(expand([str(tmp_path / "train-*.tar")]))
    assert sum(len(shard) for shard in found.shards) == 119
    assert all(shard.captioned.all() for shard in found.shards)


def test_coco_mini_as_coco_and_as_karpathy_hold_the_same(real_data: Path, tmp_path: Path, run: Any) -> None:
    folder = real_data / "coco_mini"
    coco, karpathy = tmp_path / "coco", tmp_path / "karpathy"
    assert (
        run("coco", "--captions", folder / "captions.json", "--images", folder / "images", "--output", coco)[
            0
        ]
        == 0
    )
    # the file says filepath "images", so its parent is as good a folder as the folder itself
    assert (
        run("karpathy", "--json", folder / "dataset_karpathy.json", "--images", folder, "--output", karpathy)[
            0
        ]
        == 0
    )
    one = {json.loads(sample["json"])["image_id"]: sample for sample in _read(coco)}
    two = {
        json.loads(sample["json"])["cocoid"]: sample
        for split in ("train", "test")
        for sample in _read(karpathy, split)
    }
    assert len(one) == 119 and one.keys() == two.keys()
    for number, sample in one.items():
        captions = [json.loads(other["json"])["captions"] for other in (sample, two[number])]
        assert sorted(captions[0]) == sorted(captions[1]) and len(captions[0]) == 5
        assert sample["jpg"] == two[number]["jpg"]


def test_flickr8k_csv_agrees_with_its_coco_file(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "flickr8k_2000"
    table = dataload.pack.read_csv(folder / "captions.csv", folder / "images")
    coco = dataload.pack.read_coco(folder / "captions_coco.json", folder / "images")
    assert len(table.pictures) == len(coco.pictures) == 1500
    by_name = {picture.name: picture for picture in coco.pictures}
    assert all(
        sorted(picture.captions) == sorted(by_name[picture.name].captions) for picture in table.pictures
    )
    assert max(picture.facts["image_id"] for picture in coco.pictures) > 2**31


@pytest.mark.parametrize(
    ("command", "option", "file", "said"),
    [
        ("coco", "--captions", "instances.json", "COCO instances: boxes and masks"),
        ("coco", "--captions", "person_keypoints.json", "COCO keypoints"),
        ("coco", "--captions", "dataset_karpathy.json", "use: python -m dataload.pack karpathy"),
        ("coco", "--captions", "vqa_annotations.json", "VQA annotations"),
        ("karpathy", "--json", "captions.json", "use: python -m dataload.pack coco"),
        ("karpathy", "--json", "vqa_questions.json", "VQA questions"),
    ],
)
def test_the_wrong_file_is_named(
    real_data: Path, tmp_path: Path, run: Any, command: str, option: str, file: str, said: str
) -> None:
    folder = real_data / "coco_mini"
    status, _, err = run(
        command, option, folder / file, "--images", folder / "images", "--output", tmp_path / "out"
    )
    assert status == 2 and said in err and file in err
    assert not (tmp_path / "out").exists()


# --- the formats, on files made here
# -----------------------------------------------------------------------------


def test_coco_big_ids_orphans_and_uncaptioned(pictures: Path, tmp_path: Path, run: Any) -> None:
    data = _coco({"red.jpg": ["A red\n picture. ", " "], "green.jpg": [], "lost.jpg": ["Gone."]})
    data["annotations"].append({"image_id": 5, "caption": "Of nothing."})
    file = _write(tmp_path / "captions.json", data)
    status, out, _ = run(
        "coco", "--captions", file, "--images", pictures, "--output", tmp_path / "out", "--split", "val2017"
    )
    assert status == 0
    assert "1 with 1 captions, 1 without" in out
    assert "1 blank captions were left out" in out
    assert "1 captions of an image id that the file does not list:\n    5: Of nothing." in out
    assert "1 pictures missing on disk, not packed:\n    lost.jpg" in out
    first, second = _read(tmp_path / "out", "val2017")
    assert json.loads(first["json"]) == {
        "captions": ["A red picture."],
        "image_id": 2**31 + 7,
        "file_name": "red.jpg",
    }
    assert (
        "txt" not in second
        and "json" not in second
        and second["jpg"] == (pictures / "green.jpg").read_bytes()
    )

    status, out, _ = run(
        *(
            "coco",
            "--captions",
            file,
            "--images",
            pictures,
            "--output",
            tmp_path / "captioned",
            "--captioned-only",
        )
    )
    assert "1 with 1 captions, 0 without" in out and "--captioned-only" in out and "green.jpg" in out


def test_karpathy_restval(pictures: Path, tmp_path: Path, run: Any) -> None:
    images = [
        {"filename": f"{colour}.jpg", "split": split, "sentences": [{"raw": f"It is {colour}."}]}
        for colour, split in zip(COLOURS, ("train", "restval", "restval", "val", "test"), strict=True)
    ]
    file = _write(tmp_path / "dataset.json", {"images": images, "dataset": "tiny"})
    common = ("karpathy", "--json", file, "--images", pictures, "--output")
    _, out, _ = run(*common, tmp_path / "joined")
    assert "2 pictures of the split restval became part of train" in out
    assert {name: split["pictures"] for name, split in _listing(tmp_path / "joined")["splits"].items()} == {
        "train": 3, "val": 1, "test": 1
    }  # fmt: skip
    run(*common, tmp_path / "apart", "--no-restval-into-train")
    assert _listing(tmp_path / "apart")["splits"]["restval"]["pictures"] == 2


def test_csv(pictures: Path, tmp_path: Path, run: Any) -> None:
    table = '\ufefffile,who,text,part\nred.jpg,a,"Red, really",train\ngold.jpg,b,Gold,test\n'
    table += "red.jpg,c,Reddish,train\nblue.jpg,,,train\n"
    file = _write(tmp_path / "captions.csv", table)
    options = ("--image-column", "file", "--caption-column", "text", "--split-column", "part")
    status, out, _ = run("csv", "--csv", file, "--images", pictures, "--output", tmp_path / "out", *options)
    assert status == 0 and "columns not used: who" in out and "1 rows have no caption" in out
    red, blue = _read(tmp_path / "out")
    assert json.loads(red["json"])["captions"] == ["Red, really", "Reddish"] and "json" not in blue
    assert [sample["txt"] for sample in _read(tmp_path / "out", "test")] == [b"Gold"]

    tabs = _write(tmp_path / "captions.tsv", "image\tcaption\nred.jpg\tA, b\n")
    assert run("csv", "--csv", tabs, "--images", pictures, "--output", tmp_path / "tabs")[0] == 0
    assert _read(tmp_path / "tabs")[0]["txt"] == b"A, b"


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("image,caption\n../red.jpg,x\n", "line 2: '../red.jpg' does not lie in the picture folder"),
        ("image,caption\na/../../red.jpg,x\n", "does not lie in the picture folder"),
        ("image,caption\n/etc/passwd,x\n", "'/etc/passwd' does not lie in the picture folder"),
        ("image,caption\nred.jpg,x,y\n", "line 2: 3 fields, but the header has 2"),
        ("picture,caption\nred.jpg,x\n", "no column 'image'; its columns are ['picture', 'caption']"),
        ("", "no column 'image', 'caption'; its columns are []"),
        ('image,caption\nred.jpg,"open\n', "cannot be read as UTF-8 CSV"),
    ],
)
def test_csv_errors(pictures: Path, tmp_path: Path, run: Any, table: str, said: str) -> None:
    file = _write(tmp_path / "captions.csv", table)
    status, _, err = run("csv", "--csv", file, "--images", pictures, "--output", tmp_path / "out")
    assert status == 2 and said in err


def test_folder(pictures: Path, tmp_path: Path, run: Any) -> None:
    _picture(pictures / "deep" / "er" / "a.b.png", "navy")
    _write(pictures / "red.txt", "One.\n\nTwo.\n")
    _write(pictures / "red.json", {"caption": "Two.", "captions": ["Two.", "Three."]})
    _write(pictures / "deep" / "er" / "a.b.json", ["Navy."])
    _write(pictures / "notes.txt", "of no picture")
    _write(pictures / "LICENSE", "free")
    status, out, _ = run("folder", "--images", pictures, "--output", tmp_path / "out")
    assert status == 0
    assert "2 with 4 captions, 4 without" in out
    assert "2 other files were ignored: 1 (no suffix), 1 .txt" in out
    captions = {
        json.loads(sample["json"])["file_name"]: json.loads(sample["json"])["captions"]
        for sample in _read(tmp_path / "out")
        if "json" in sample
    }
    assert captions == {"red.jpg": ["One.", "Two.", "Three."], "deep/er/a.b.png": ["Navy."]}

    _write(pictures / "blue.json", "{")
    status, _, err = run("folder", "--images", pictures, "--output", tmp_path / "bad")
    assert status == 2 and "blue.json is not JSON" in err


# --- pictures -----------------------------------------------------------------------------------------------


def test_bytes_are_kept_and_other_formats_converted(tmp_path: Path, run: Any) -> None:
    folder = tmp_path / "pictures"
    kept = {name: _picture(folder / name, "teal") for name in ("a.jpg", "b.png", "c.webp")}
    kept["d.png"] = (folder / "a.jpg").read_bytes()  # a JPEG whose name says PNG is packed as what it is
    (folder / "d.png").write_bytes(kept["d.png"])
    _picture(folder / "e.bmp", "olive")
    _picture(folder / "f.gif", "olive")
    status, out, _ = run("folder", "--images", folder, "--output", tmp_path / "out")
    assert status == 0
    assert (
        "1 pictures were converted from BMP to PNG" in out
        and "1 pictures were converted from GIF to PNG" in out
    )
    assert "1 pictures with the same bytes as an earlier one, packed all the same:\n    d.png = a.jpg" in out
    a, b, c, d, e, f = _read(tmp_path / "out")
    assert (a["jpg"], b["png"], c["webp"], d["jpg"]) == tuple(kept.values())
    for sample in (e, f):
        image = Image.open(io.BytesIO(sample["png"]))
        assert image.format == "PNG" and image.convert("RGB").getpixel((5, 5)) == (128, 128, 0)


def test_broken_pictures_are_listed(pictures: Path, tmp_path: Path, run: Any) -> None:
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
    listed = dict(_listing(tmp_path / "quick")["broken"])
    assert listed.keys() == {"blue.jpg", "cut.png", "empty.jpg"}  # half a JPEG has a whole header
    run("folder", "--images", pictures, "--output", tmp_path / "full", "--verify")
    listed = dict(_listing(tmp_path / "full")["broken"])
    assert (
        listed.keys() == {"blue.jpg", "cut.jpg", "cut.png", "empty.jpg"} and "truncated" in listed["cut.jpg"]
    )
    assert len(_read(tmp_path / "full")) == 4


def test_resize_shrinks_the_shortest_side_and_turns_upright(tmp_path: Path, run: Any) -> None:
    folder = tmp_path / "pictures"
    small = _picture(folder / "small.jpg", size=(30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    _picture(folder / "turned.jpg", size=(200, 100), exif=exif)
    _picture(folder / "wide.png", size=(301, 99))
    _, out, _ = run("folder", "--images", folder, "--output", tmp_path / "out", "--resize", "32")
    assert "2 pictures were resized to 32 pixels (JPEG)" in out
    first, turned, wide = _read(tmp_path / "out")
    assert first["jpg"] == small
    assert Image.open(io.BytesIO(turned["jpg"])).size == (32, 64)
    assert Image.open(io.BytesIO(wide["jpg"])).size == (97, 32)


# --- the output ---------------------------------------------------------------------------------------------


def test_same_bytes_whatever_the_threads_and_another_order_by_seed(
    pictures: Path, tmp_path: Path, run: Any
) -> None:
    file = _write(
        tmp_path / "captions.json", _coco({f"{colour}.jpg": [f"It is {colour}."] for colour in COLOURS})
    )
    common = ("coco", "--captions", file, "--images", pictures, "--output")
    run(*common, tmp_path / "a", "--workers", 1)
    for path in pictures.iterdir():
        os.utime(path, (1, 1))
    run(*common, tmp_path / "b", "--workers", 7)
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b")
    run(*common, tmp_path / "c", "--shuffle-seed", 3)
    run(*common, tmp_path / "d", "--shuffle-seed", 3)
    assert _hashes(tmp_path / "c") == _hashes(tmp_path / "d") != _hashes(tmp_path / "a")
    texts = [[sample["txt"] for sample in _read(tmp_path / name)] for name in ("a", "c")]
    assert sorted(texts[0]) == sorted(texts[1]) and texts[0] != texts[1]
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def test_shards_end_at_their_limits(pictures: Path, tmp_path: Path, run: Any) -> None:
    run("folder", "--images", pictures, "--output", tmp_path / "out", "--max-samples", "2")
    assert _listing(tmp_path / "out")["splits"]["train"]["shards"] == [
        f"train-00000{number}.tar" for number in range(3)
    ]
    keys = [sample["__key__"] for sample in _read(tmp_path / "out")]
    assert keys == [f"{number:08d}" for number in range(5)]
    with dataload.pack.ShardWriter(tmp_path, "big", max_bytes=10_000) as writer:
        for key in "abc":
            writer.write(key, "jpg", bytes(4000))
    assert [path.name for path in writer.shards] == ["big-000000.tar", "big-000001.tar"]


def test_overwrite_replaces_an_earlier_packing_and_nothing_else(
    pictures: Path, tmp_path: Path, run: Any
) -> None:
    out = tmp_path / "out"
    common = ("folder", "--images", pictures, "--output", out)
    run(*common, "--max-samples", "1")
    index(expand([str(out)]))  # leaves its cache beside the shards
    _write(out / "mine.txt", "keep")
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
    written = dataload.pack.ShardWriter.write

    def fail_at_the_end(self: Any, key: str, *rest: Any) -> None:
        if key == "00000004":
            raise OSError("disk full")
        written(self, key, *rest)

    monkeypatch.setattr(dataload.pack.ShardWriter, "write", fail_at_the_end)
    with pytest.raises(OSError, match="disk full"):
        dataload.pack.pack(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_duplicates_across_splits_are_said(pictures: Path, tmp_path: Path, run: Any) -> None:
    (pictures / "again.jpg").write_bytes((pictures / "red.jpg").read_bytes())
    table = "image,caption,split\nred.jpg,Red,train\nagain.jpg,Red,test\n"
    file = _write(tmp_path / "captions.csv", table)
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
        (_coco({"red.jpg": [7]}), "a caption is text, but this one is 7"),
        (_coco({"../red.jpg": []}), "does not lie in the picture folder"),
        (
            {"images": [{"id": 1, "file_name": name} for name in ("red.jpg", "blue.jpg")]},
            "stand for several pictures",
        ),
        (_coco({"lost.jpg": ["x"]}), "none of the 1 pictures could be packed: 1 are missing"),
    ],
)
def test_coco_errors(pictures: Path, tmp_path: Path, run: Any, data: Any, said: str) -> None:
    file = _write(tmp_path / "captions.json", data)
    status, _, err = run("coco", "--captions", file, "--images", pictures, "--output", tmp_path / "out")
    assert status == 2 and said in err, err


def test_what_is_not_there_is_said(pictures: Path, tmp_path: Path, run: Any) -> None:
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
