"""Visual Genome in its published format, packed and read back; and what is wrong with it."""

from __future__ import annotations

from pathlib import Path

from packing import packed, picture, run, write

from dataload.annotations import read_classes


def genome(folder: Path) -> list[str]:
    """Files as visualgenome.org publishes them (version 1.2 and 1.4)."""
    picture(folder / "VG_100K" / "1.jpg", size=(80, 60))
    picture(folder / "VG_100K_2" / "2.jpg", "blue", size=(50, 70))
    regions = [
        {
            "id": 1,
            "regions": [
                {
                    "region_id": 1382,
                    "width": 8,
                    "height": 13,
                    "image_id": 1,
                    "phrase": "the clock is green in colour",
                    "y": 5,
                    "x": 42,
                },
                {"region_id": 1383, "width": 8, "height": 13, "image_id": 1, "phrase": " ", "y": 5, "x": 42},
            ],
        },
        {
            "id": 2,
            "regions": [
                {"region_id": 5, "width": 20, "height": 10, "image_id": 2, "phrase": "a man", "y": 0, "x": 3}
            ],
        },
    ]
    tree = {
        "synsets": ["tree.n.01"],
        "h": 55,
        "object_id": 1058549,
        "merged_object_ids": [],
        "names": ["trees"],
        "w": 79,
        "y": 0,
        "x": 0,
    }
    sky = tree | {"object_id": 1058550, "names": ["sky"], "synsets": []}
    objects = [
        {"image_id": 1, "objects": [tree, sky], "image_url": "https://example.org/VG_100K/1.jpg"},
        {"image_id": 2, "objects": [sky | {"object_id": 7}]},
    ]
    data = [
        {"image_id": n, "width": w, "height": h, "url": "", "coco_id": None, "flickr_id": None}
        for n, w, h in ((1, 80, 60), (2, 50, 70))
    ]
    qas = [
        {
            "id": 1,
            "qas": [
                {
                    "qa_id": 986768,
                    "image_id": 1,
                    "question": "What color?",
                    "answer": "Green.",
                    "a_objects": [],
                    "q_objects": [],
                }
            ],
        }
    ]
    files = {"regions": regions, "objects": objects, "image-data": data, "questions": qas}
    return [
        word
        for name, content in files.items()
        for word in (f"--{name}", write(folder / f"{name}.json", content))
    ]


def test_visual_genome(tmp_path: Path) -> None:
    found, out = packed(tmp_path / "out", "visual-genome", *genome(tmp_path), "--images", tmp_path)
    assert "3 objects, 1 questions, 2 regions" in out and "1 regions without a phrase" in out
    one, two = found
    assert one.image_id == 1 and (one.width, one.height) == (80, 60) and one.captions == ()
    assert one.regions[0].phrase == "the clock is green in colour" and one.regions[0].bbox == (42, 5, 8, 13)
    assert [thing.category for thing in one.objects] == ["trees", "sky"] and one.objects[0].bbox == (
        0,
        0,
        79,
        55,
    )
    assert (
        read_classes(tmp_path / "out").objects == {1: "sky", 2: "trees"} and one.objects[1].category_id == 1
    )
    assert one.questions[0].answers == ("Green.",) and two.questions == () and two.has >= {"questions"}
    small, _ = packed(
        tmp_path / "small",
        "visual-genome",
        *genome(tmp_path),
        "--images",
        tmp_path,
        "--resize",
        "30",
        "--regions-as-captions",
    )
    assert small[0].regions[0].bbox == (21, 2.5, 4, 6.5) and small[0].captions == (
        "the clock is green in colour",
    )


def test_visual_genome_that_is_not_whole(tmp_path: Path) -> None:
    words = genome(tmp_path)
    (tmp_path / "VG_100K_2" / "2.jpg").unlink()
    status, out, error = run("visual-genome", *words, "--images", tmp_path, "--output", tmp_path / "out")
    assert status == 0 and "1 of 2 samples are missing" in error and "1 pictures missing on disk" in out
    swapped = [word.replace("objects.json", "regions.json") for word in words]
    assert (
        "is not Visual Genome's objects"
        in run("visual-genome", *swapped, "--images", tmp_path, "--output", tmp_path / "x")[2]
    )
    write(tmp_path / "image-data.json", [{"image_id": 99, "width": 1, "height": 1}])
    error = run("visual-genome", *words, "--images", tmp_path, "--output", tmp_path / "x")[2]
    assert "the file of image data has no picture in common" in error
    assert "needs --regions" in run("visual-genome", "--images", tmp_path, "--output", tmp_path / "x")[2]
