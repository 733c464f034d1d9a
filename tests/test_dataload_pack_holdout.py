"""python -m dataload.pack ... --holdout SHARE: which samples become val shards, and when it is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from packing import coco, five_pictures, hashes, listing, picture, read, run, write

from dataload.pack import PackError, Source, pack, read_csv, read_folder
from dataload.pack.writer import ShardWriter

MANY = 300


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """pictures/000.png ... 299.png of one pixel, each of another colour."""
    for number in range(MANY):
        picture(tmp_path / "pictures" / f"{number:03d}.png", f"#{number * 50000:06x}", (1, 1))
    return tmp_path / "pictures"


def table(folder: Path, names: list[str], name: str = "table.csv") -> str:
    """Two captions for every picture, in two parts of the table."""
    rows = [f"{one},{text} {one}\n" for text in ("First", "Second") for one in names]
    return write(folder / name, "image,caption\n" + "".join(rows))


def names_of(folder: Path, split: str) -> set[str]:
    return {sample["txt"].decode().split()[-1] for sample in read(folder, split)}


def test_the_share_is_about_right_and_rows_of_a_picture_stay_together(many: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in many.iterdir())
    held: dict[float, set[str]] = {}
    for share in (0.1, 0.4):
        out = tmp_path / f"out{share}"
        options = ("--csv", table(tmp_path, names), "--images", many, "--output", out)
        status, text, err = run("csv", *options, "--holdout", share)
        assert status == 0, err
        held[share], train = names_of(out, "val"), names_of(out, "train")
        assert not held[share] & train and held[share] | train == set(names)
        # Four standard deviations of 300 draws: 21 and 34 samples.
        assert abs(len(held[share]) - share * MANY) < 4 * (MANY * share * (1 - share)) ** 0.5
        splits = listing(out)["splits"]
        assert (splits["train"]["samples"], splits["val"]["samples"]) == (len(train), len(held[share]))
        assert splits["val"]["captions"] == 2 * len(held[share])
        assert f"val: {len(held[share])} pictures" in text
        said = f"--holdout {share}: {len(held[share])} of {MANY} samples went to val, {len(train)} to train"
        assert said in text and said in listing(out)["notes"]
    assert held[0.1] < held[0.4]


def test_neither_order_nor_number_nor_folder_matters(many: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in many.iterdir())
    some = random.Random(0).sample(names, 150)
    common = ("--images", many, "--holdout", 0.2, "--output")
    run("csv", "--csv", table(tmp_path, names), *common, tmp_path / "all")
    run("csv", "--csv", table(tmp_path, names), *common, tmp_path / "again", "--workers", 5)
    run("csv", "--csv", table(tmp_path, some, "some.csv"), *common, tmp_path / "some", "--shuffle-seed", 3)
    assert hashes(tmp_path / "all") == hashes(tmp_path / "again")
    assert names_of(tmp_path / "some", "val") == names_of(tmp_path / "all", "val") & set(some)
    moved = tmp_path / "elsewhere"
    many.rename(moved)
    run("folder", "--images", moved, "--holdout", 0.2, "--output", tmp_path / "folder")
    assert listing(tmp_path / "folder")["splits"]["val"]["samples"] == len(names_of(tmp_path / "all", "val"))


def test_an_interrupted_one_goes_on_to_the_same_bytes(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["folder", "--images", many, "--max-samples", "10", "--output"]
    assert run(*command, tmp_path / "whole", "--holdout", 0.2)[0] == 0
    of_train = listing(tmp_path / "whole")["splits"]["train"]["samples"]
    out, written = tmp_path / "out", ShardWriter.write_files
    for place in (35, of_train - 10):  # samples that this process writes: in train, and then 25 into val
        count = iter(range(MANY))

        def fail(self: Any, *rest: Any, count: Any = count, place: int = place) -> None:
            if next(count) == place:
                raise OSError(28, "No space left on device")
            written(self, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "write_files", fail)
            assert run(*command, out, "--holdout", 0.2)[0] == 1
    assert list((out / ".packing").glob("val-*.tar")) and not list(out.glob("*.tar"))
    status, _, err = run(*command, out, "--holdout", 0.3)
    assert status == 2 and "holdout was 0.2, now 0.3" in err and "other samples or captions" not in err
    status, _, err = run(*command, out)
    assert status == 2 and "holdout was 0.2, now None" in err
    assert run(*command, out, "--holdout", 0.2)[0] == 0
    assert hashes(out) == hashes(tmp_path / "whole")


def test_the_same_bytes_are_never_divided(tmp_path: Path) -> None:
    """Fifty pictures, three copies of each under other names, and others of the same size and the same end."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(50):
        data = picture(folder / f"a{number}.bmp", f"#{number * 50000:06x}", (40, 40))  # 4.8 kB each
        picture(folder / f"c{number}.bmp", f"#{number * 50000:06x}", (40, 40))
        (folder / "deeper").mkdir(exist_ok=True)
        (folder / "deeper" / f"b{number}.bmp").write_bytes(data)
        changed = bytearray(data)
        changed[60] ^= 255  # before the last 4 KiB
        (folder / f"d{number}.bmp").write_bytes(changed)
    status, text, _ = run("folder", "--images", folder, "--output", tmp_path / "out", "--holdout", 0.4)
    told = listing(tmp_path / "out")
    assert status == 0 and len(told["duplicates"]) == 100 and told["across_splits"] == 0
    assert "with the same bytes as an earlier one, packed" in text
    source = read_folder(folder)
    pack(source, tmp_path / "twice", holdout=0.4)
    pack(source, tmp_path / "thrice", holdout=0.4)  # the source is as it was
    assert hashes(tmp_path / "twice") == hashes(tmp_path / "thrice") == hashes(tmp_path / "out")


@pytest.mark.parametrize(("share", "lacking"), [(0.0001, "val"), (0.9999, "train")])
def test_a_split_without_samples_is_said(tmp_path: Path, share: float, lacking: str) -> None:
    folder = five_pictures(tmp_path)
    out = tmp_path / "out"
    status, text, _ = run("folder", "--images", folder, "--output", out, "--holdout", share)
    assert status == 0 and f"There are no {lacking} shards: the share is too" in text
    assert len(listing(out)["splits"]) == 1 and not list(out.glob(f"{lacking}-*"))


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = five_pictures(tmp_path)
    file = write(tmp_path / "table.csv", "image,caption,split\nred.jpg,Red,train\ngreen.jpg,Green,test\n")
    karpathy = write(tmp_path / "k.json", {"images": []})
    csv: tuple[object, ...] = ("csv", "--csv", file, "--images", folder)
    for words, said in (
        ((*csv, "--split-column", "split"), "does not go with --split-column split: give one of the two"),
        ((*csv, "--split", "train"), "does not go with --split train"),
        (("folder", "--images", folder, "--split", "web"), "does not go with --split web"),
        (
            ("flickr", "--tokens", file, "--images", folder, "--lists", file),
            f"does not go with --lists {file}",
        ),
        (("karpathy", "--json", karpathy, "--images", folder), "its file says which split each picture"),
        (("img2dataset", "--shards", folder), "--holdout 0.1 is not for img2dataset: its shards are taken"),
    ):
        failed(capsys, said, *words, "--output", tmp_path / "out", "--holdout", 0.1)
    for share in ("0", "1", "-0.5", "10", "nan"):
        said = f"--holdout must be more than 0 and less than 1 (0.1 holds out a tenth), not {share}"
        failed(capsys, said, *csv, "--output", tmp_path / "out", f"--holdout={share}")
    assert not (tmp_path / "out").exists()


def failed(capsys: pytest.CaptureFixture[str], said: str, *words: object) -> None:
    """The command line says so and nothing is packed."""
    from dataload.pack.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_refusals_in_python(tmp_path: Path) -> None:
    folder = five_pictures(tmp_path)
    file = Path(
        write(tmp_path / "table.csv", "image,caption,split\nred.jpg,Red,train\ngreen.jpg,Green,test\n")
    )
    divided = read_csv(file, folder, split_column="split")
    with pytest.raises(PackError, match=r"the samples have splits already \(test\)"):
        pack(divided, tmp_path / "out", holdout=0.1)
    with pytest.raises(PackError, match="more than 0 and less than 1 .* not 1.5"):
        pack(Source("folder", read_folder(folder).pictures), tmp_path / "out", holdout=1.5)
    assert not (tmp_path / "out").exists()


def test_another_source_without_splits(tmp_path: Path) -> None:
    """COCO's files name no split: a collection of one's own in that format is divided, too."""
    folder = five_pictures(tmp_path)
    file = write(tmp_path / "own.json", coco({path.name: [path.stem] for path in folder.iterdir()}))
    out = tmp_path / "out"
    assert run("coco", "--captions", file, "--images", folder, "--output", out, "--holdout", 0.5)[0] == 0
    assert sum(split["samples"] for split in listing(out)["splits"].values()) == 5
    again = tmp_path / "plain"
    assert run("coco", "--captions", file, "--images", folder, "--output", again)[0] == 0
    assert list(listing(again)["splits"]) == ["train"] and "--holdout" not in str(listing(again)["notes"])
