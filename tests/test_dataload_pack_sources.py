"""Every named source in its published format, packed and read back through dataload.annotations; and what is wrong with it."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packing import coco, five_pictures, listing, picture, run, write
from PIL import Image
from pycocotools.coco import COCO

from dataload.annotations import Annotations, annotated, decode_label_map, parse, read_classes
from dataload.broken import BrokenSample
from dataload.shards import ShardIndex, expand, index


def opened(folder: Path, split: str = "train") -> ShardIndex:
    return index(expand([str(folder / f"{split}-*.tar")]))


def packed(folder: Path, *words: object, split: str = "train") -> tuple[list[Annotations], str]:
    """Runs a command into `folder` and reads everything back: (annotations in order, what it printed)."""
    status, out, error = run(*words, "--output", folder)
    assert status == 0, error
    return list(annotated(opened(folder, split))), out + error


# --- COCO ----------------------------------------------------------------------------------------------------


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


# --- VQA -----------------------------------------------------------------------------------------------------


def test_vqa_questions_of_real_pictures(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "coco_mini"
    questions, notes = folder / "vqa_questions.json", folder / "vqa_annotations.json"
    found, out = packed(
        tmp_path, "vqa", "--questions", questions, "--annotations", notes, "--images", folder / "images"
    )
    assert "29 questions" in out and "29 with answers" in out
    given = {note["question_id"]: note for note in json.loads(notes.read_text())["annotations"]}
    asked = {entry["question_id"]: entry for entry in json.loads(questions.read_text())["questions"]}
    read = {question.question_id: (one, question) for one in found for question in one.questions}
    assert read.keys() == given.keys() == asked.keys()
    for number, (one, question) in read.items():
        assert one.image_id == given[number]["image_id"] and question.question == asked[number]["question"]
        assert list(question.answers) == [answer["answer"] for answer in given[number]["answers"]]
        assert len(question.answers) == 10 and question.stemmed_answers == ()
        assert question.answer_type == given[number]["answer_type"]
        assert question.multiple_choice_answer == given[number]["multiple_choice_answer"]


def test_vqa_without_its_pictures_says_so_at_once(real_data: Path, tmp_path: Path) -> None:
    """8,977 questions about pictures of train2014, of which none is here."""
    folder = real_data / "vqa_v2_text"
    status, _, error = run(
        "vqa", "--questions", folder / "vqa_questions.json.gz", "--annotations", folder / "vqa_annotations.json.gz",
        "--images", real_data / "flickr8k_2000" / "images", "--output", tmp_path / "out",
    )  # fmt: skip
    assert (
        status == 2
        and "none of the" in error
        and "COCO_train2014_000000" in error
        and "is --images right?" in error
    )
    assert not list((tmp_path / "out").glob("*.tar"))


def vqa_files(folder: Path, subtype: str = "val2014", raw: bool = False) -> tuple[Path, Path]:
    """Official files of two questions about two pictures; `raw`: with OK-VQA's two kinds of answers."""
    answers = [
        {
            "answer_id": n + 1,
            "answer_confidence": "yes",
            "answer": "poni tail",
            **({"raw_answer": "pony tail"} if raw else {}),
        }
        for n in range(10)
    ]
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": subtype}
    asked = [
        {"image_id": 42, "question": "What hair style?", "question_id": 42000},
        {"image_id": 7, "question": "Which?", "question_id": 7001},
    ]
    notes = [
        {"image_id": q["image_id"], "question_id": q["question_id"], "question_type": "what",
         "answer_type": "other", "answers": answers}
        for q in asked
    ]  # fmt: skip
    questions = write(folder / "questions.json", head | {"task_type": "Open-Ended", "questions": asked})
    return Path(questions), Path(write(folder / "annotations.json", head | {"annotations": notes}))


def test_okvqa_keeps_raw_and_stemmed_answers(tmp_path: Path) -> None:
    questions, notes = vqa_files(tmp_path, raw=True)
    picture(tmp_path / "val2014" / "COCO_val2014_000000000042.jpg")
    words = ("vqa", "--questions", questions, "--annotations", notes, "--images", tmp_path, "--split", "val")
    found, said = packed(tmp_path / "out", *words, split="val")
    assert len(found) == 1 and found[0].questions[0].answers == ("pony tail",) * 10
    assert found[0].questions[0].stemmed_answers == ("poni tail",) * 10
    assert "1 of 2 samples are missing" in said and "COCO_val2014_000000000007.jpg" in said
    test_split, _ = packed(
        tmp_path / "test", "vqa", "--questions", questions, "--images", tmp_path, "--image-pattern",
        "{subtype}/COCO_{subtype}_{id:012d}.jpg",
    )  # fmt: skip
    assert test_split[0].questions[0].answers == ()


def test_vqa_files_that_do_not_belong_together(tmp_path: Path) -> None:
    questions, _ = vqa_files(tmp_path)
    picture(tmp_path / "42.jpg")
    other = tmp_path / "other"
    other.mkdir()
    _, notes = vqa_files(other, "train2014")
    words = (
        "vqa",
        "--questions",
        questions,
        "--images",
        tmp_path,
        "--output",
        tmp_path / "out",
        "--annotations",
    )
    assert "they are of different splits" in run(*words, notes)[2]
    data = json.loads(notes.read_text()) | {"data_subtype": ""}
    for note in data["annotations"]:
        note["question_id"] += 1
    write(notes, data)
    assert "none of the 2 questions" in run(*words, notes)[2]
    data["annotations"][0]["question_id"] -= 1
    write(notes, data)
    status, _, error = run(*words, notes)
    assert (
        status == 0 and "1 questions without annotations" in error and "1 annotations of questions" in error
    )
    data["annotations"][0]["image_id"] = 8
    write(notes, data)
    assert "question 42000 is about image 42" in run(*words, notes)[2]
    assert "it is a file of VQA questions" in run(*words, questions)[2]


# --- Visual Genome -------------------------------------------------------------------------------------------


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


# --- Flickr30k -----------------------------------------------------------------------------------------------


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


# --- AudioSet ------------------------------------------------------------------------------------------------

SEGMENTS = """\
# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=4, num_segs=4, num_unique_labels=3, num_positive_labels=5
# YTID, start_seconds, end_seconds, positive_labels
--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/0bt9lr"
-0RWZT-miFs, 420.000, 430.000, "/m/0bt9lr"
-0xzrMun0Rs, 30.000, 40.000, "/m/09x0r"
0123456789A, 30.500, 40.500, "/m/09x0r"
"""
CLASSES = (
    'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/068hy,"Domestic animals, pets"\n2,/m/0bt9lr,"Dog"\n'
)


def audioset(folder: Path, real: Path) -> list[object]:
    """Real clips under AudioSet's names, and its three files."""
    clips = sorted((real / "audio_events" / "audio").rglob("*.ogg"))[:4]
    (folder / "clips" / "deeper").mkdir(parents=True)
    for name, clip in zip(
        ("--4gqARaEJE_0", "deeper/Y-0RWZT-miFs", "-0xzrMun0Rs_30000_40000", "other"), clips, strict=True
    ):
        (folder / "clips" / f"{name}.ogg").write_bytes(clip.read_bytes())
    names = (("/m/09x0r", "Speech"), ("/m/068hy", "Domestic animals, pets"), ("/m/0bt9lr", "Dog"))
    tree = [
        {"id": mid, "name": name, "description": "", "child_ids": [], "restrictions": []}
        for mid, name in names
    ]
    tree.append(
        {"id": "/m/0dgw9r", "name": "Human sounds", "child_ids": ["/m/09x0r"], "restrictions": ["abstract"]}
    )
    return [
        "audioset", "--segments", write(folder / "eval_segments.csv", SEGMENTS), "--clips", folder / "clips",
        "--ontology", write(folder / "ontology.json", tree),
    ]  # fmt: skip


def test_audioset(real_data: Path, tmp_path: Path) -> None:
    words = audioset(tmp_path, real_data)
    classes = write(tmp_path / "class_labels_indices.csv", CLASSES)
    found, said = packed(tmp_path / "out", *words, "--class-labels", classes, "--split", "eval", split="eval")
    assert "1 of 4 samples are missing" in said and "0123456789A_30.500" in said
    assert "1 other clips" in said and "3 with a label" in said
    assert found[0].labels == ("Domestic animals, pets", "Dog") and found[0].label_ids == (
        "/m/068hy",
        "/m/0bt9lr",
    )
    assert [one.labels[-1] for one in found] == ["Dog", "Dog", "Speech"]
    assert list(read_classes(tmp_path / "out").labels.items())[1] == ("/m/068hy", "Domestic animals, pets")
    assert opened(tmp_path / "out", "eval").has("audio").all()
    by_tree, _ = packed(tmp_path / "tree", *words)
    assert [one.labels for one in by_tree] == [one.labels for one in found]
    assert len(read_classes(tmp_path / "tree").labels) == 3, "abstract classes are none"


def test_audioset_that_does_not_fit(real_data: Path, tmp_path: Path) -> None:
    words = audioset(tmp_path, real_data)
    output = ("--output", tmp_path / "out")
    classes = write(tmp_path / "class_labels_indices.csv", CLASSES.replace("/m/0bt9lr", "/m/other"))
    error = run(*words, *output, "--class-labels", classes)[2]
    assert "1 of 3 classes" in error and "/m/other" in error, "not in the ontology"
    error = run(*words[:5], *output, "--class-labels", classes)[2]
    assert "has 1 labels that" in error and "/m/0bt9lr" in error
    assert "names them" in run(*words[:5], *output)[2]
    segments = Path(str(words[2]))
    segments.write_text(SEGMENTS.replace('"/m/068hy,/m/0bt9lr"', "/m/068hy,/m/0bt9lr"))
    assert "line 4: a segment is YTID" in run(*words, *output)[2]
    segments.write_text(SEGMENTS.rsplit("\n", 2)[0] + "\n")
    assert "says that it has 4 segments, and has 3" in run(*words, *output)[1]
    (tmp_path / "clips" / "-0xzrMun0Rs_30000_40000.ogg").rename(tmp_path / "clips" / "-0xzrMun0Rs.ogg")
    segments.write_text(SEGMENTS + '-0xzrMun0Rs, 50.000, 60.000, "/m/09x0r"\n')
    assert "names need the segment's start" in run(*words, *output, "--overwrite")[2]


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
    pyarrow = pytest.importorskip("pyarrow")
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
