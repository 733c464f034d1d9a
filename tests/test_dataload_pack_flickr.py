"""Flickr30k's token file with lists of splits, packed and read back."""

from __future__ import annotations

import json
from pathlib import Path

from packing import five_pictures, listing, opened, run, write

from dataload.annotations import annotated


def test_flickr_tokens_with_lists_of_splits(tmp_path: Path) -> None:
    pictures = five_pictures(tmp_path)
    lines = [
        f"{name}.jpg#{n}\tA {name} thing , number {n} ."
        for name in ("red", "blue", "green")
        for n in range(5)
    ]
    tokens = write(tmp_path / "results_20130124.token", "\n".join(lines) + "\n")
    train = write(tmp_path / "train.txt", "red\nblue\n")
    test = write(tmp_path / "Flickr_8k.testImages.txt", "gold.jpg\n")
    words = ("flickr", "--tokens", tokens, "--images", pictures, "--output", tmp_path / "out")
    assert "none of the 1 pictures" in run(*words, "--lists", train, test)[2]
    write(tmp_path / "Flickr_8k.testImages.txt", "gold.jpg\ngreen.jpg\n")
    status, out, error = run(*words, "--lists", train, test)
    assert status == 0 and "1 pictures of Flickr_8k.testImages.txt without captions" in error
    assert {name: split["captions"] for name, split in listing(tmp_path / "out")["splits"].items()} == {
        "train": 10,
        "test": 5,
    }
    [green] = annotated(opened(tmp_path / "out", "test"))
    assert green.captions[4] == "A green thing , number 4 ."
    write(tmp_path / "train.txt", "red\n")
    out = run(*words, "--lists", train, "--overwrite")[1]
    assert "2 pictures in no list of a split, not packed" in out
    write(tmp_path / "val.txt", "red\n")
    assert (
        "is in the split 'val' and in 'train'"
        in run(*words, "--lists", train, tmp_path / "val.txt", "--overwrite")[2]
    )
    write(tmp_path / "results_20130124.token", "red.jpg,a thing\n")
    assert "line 1: a line is NAME.jpg#0<tab>caption" in run(*words, "--overwrite")[2]


def test_flickr_tokens_agree_with_karpathy(real_data: Path, tmp_path: Path) -> None:
    """Real captions, in the token file's layout: the same captions as Karpathy's file gives."""
    from dataload.pack import read_flickr, read_karpathy

    folder = real_data / "flickr8k_2000"
    given = json.loads((folder / "dataset_karpathy.json").read_text())["images"]
    lines = [
        f"{image['filename']}#{n}\t{s['raw']}" for image in given for n, s in enumerate(image["sentences"])
    ]
    tokens = Path(write(tmp_path / "Flickr8k.token.txt", "\n".join(lines) + "\n"))
    lists = [
        Path(
            write(
                tmp_path / f"{split}.txt", "".join(f"{i['filename']}\n" for i in given if i["split"] == split)
            )
        )
        for split in ("train", "val", "test")
    ]
    ours, theirs = (
        read_flickr(tokens, folder / "images", lists=lists),
        read_karpathy(folder / "dataset_karpathy.json", folder / "images"),
    )
    assert [(p.name, p.split, p.captions) for p in ours.pictures] == [
        (p.name, p.split, p.captions) for p in theirs.pictures
    ]
