"""Scores of answers, boxes, masks, label maps and sounds, by the values of the reference implementations and by other means."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from truths import boxes_truth, found_box, maps

from dataload.annotations import Question, parse
from train.scores import audio, detection, segmentation, vqa


def oracle(real_data: Path, name: str) -> Any:
    return json.loads((real_data / "oracles" / "expected.json").read_text())[name]


# --- visual question answering -------------------------------------------------------------------------------

DIGITS = {"1": "one", "2": "two", "3": "three"}
ANSWERS: dict[str, Callable[[Any], str]] = {
    "multiple_choice_answer": lambda note: note["multiple_choice_answer"],
    'always "yes"': lambda note: "yes",
    "answers[0] as is": lambda note: note["answers"][0]["answer"],
    '"The " + answers[0].upper() + " ."': lambda note: f"The {note['answers'][0]['answer'].upper()} .",
    'answers[0] + "!"': lambda note: note["answers"][0]["answer"] + "!",
    "word for digit: replace 1->one 2->two 3->three in answers[0]": lambda note: DIGITS.get(
        note["answers"][0]["answer"], note["answers"][0]["answer"]
    ),
}


def test_vqa_agrees_with_the_official_code(real_data: Path) -> None:
    """8,977 real questions, six ways to answer them; the way "The X ." tells implementations apart."""
    file = real_data / "vqa_v2_text" / "vqa_annotations.json.gz"
    notes = {
        note["question_id"]: note for note in json.loads(gzip.decompress(file.read_bytes()))["annotations"]
    }
    truth = vqa.read_truth(file)
    wanted = oracle(real_data, "vqa_official_on_vqa_v2_text")
    assert wanted.keys() == ANSWERS.keys() and len(truth) == 8977
    for name, answer in ANSWERS.items():
        found = vqa.score_vqa({number: answer(note) for number, note in notes.items()}, truth)
        assert found.accuracy == pytest.approx(wanted[name]["overall"], abs=5e-7), name
        assert found.per_answer_type == pytest.approx(wanted[name]["perAnswerType"], abs=5e-7), name
        assert len(found.per_question_type) > 1 and found.counts["questions"] == 8977
    # min(n / 3, 1) instead of leaving one out is a common mistake, and is another number
    common = {number: note["multiple_choice_answer"] for number, note in notes.items()}
    simple = [
        min(1, sum(given == common[number] for given in one.answers) / 3) for number, one in truth.items()
    ]
    assert 100 * np.mean(simple) == pytest.approx(97.51, abs=0.01)
    assert abs(wanted["multiple_choice_answer"]["overall"] - 97.51) > 0.5


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("The  Red Bus.", "red bus"),
        ("two", "2"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("im", "im"),
        ("3.5 ft", "3.5 ft"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("u.s.a.", "usa"),
        ("x" + "." * 40, "x" + "." * 8),
    ],
)
def test_answers_are_made_the_same(answer: str, plain: str) -> None:
    assert vqa.normalize(answer) == plain


def test_vqa_by_hand() -> None:
    people = ["blue"] * 2 + ["red"] * 3 + ["green"] * 5
    assert vqa.accuracy("red", people) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa.accuracy("blue", people) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa.accuracy("Green.", people) == 1
    assert vqa.accuracy("Green.", ["green"] * 10) == 0, "all agree: the official code compares as is"
    assert vqa.accuracy(" green\n", ["green"] * 10) == 1
    with pytest.raises(ValueError, match="answers of people"):
        vqa.accuracy("green", [])


def okvqa(folder: Path) -> Path:
    """In the layout of mscoco_val2014_annotations.json: every answer raw and stemmed."""
    answers = [
        {"answer_id": n + 1, "raw_answer": raw, "answer_confidence": "yes", "answer": stem}
        for n, (raw, stem) in enumerate([("pony tail", "poni tail")] * 4 + [("braids", "braid")] * 6)
    ]
    note = {
        "image_id": 51606, "answer_type": "other", "question_type": "four", "question_id": 516065, "answers": answers,
        "confidence": 3,
    }  # fmt: skip
    path = folder / "mscoco_val2014_annotations.json"
    path.write_text(json.dumps({"annotations": [note], "question_types": {"four": "Sports and Recreation"}}))
    return path


def test_okvqa_says_which_answers_it_scores(tmp_path: Path) -> None:
    path = okvqa(tmp_path)
    assert vqa.score_vqa({516065: "braid"}, vqa.read_truth(path)).accuracy == 100
    assert vqa.score_vqa({516065: "braids"}, vqa.read_truth(path)).accuracy == 0
    assert vqa.score_vqa({516065: "braids"}, vqa.read_truth(path, "raw_answer")).accuracy == 100
    packed = Question(516065, "?", ("braids",) * 10, stemmed_answers=("braid",) * 10)
    assert vqa.truth_of([packed])[516065].answers[0] == "braid"
    assert vqa.truth_of([packed], "raw_answer")[516065].answers[0] == "braids"
    with pytest.raises(ValueError, match="no field of answers"):
        vqa.read_truth(path, "stem")
    with pytest.raises(ValueError, match="question 516065 comes twice"):
        vqa.truth_of([packed, packed])
    with pytest.raises(ValueError, match="question 1 has no answers"):
        vqa.truth_of([Question(1, "?")])


def test_vqa_results_file_and_refusals(tmp_path: Path) -> None:
    truth = {1: vqa.Truth(("yes",) * 10), 2: vqa.Truth(("no",) * 9 + ("yes",))}
    path = tmp_path / "vqa_OpenEnded_mscoco_val2014_mine_results.json"
    vqa.write_results(path, {2: "no", 1: "yes"})
    assert json.loads(path.read_text()) == [
        {"question_id": 1, "answer": "yes"},
        {"question_id": 2, "answer": "no"},
    ]
    assert vqa.score_vqa(vqa.read_results(path), truth).accuracy == 100
    answer, value = vqa.best_constant(truth)
    assert answer == "yes" and value == pytest.approx(
        (100 + 30) / 2
    )  # of ten one said it: 1/3 for the other nine
    with pytest.raises(
        ValueError, match="1 of 2 questions have no answer, 1 of 2 answers belong to no question"
    ):
        vqa.score_vqa({1: "yes", 3: "no"}, truth)
    path.write_text('[{"question_id": 1, "answer": "a"}, {"question_id": 1, "answer": "b"}]')
    with pytest.raises(ValueError, match="1 questions have more than one answer"):
        vqa.read_results(path)
    path.write_text('{"questions": []}')
    with pytest.raises(ValueError, match="no VQA results file"):
        vqa.read_results(path)
    with pytest.raises(ValueError, match="no file of VQA annotations"):
        vqa.read_truth(path)


# --- detection -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", detection.KINDS)
def test_coco_ap_agrees_with_pycocotools(real_data: Path, kind: str) -> None:
    truth = detection.load_truth(real_data / "coco_mini" / "instances.json")
    given = detection.read_results(real_data / "oracles" / "coco_mini_jitter_detections.json")
    found = detection.score_detections(given, truth, kind)
    assert found.scores == pytest.approx(oracle(real_data, "detection_on_coco_mini_jitter")[kind], abs=1e-12)
    assert found.counts == {
        "images": 119,
        "objects": 1044,
        "crowds": 10,
        "detections": 1012,
        "categories": 78,
    }
    assert found.scores["AP"] == pytest.approx(np.mean(list(found.per_category.values())), abs=1e-12)
    assert len(found.absent) == 2


def test_ap_by_hand_with_ids_that_are_texts() -> None:
    """A hit, then a false one, then a hit: precision is 1 up to half the recall and 2/3 after it."""
    detections = [
        found_box("a", [10, 10, 20, 20], 0.9),
        found_box("a", [70, 50, 10, 10], 0.8),
        found_box("b", [40, 30, 40, 40], 0.7),
    ]
    found = detection.score_detections(detections, boxes_truth())
    assert found.scores["AP"] == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)
    assert found.absent == ("dog",) and found.scores["APl"] is None and found.scores["APs"] is not None
    only = detection.score_detections(detections[:2], boxes_truth(), image_ids=["a"])
    assert only.scores["AP"] == pytest.approx(1) and only.counts["images"] == 1
    nothing = detection.score_detections([], boxes_truth())
    assert nothing.scores["AP"] == 0 and nothing.counts["detections"] == 0


def test_detections_that_do_not_fit_are_refused_with_counts(tmp_path: Path) -> None:
    box = found_box("a", [0, 0, 5, 5], 0.5)
    for wrong, said in (
        (
            {**box, "image_id": "z"},
            r"1 of 2 detections have a image_id that is not among the 2 .* right split",
        ),
        ({**box, "category_id": 1}, "1 of 2 detections have a category_id"),
        ({**box, "score": math.nan}, "1 of 2 detections have a score that is not finite"),
        ({"image_id": "a"}, "1 of 2 detections have no 'category_id', the first is number 1"),
    ):
        with pytest.raises(ValueError, match=said):
            detection.score_detections([box, wrong], boxes_truth())
    with pytest.raises(ValueError, match="no 'segmentation'"):
        detection.score_detections([box], boxes_truth(), "segm")
    with pytest.raises(ValueError, match="not by 'mask'"):
        detection.check("mask")
    twice = boxes_truth()
    twice["images"] *= 2
    with pytest.raises(ValueError, match="2 of 4 pictures of the truth come twice"):
        detection.score_detections([], twice)
    with pytest.raises(ValueError, match="1 of 1 pictures that are to be scored"):
        detection.score_detections([], boxes_truth(), image_ids=["q"])
    path = tmp_path / "captions.json"
    path.write_text('{"images": [], "annotations": [{"caption": "a"}], "categories": []}')
    with pytest.raises(ValueError, match="1 of 1 annotations have no bbox"):
        detection.load_truth(path)
    detection.write_results(path, [box])
    assert detection.read_results(path) == [box]


def test_truth_from_packed_samples_scores_the_same(real_data: Path) -> None:
    """The objects as KEY.json has them, through the reader of annotations."""
    truth = detection.load_truth(real_data / "coco_mini" / "instances.json")
    names = {entry["id"]: entry["name"] for entry in truth["categories"]}
    packed = [
        parse(
            {
                "image_id": image["id"], "width": image["width"], "height": image["height"],
                "objects": [
                    note | {"category": names[note["category_id"]]}
                    for note in truth["annotations"]
                    if note["image_id"] == image["id"]
                ],
            }
        )
        for image in truth["images"]
    ]  # fmt: skip
    given = detection.read_results(real_data / "oracles" / "coco_mini_jitter_detections.json")
    found = detection.score_detections(given, detection.truth_of(packed, names), "segm")
    assert found.scores["AP"] == pytest.approx(
        oracle(real_data, "detection_on_coco_mini_jitter")["segm"]["AP"], abs=1e-12
    )


# --- segmentation --------------------------------------------------------------------------------------------


def test_miou_is_that_of_the_data_set() -> None:
    """By sets of pixels, class by class; class 4 never occurs; the mean over pictures is another number."""
    predicted, truth = maps()
    matrix = segmentation.ConfusionMatrix(["a", "b", "c", "d", "e"])
    for one, right in zip(predicted, truth, strict=True):
        matrix.add(one, right)
    found = matrix.scores()
    flat, right = (np.concatenate([one.ravel() for one in part]) for part in (predicted, truth))
    asked = right != 255
    flat, right = flat[asked], right[asked]
    by_hand = [((flat == k) & (right == k)).sum() / ((flat == k) | (right == k)).sum() for k in range(4)]
    assert found.mIoU == pytest.approx(np.mean(by_hand), abs=1e-12)
    assert found.pixel_accuracy == pytest.approx((flat == right).mean(), abs=1e-12)
    share = [(right == k).mean() for k in range(4)]
    assert found.frequency_weighted_IoU == pytest.approx(np.dot(share, by_hand), abs=1e-12)
    assert found.absent == ("e",) and found.counts == {
        "pictures": 5,
        "pixels": int(asked.sum()),
        "classes": 5,
    }
    single = []
    for one, true in zip(predicted, truth, strict=True):
        matrix = segmentation.ConfusionMatrix(["a", "b", "c", "d"])
        matrix.add(one, true)
        single.append(matrix.scores().mIoU)
    assert abs(np.mean(single) - found.mIoU) > 1e-4


def test_label_maps_that_do_not_fit() -> None:
    truth = np.zeros((4, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match="other sizes"):
        segmentation.pair_counts(np.zeros((4, 5), dtype=np.uint8), truth, 2)
    with pytest.raises(ValueError, match="predicted has values 0 to 2, but there are classes 0 to 1"):
        segmentation.pair_counts(np.eye(4, dtype=np.uint8) * 2, truth, 2)
    with pytest.raises(ValueError, match="the truth has values 3 to 3"):
        segmentation.pair_counts(truth, truth + 3, 2)
    with pytest.raises(ValueError, match="none of the 0 pictures"):
        segmentation.ConfusionMatrix(["a"]).scores()
    with pytest.raises(ValueError, match="1 of 1 true ones have no prediction, 1 predictions belong to none"):
        segmentation.score_maps({"b": truth}, {"a": truth}, ["x"])


def test_folders_of_label_maps(tmp_path: Path) -> None:
    """ADE20K's way: 0 is no class, and 1 to 4 are the classes."""
    predicted, truth = maps()
    for folder, part in (("predicted", predicted), ("truth", truth)):
        (tmp_path / folder).mkdir()
        for number, one in enumerate(part):
            shifted = np.where(one == 255, 0, one + 1).astype(np.uint8) if folder == "truth" else one
            Image.fromarray(shifted).save(tmp_path / folder / f"{number}.png")
    found = segmentation.score_folders(
        tmp_path / "predicted", tmp_path / "truth", list("abcd"), reduce_zero=True
    )
    wanted = segmentation.score_maps(dict(enumerate(predicted)), dict(enumerate(truth)), list("abcd"))
    assert found == wanted
    (tmp_path / "predicted" / "0.png").unlink()
    with pytest.raises(ValueError, match="1 of 5 true ones have no prediction"):
        segmentation.score_folders(tmp_path / "predicted", tmp_path / "truth", list("abcd"), reduce_zero=True)


def test_panoptic_maps_as_the_truth(tmp_path: Path) -> None:
    """Segment ids are colours; two segments of one category are one class; id 0 is void."""
    predicted, truth = maps(3)
    segments, notes = {7: 0, 256 * 9: 1, 65536 * 5 + 3: 2, 12: 3}, []
    for folder in ("predicted", "truth"):
        (tmp_path / folder).mkdir()
    for number, (one, right) in enumerate(zip(predicted, truth, strict=True)):
        ids = np.zeros(right.shape, dtype=np.int64)
        for segment, k in segments.items():
            ids[right == k] = segment
        rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        Image.fromarray(rgb).save(tmp_path / "truth" / f"{number}.png")
        Image.fromarray(one).save(tmp_path / "predicted" / f"{number}.png")
        info = [{"id": segment, "category_id": 10 * k} for segment, k in segments.items()]
        notes.append({"image_id": number, "file_name": f"{number}.png", "segments_info": info})
    file = tmp_path / "panoptic.json"
    categories = [{"id": 10 * k, "name": name} for k, name in enumerate("abcd")]
    file.write_text(json.dumps({"images": [], "categories": categories, "annotations": notes}))
    found = segmentation.score_panoptic(tmp_path / "predicted", file, tmp_path / "truth")
    assert found == segmentation.score_maps(dict(enumerate(predicted)), dict(enumerate(truth)), list("abcd"))
    file.write_text(json.dumps({"categories": categories, "annotations": [{"caption": "a"}]}))
    with pytest.raises(ValueError, match="is not COCO's panoptic segments"):
        segmentation.score_panoptic(tmp_path / "predicted", file, tmp_path / "truth")


# --- sounds --------------------------------------------------------------------------------------------------


def test_map_by_its_definition() -> None:
    """The mean, over a class's clips, of the precision among all clips that score no less."""
    rng = np.random.default_rng(0)
    truth = rng.random((60, 5)) < [0.3, 0.1, 0.5, 0.2, 0.0]
    scores = np.round(rng.normal(size=(60, 5)) + truth, 1)  # rounded: with ties
    found = audio.label_scores(scores, truth, list("abcde"))
    for k, name in enumerate("abcd"):
        own = scores[truth[:, k], k]
        by_hand = np.mean([truth[scores[:, k] >= at, k].mean() for at in own])
        assert found.average_precision[name] == pytest.approx(by_hand, abs=1e-12)
    assert found.skipped == ("e",) and found.counts["scored_classes"] == 4
    assert found.mean_average_precision == pytest.approx(np.mean(list(found.average_precision.values())))
    assert found.chance == pytest.approx(truth[:, :4].mean())
    flat = audio.label_scores(np.zeros((60, 5)), truth, list("abcde"))
    assert flat.average_precision["a"] == pytest.approx(truth[:, 0].mean()), "a constant score is chance"


def test_accuracy_and_what_is_refused() -> None:
    found = audio.accuracy_scores(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]), ["a", "b", "c", "d"])
    assert found.accuracy == 0.75 and found.per_class == {"a": 1, "b": 1, "c": 0.5}
    assert found.majority == 0.5 and found.skipped == ("d",) and found.confusion[2, 1] == 1
    assert found.to_json()["mean_class_accuracy"] == pytest.approx(2.5 / 3)
    with pytest.raises(ValueError, match="classes 0 to 1"):
        audio.accuracy_scores(np.array([0, 2]), np.array([0, 1]), ["a", "b"])
    with pytest.raises(ValueError, match="do not fit"):
        audio.accuracy_scores(np.array([], int), np.array([], int), ["a"])
    with pytest.raises(ValueError, match="1 clips have scores that are not finite"):
        audio.label_scores(np.array([[0.0], [np.nan]]), np.array([[1], [0]]), ["a"])
    with pytest.raises(ValueError, match="none of the 2 clips has any of the 1 classes"):
        audio.label_scores(np.zeros((2, 1)), np.zeros((2, 1)), ["a"])
    with pytest.raises(ValueError, match="do not fit"):
        audio.label_scores(np.zeros((2, 1)), np.zeros((2, 2)), ["a"])
