"""VQA v2 and OK-VQA in their published formats, packed and read back; and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

from packing import packed, picture, run, write


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
