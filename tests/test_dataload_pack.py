"""python -m dataload.pack: real annotation files, small ones made here, everything that can be wrong with
them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from packing import COLOURS, coco, five_pictures, listing, picture, read, run, write

import dataload.pack
from dataload.shards import expand, index


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return five_pictures(tmp_path)


# --- real data ----------------------------------------------------------------------------------------------


def test_flickr8k_karpathy(real_data: Path, tmp_path: Path) -> None:
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
    splits = listing(tmp_path)["splits"]
    counts = {name: (split["pictures"], split["captions"]) for name, split in splits.items()}
    assert counts == {"train": (1200, 6000), "val": (150, 750), "test": (150, 750)}
    assert splits["train"]["shards"] == ["train-000000.tar", "train-000001.tar"]

    given = json.loads((folder / "dataset_karpathy.json").read_text())["images"]
    for split in counts:
        expected = [entry for entry in given if entry["split"] == split]
        samples = read(tmp_path, split)
        assert len(samples) == len(expected)
        for sample, entry in zip(samples, expected, strict=True):
            sidecar = json.loads(sample["json"])
            assert sample["jpg"] == (folder / "images" / entry["filename"]).read_bytes()
            assert [" ".join(s["raw"].split()) for s in entry["sentences"]] == sidecar["captions"]
            assert sample["txt"].decode() == sidecar["captions"][0]
            assert sidecar["imgid"] == entry["imgid"] and sidecar["file_name"] == entry["filename"]


def test_our_own_index_finds_every_sample_captioned(real_data: Path, tmp_path: Path) -> None:
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
    assert found.captioned.all()


def test_coco_mini_as_coco_and_as_karpathy_hold_the_same(real_data: Path, tmp_path: Path) -> None:
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
    one = {json.loads(sample["json"])["image_id"]: sample for sample in read(coco)}
    two = {
        json.loads(sample["json"])["cocoid"]: sample
        for split in ("train", "test")
        for sample in read(karpathy, split)
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
    real_data: Path, tmp_path: Path, command: str, option: str, file: str, said: str
) -> None:
    folder = real_data / "coco_mini"
    status, _, err = run(
        command, option, folder / file, "--images", folder / "images", "--output", tmp_path / "out"
    )
    assert status == 2 and said in err and file in err
    assert not (tmp_path / "out").exists()


# --- the formats, on files made here
# -----------------------------------------------------------------------------


def test_coco_big_ids_orphans_and_uncaptioned(pictures: Path, tmp_path: Path) -> None:
    data = coco({"red.jpg": ["A red\n picture. ", " "], "green.jpg": [], "lost.jpg": ["Gone."]})
    data["annotations"].append({"image_id": 5, "caption": "Of nothing."})
    file = write(tmp_path / "captions.json", data)
    status, out, _ = run(
        "coco", "--captions", file, "--images", pictures, "--output", tmp_path / "out", "--split", "val2017"
    )
    assert status == 0
    assert "1 with 1 captions, 1 without" in out
    assert "1 blank captions were left out" in out
    assert "1 captions of an image id that the file does not list:\n    5: Of nothing." in out
    assert "1 pictures missing on disk, not packed:\n    lost.jpg" in out
    first, second = read(tmp_path / "out", "val2017")
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


def test_karpathy_restval(pictures: Path, tmp_path: Path) -> None:
    images = [
        {"filename": f"{colour}.jpg", "split": split, "sentences": [{"raw": f"It is {colour}."}]}
        for colour, split in zip(COLOURS, ("train", "restval", "restval", "val", "test"), strict=True)
    ]
    file = write(tmp_path / "dataset.json", {"images": images, "dataset": "tiny"})
    common = ("karpathy", "--json", file, "--images", pictures, "--output")
    _, out, _ = run(*common, tmp_path / "joined")
    assert "2 pictures of the split restval became part of train" in out
    assert {name: split["pictures"] for name, split in listing(tmp_path / "joined")["splits"].items()} == {
        "train": 3, "val": 1, "test": 1
    }  # fmt: skip
    run(*common, tmp_path / "apart", "--no-restval-into-train")
    assert listing(tmp_path / "apart")["splits"]["restval"]["pictures"] == 2


def test_csv(pictures: Path, tmp_path: Path) -> None:
    table = '\ufefffile,who,text,part\nred.jpg,a,"Red, really",train\ngold.jpg,b,Gold,test\n'
    table += "red.jpg,c,Reddish,train\nblue.jpg,,,train\n"
    file = write(tmp_path / "captions.csv", table)
    options = ("--image-column", "file", "--caption-column", "text", "--split-column", "part")
    status, out, _ = run("csv", "--csv", file, "--images", pictures, "--output", tmp_path / "out", *options)
    assert status == 0 and "columns not used: who" in out and "1 rows have no caption" in out
    red, blue = read(tmp_path / "out")
    assert json.loads(red["json"])["captions"] == ["Red, really", "Reddish"] and "json" not in blue
    assert [sample["txt"] for sample in read(tmp_path / "out", "test")] == [b"Gold"]

    tabs = write(tmp_path / "captions.tsv", "image\tcaption\nred.jpg\tA, b\n")
    assert run("csv", "--csv", tabs, "--images", pictures, "--output", tmp_path / "tabs")[0] == 0
    assert read(tmp_path / "tabs")[0]["txt"] == b"A, b"


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
def test_csv_errors(pictures: Path, tmp_path: Path, table: str, said: str) -> None:
    file = write(tmp_path / "captions.csv", table)
    status, _, err = run("csv", "--csv", file, "--images", pictures, "--output", tmp_path / "out")
    assert status == 2 and said in err


def test_folder(pictures: Path, tmp_path: Path) -> None:
    picture(pictures / "deep" / "er" / "a.b.png", "navy")
    write(pictures / "red.txt", "One.\n\nTwo.\n")
    write(pictures / "red.json", {"caption": "Two.", "captions": ["Two.", "Three."]})
    write(pictures / "deep" / "er" / "a.b.json", ["Navy."])
    write(pictures / "notes.txt", "of no picture")
    write(pictures / "LICENSE", "free")
    status, out, _ = run("folder", "--images", pictures, "--output", tmp_path / "out")
    assert status == 0
    assert "2 with 4 captions, 4 without" in out
    assert "2 other files were ignored: 1 (no suffix), 1 .txt" in out
    captions = {
        json.loads(sample["json"])["file_name"]: json.loads(sample["json"])["captions"]
        for sample in read(tmp_path / "out")
        if "json" in sample
    }
    assert captions == {"red.jpg": ["One.", "Two.", "Three."], "deep/er/a.b.png": ["Navy."]}

    write(pictures / "blue.json", "{")
    status, _, err = run("folder", "--images", pictures, "--output", tmp_path / "bad")
    assert status == 2 and "blue.json is not JSON" in err
