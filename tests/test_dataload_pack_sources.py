"""Folders of label maps, img2dataset's shards and the reader of annotations, packed and read back; what is wrong with them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from packing import five_pictures, opened, packed, picture, run, write
from PIL import Image

from dataload.annotations import annotated, decode_label_map, parse, read_classes
from dataload.broken import BrokenSample
from dataload.shards import expand, index

# --- folders of label maps, and the reader -------------------------------------------------------------------


def test_masks_in_a_second_folder(tmp_path: Path) -> None:
    """Cityscapes' way of names, ADE20K's way of numbers."""
    values = np.arange(1200).reshape(30, 40) % 4
    for city, name in (("aachen", "a_000001"), ("bern", "b_000002"), ("bern", "b_000003")):
        picture(tmp_path / "images" / city / f"{name}_leftImg8bit.png")
        (tmp_path / "maps" / city).mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype(np.uint8)).save(
            tmp_path / "maps" / city / f"{name}_gtFine_labelTrainIds.png"
        )
    (tmp_path / "images" / "bern" / "b_000003_leftImg8bit.png").unlink()
    Image.new("RGB", (40, 30)).save(tmp_path / "maps" / "bern" / "b_000002_gtFine_labelTrainIds.png")
    classes = write(tmp_path / "names.txt", "road\nsky\ncar\n")
    words = ("masks", "--images", tmp_path / "images", "--maps", tmp_path / "maps", "--classes", classes)
    ends = ("--image-end", "_leftImg8bit", "--map-end", "_gtFine_labelTrainIds")
    found, out = packed(tmp_path / "out", *words, *ends, "--reduce-zero", "--ignore", "3")
    assert len(found) == 1 and "1 label maps without a picture" in out
    assert "this picture is RGB" in out, "a map of colours is refused, and listed"
    want = np.select([values == 1, values == 2], [0, 1], 255)
    assert np.array_equal(found[0].label_map, want)
    assert read_classes(tmp_path / "out").segmentation == {0: "road", 1: "sky", 2: "car"}
    assert "--image-end and --map-end" in run(*words, "--output", tmp_path / "x")[2]


def test_the_reader_says_what_is_wrong() -> None:
    good = {"id": 1, "bbox": [0, 0, 1, 1], "category_id": 1, "category": "a"}
    assert parse({"objects": [good]}).objects[0].area == 1
    for record, said in (
        ({"objects": [{**good, "bbox": [1, 2]}]}, "not as expected"),
        ({"objects": [{"id": 1, "bbox": [0, 0, 1, 1]}]}, "without 'category_id'"),
        ({"objects": [{**good, "segmentation": "x"}]}, "polygons or run lengths"),
        ({"questions": [{"question": "?"}]}, "without 'question_id'"),
        ({"regions": 3}, "not as expected"),
    ):
        with pytest.raises(BrokenSample, match=said):
            parse(record, "key")
    with pytest.raises(BrokenSample, match="cannot be read"):
        decode_label_map(b"no picture")
    assert parse({"label": 3}).labels == ("3",) and parse({"label": 3}).has == {"labels"}
    with pytest.raises(ValueError, match="do not say the picture's size"):
        parse({}).scale_to(3, 4)


def test_what_is_needed_and_not_there(tmp_path: Path) -> None:
    pictures = five_pictures(tmp_path)
    assert run("folder", "--images", pictures, "--output", tmp_path / "out")[0] == 0
    shards = opened(tmp_path / "out")
    assert len(list(annotated(shards))) == 5
    with pytest.raises(ValueError, match="none of the 5 samples has objects"):
        list(annotated(shards, ["objects"]))
    with pytest.raises(ValueError, match="'boxes' is not known; supported: objects"):
        list(annotated(shards, ["boxes"]))
    with pytest.raises(FileNotFoundError, match="writes it beside the shards"):
        read_classes(tmp_path / "out")
    write(tmp_path / "out" / "classes.json", {"objects": [{"id": "x"}]})
    with pytest.raises(ValueError, match="is not what dataload.pack writes"):
        read_classes(tmp_path / "out")


# --- img2dataset ---------------------------------------------------------------------------------------------


def laion(folder: Path) -> Path:
    """Two shards as img2dataset 1.45 writes them, with a table and statistics each."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install pyarrow")
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'auroraio[test]'")
    folder.mkdir()
    for shard in range(2):
        rows = []
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(4):
                key, caption = f"{shard:05d}{number:04d}", f"picture {number} of {shard}"
                good = number != 3
                row = {
                    "url": f"https://example.org/{key}.jpg", "caption": caption, "key": key,
                    "status": "success" if good else "failed_to_download",
                    "error_message": None if good else "HTTP Error 404: Not Found", "width": 40 if good else None,
                    "height": 30 if good else None, "original_width": 80 if good else None,
                    "original_height": 60 if good else None, "exif": "{}" if good else None,
                    "sha256": "0" * 64 if good else None,
                }  # fmt: skip
                rows.append(row)
                if good:
                    jpeg = picture(folder / "scratch.jpg", quality=60 + number)
                    for end, data in (
                        ("jpg", jpeg),
                        ("txt", caption.encode()),
                        ("json", json.dumps(row).encode()),
                    ):
                        info = tarfile.TarInfo(f"{key}.{end}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
        (folder / "scratch.jpg").unlink()
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        stats = {
            "count": 4, "successes": 3, "failed_to_download": 1, "failed_to_resize": 0, "duration": 1.0, "start_time": 0.0,
            "end_time": 1.0, "status_dict": {"success": 3, "HTTP Error 404: Not Found": 1},
        }  # fmt: skip
        write(folder / f"{shard:05d}_stats.json", stats)
    return folder


def test_img2dataset_is_read_as_it_is_and_repacked(tmp_path: Path) -> None:
    folder = laion(tmp_path / "laion")
    shards = index(expand([str(folder)]))
    assert len(shards) == 6 and shards.captioned.all() and shards.captions(4) == ["picture 1 of 1"]
    status, out, _ = run("img2dataset", "--shards", folder)
    assert status == 0
    assert "2 shards: 6 samples, 6 with captions" in out
    assert "8 addresses were tried, 2 gave no picture" in out and "2: HTTP Error 404: Not Found" in out
    status, out, _ = run(
        "img2dataset", "--shards", folder, "--output", tmp_path / "out", "--max-samples", "4"
    )
    assert status == 0 and "6 samples in 2 shards" in out
    new = opened(tmp_path / "out")
    assert [new.read_all(n) for n in range(6)] == [shards.read_all(n) for n in range(6)]
    assert [len(shard) for shard in new.shards] == [4, 2]


def test_img2dataset_that_was_interrupted(tmp_path: Path) -> None:
    folder = laion(tmp_path / "laion")
    (folder / "00001_stats.json").unlink()
    (folder / "00002.parquet").write_bytes((folder / "00001.parquet").read_bytes())
    (folder / "00000.tar").write_bytes((folder / "00001.tar").read_bytes())
    status, out, _ = run("img2dataset", "--shards", folder)
    assert status == 1
    assert "00001.tar has no 00001_stats.json" in out and "00002.parquet has no 00002.tar" in out
    assert "00000.tar lacks 3 of the 3 pictures of 00000.parquet, the first is 000000000" in out
    assert "00000.tar has 3 samples that 00000.parquet does not list" in out
    for tar in folder.glob("*.tar"):
        tar.unlink()
    status, _, error = run("img2dataset", "--shards", folder)
    assert status == 2 and "holds no .tar; its 3 tables are lists of addresses" in error
