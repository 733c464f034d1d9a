"""COCO's captions, instances, stuff and panoptic files, packed and read back; and what is wrong with them."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packing import coco, five_pictures, listing, opened, packed, picture, run, write
from PIL import Image
from pycocotools.coco import COCO

from dataload.annotations import annotated, read_classes
from dataload.reshard import ReshardError, reshard
from dataload.shards import expand, index


def test_coco_captions_and_instances(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "coco_mini"
    given = json.loads((folder / "instances.json").read_text())
    files = ("--captions", folder / "captions.json", "--instances", folder / "instances.json")
    found, out = packed(tmp_path, "coco", *files, "--images", folder / "images")
    assert "595 captions" in out and "1,054 objects" in out
    assert listing(tmp_path)["beside"] == ["classes.json"]
    classes = read_classes(tmp_path)
    assert classes.objects == {entry["id"]: entry["name"] for entry in given["categories"]}
    assert len(found) == 119 and sum(len(one.objects) for one in found) == 1054
    notes = {note["id"]: note for note in given["annotations"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in given["images"]}
    for one in found:
        assert (one.width, one.height) == sizes[one.image_id] and len(one.captions) == 5
        for thing in one.objects:
            note = notes[thing.id]
            assert note["image_id"] == one.image_id
            assert list(thing.bbox) == note["bbox"] and thing.area == note["area"]
            assert thing.category == classes.objects[note["category_id"]] and thing.iscrowd == bool(
                note["iscrowd"]
            )
    theirs = COCO()
    theirs.dataset = given
    with contextlib.redirect_stdout(io.StringIO()):
        theirs.createIndex()
    chosen = [(one, thing) for one in found for thing in one.objects if thing.iscrowd or one in found[:5]]
    assert sum(thing.iscrowd for _, thing in chosen) == 10
    for one, thing in chosen:
        assert np.array_equal(
            thing.mask(one.height, one.width), theirs.annToMask(notes[thing.id]).astype(bool)
        )


def test_boxes_and_masks_follow_a_picture_that_is_made_smaller(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "coco_mini"
    command = ("coco", "--instances", folder / "instances.json", "--images", folder / "images")
    whole, _ = packed(tmp_path / "whole", *command)
    small, _ = packed(tmp_path / "small", *command, "--resize", "160")
    shards = opened(tmp_path / "small")
    for before, after in zip(whole, small, strict=True):
        with Image.open(io.BytesIO(shards.image(after.sample))) as image:
            assert image.size == (after.width, after.height) and min(image.size) == 160
        x, y = before.scale_to(after.width, after.height)
        for old, new in zip(before.objects, after.objects, strict=True):
            assert new.bbox == pytest.approx(
                (old.bbox[0] * x, old.bbox[1] * y, old.bbox[2] * x, old.bbox[3] * y), abs=0.006
            )
            assert new.area == pytest.approx(old.area * x * y, abs=1e-3)
    crowds = [
        (b, a, k) for b, a in zip(whole, small, strict=True) for k, t in enumerate(b.objects) if t.iscrowd
    ]
    some = [(b, a, k) for b, a in zip(whole[:6], small[:6], strict=True) for k in range(len(b.objects))]
    for before, after, place in crowds + some:
        old = before.objects[place].mask(before.height, before.width)
        new = after.objects[place].mask(after.height, after.width)
        wanted = np.asarray(
            Image.fromarray(old).resize((after.width, after.height), Image.Resampling.NEAREST)
        )
        either = (wanted | new).sum()
        # a pixel of the rim may fall on either side of it
        assert either == 0 or (wanted ^ new).sum() <= 2 * np.sqrt(either) * np.pi, after.key


def scene(folder: Path) -> dict[str, Any]:
    """Two pictures of 40 x 30 with known places: COCO's instances, and the true label map of the first."""
    picture(folder / "pictures" / "a.jpg")
    picture(folder / "pictures" / "b.jpg", "blue")
    images = [
        {"id": n, "file_name": f"{name}.jpg", "width": 40, "height": 30} for n, name in ((5, "a"), (9, "b"))
    ]
    square = [10.0, 5.0, 20.0, 5.0, 20.0, 15.0, 10.0, 15.0]
    return {
        "images": images,
        "categories": [{"id": 1, "name": "person"}, {"id": 184, "name": "tree-merged"}, {"id": 200, "name": "rug-merged"}],
        "annotations": [
            {
                "id": 1, "image_id": 5, "category_id": 184, "bbox": [10, 5, 10, 10], "area": 100, "iscrowd": 0,
                "segmentation": [square],
            }
        ],
    }  # fmt: skip


def test_stuff_masks_become_a_label_map(tmp_path: Path) -> None:
    file = write(tmp_path / "stuff_val2017.json", scene(tmp_path))
    found, out = packed(tmp_path / "out", "coco", "--stuff", file, "--images", tmp_path / "pictures")
    assert "1 label maps" in out and "1 of 2 pictures have no masks of stuff" in out
    want = np.full((30, 40), 255, dtype=np.uint8)
    want[5:15, 10:20] = 1
    assert np.array_equal(found[0].label_map, want) and found[1].label_map is None
    assert found[0].has == {"segmentation"} and (found[0].width, found[0].height) == (40, 30)
    assert read_classes(tmp_path / "out").segmentation == {0: "person", 1: "tree-merged", 2: "rug-merged"}
    small, _ = packed(
        tmp_path / "small", "coco", "--stuff", file, "--images", tmp_path / "pictures", "--resize", "15"
    )
    assert np.array_equal(
        small[0].label_map, np.asarray(Image.fromarray(want).resize((20, 15), Image.Resampling.NEAREST))
    )


def panoptic(folder: Path) -> tuple[str, Path]:
    """panoptic_val2017.json and its folder: segment ids are colours, R + 256 G + 65536 B."""
    data = scene(folder)
    maps = folder / "panoptic_val2017"
    maps.mkdir()
    notes = []
    for image in data["images"]:
        ids = np.zeros((30, 40), dtype=np.int64)
        ids[:10], ids[20:] = 7_000_000 + image["id"], 300
        rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        name = image["file_name"].replace("jpg", "png")
        Image.fromarray(rgb).save(maps / name)
        segments = [
            {"id": number, "category_id": category, "iscrowd": 0, "bbox": [0, 0, 40, 10], "area": 400}
            for number, category in ((7_000_000 + image["id"], 200), (300, 1))
        ]
        notes.append({"image_id": image["id"], "file_name": name, "segments_info": segments})
    return write(folder / "panoptic.json", data | {"annotations": notes}), maps


def test_panoptic_segments_become_a_label_map(tmp_path: Path) -> None:
    file, maps = panoptic(tmp_path)
    found, _ = packed(
        tmp_path / "out",
        "coco",
        "--panoptic",
        file,
        "--panoptic-maps",
        maps,
        "--images",
        tmp_path / "pictures",
    )
    want = np.full((30, 40), 255, dtype=np.uint8)
    want[:10], want[20:] = 2, 0
    assert [np.array_equal(one.label_map, want) for one in found] == [True, True]
    given = json.loads((tmp_path / "out" / "classes.json").read_text())["segmentation"]
    assert given[2] == {"id": 2, "name": "rug-merged", "source_id": 200}


def test_stuff_maps_with_their_labels(tmp_path: Path) -> None:
    file = write(tmp_path / "instances.json", scene(tmp_path))
    maps = tmp_path / "maps"
    maps.mkdir()
    values = np.arange(1200, dtype=np.int64).reshape(30, 40) % 182
    values[0, 0] = 255
    for name in "ab":
        Image.fromarray(values.astype(np.uint8)).save(maps / f"{name}.png")
    labels = write(tmp_path / "labels.txt", "0: unlabeled\n1: person\n2: bicycle\n182: wood\n")
    command = ("coco", "--instances", file, "--images", tmp_path / "pictures", "--stuff-maps", maps)
    found, _ = packed(tmp_path / "out", *command, "--stuff-labels", labels)
    assert np.array_equal(found[1].label_map, values) and found[0].has == {"objects", "segmentation"}
    assert read_classes(tmp_path / "out").segmentation == {0: "person", 1: "bicycle", 181: "wood"}
    (maps / "b.png").unlink()
    status, out, error = run(*command, "--stuff-labels", labels, "--output", tmp_path / "again")
    assert status == 0 and "1 of 2 samples are missing" in error and "b.png" in error
    assert "b.jpg: the label map b.png is missing" in out
    assert run(*command, "--stuff-labels", labels, "--output", tmp_path / "strict", "--require-all")[0] == 2
    status, _, error = run(*command, "--output", tmp_path / "none")
    assert status == 2 and "COCO-Stuff's labels.txt" in error


def test_files_of_two_splits_are_refused(tmp_path: Path) -> None:
    pictures = five_pictures(tmp_path)
    captions = write(tmp_path / "captions.json", coco({"red.jpg": ["a"], "blue.jpg": ["b"]}))
    objects = scene(tmp_path)
    file = write(tmp_path / "instances.json", objects)
    command = ("coco", "--captions", captions, "--instances", file, "--images", pictures)
    status, _, error = run(*command, "--output", tmp_path / "out")
    assert status == 2 and "none of them is among the 2" in error and "same split" in error
    objects["images"][0]["id"] = 2**31 + 7
    write(tmp_path / "instances.json", objects)
    assert "is a.jpg here and red.jpg in another file" in run(*command, "--output", tmp_path / "out")[2]
    objects["images"][0]["file_name"] = "red.jpg"
    objects["annotations"][0]["image_id"] = 77
    write(tmp_path / "instances.json", objects)
    status, out, error = run(*command, "--output", tmp_path / "out")
    assert status == 0
    assert (
        "1 of 3 pictures are not in instances.json" in out
        and "1 of 3 pictures are not in captions.json" in out
    )
    assert "1 objects of an image id that the file does not list" in error
    objects["annotations"][0]["category_id"] = 3
    write(tmp_path / "instances.json", objects)
    assert "the category 3, which is not listed" in run(*command, "--output", tmp_path / "more")[2]


def test_boxes_for_a_picture_of_another_size_are_noticed(tmp_path: Path) -> None:
    data = scene(tmp_path)
    picture(tmp_path / "pictures" / "a.jpg", size=(20, 15))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: 30 x 40 as stored is 40 x 30 upright
    picture(tmp_path / "pictures" / "b.jpg", size=(30, 40), exif=exif)
    file = write(tmp_path / "instances.json", data)
    status, out, _ = run(
        "coco", "--instances", file, "--images", tmp_path / "pictures", "--output", tmp_path / "out"
    )
    assert status == 0
    assert "a.jpg: the annotations are for 40x30 pixels, the picture has 20x15" in out
    assert [one.image_id for one in annotated(opened(tmp_path / "out"))] == [9]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "coco needs --captions, --instances, --stuff or --panoptic"),
        (("--panoptic", "panoptic.json"), "--panoptic-maps DIR has to say"),
        (
            ("--stuff", "panoptic.json", "--panoptic", "panoptic.json"),
            "--stuff and --panoptic each make a label map",
        ),
        (("--instances", "panoptic.json"), "it is COCO panoptic segments"),
    ],
)
def test_coco_says_what_it_needs(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    panoptic(tmp_path)
    words = tuple(str(tmp_path / word) if word.endswith("json") else word for word in words)
    status, _, error = run("coco", *words, "--images", tmp_path / "pictures", "--output", tmp_path / "out")
    assert status == 2 and said in error, error


def test_classes_go_along_when_shards_are_written_anew(tmp_path: Path) -> None:
    file = write(tmp_path / "instances.json", scene(tmp_path))
    packed(tmp_path / "one", "coco", "--instances", file, "--images", tmp_path / "pictures")
    reshard(opened(tmp_path / "one"), tmp_path / "new")
    assert read_classes(tmp_path / "new") == read_classes(tmp_path / "one")
    assert run("folder", "--images", tmp_path / "pictures", "--output", tmp_path / "new")[0] == 2, (
        "no packing of ours"
    )
    assert packed(tmp_path / "third", "coco", "--instances", file, "--images", tmp_path / "pictures")
    words = ("folder", "--images", tmp_path / "pictures", "--output", tmp_path / "third", "--overwrite")
    assert run(*words)[0] == 0 and not (tmp_path / "third" / "classes.json").exists()
    other = json.loads(Path(file).read_text())
    other["categories"].append({"id": 300, "name": "cloud"})
    write(tmp_path / "instances.json", other)
    packed(tmp_path / "two", "coco", "--instances", file, "--images", tmp_path / "pictures")
    both = index(expand([str(tmp_path / "one" / "*.tar"), str(tmp_path / "two" / "*.tar")]))
    with pytest.raises(ReshardError, match="one number would stand for two classes"):
        reshard(both, tmp_path / "both")
