"""VQA v2 and OK-VQA: the official files of questions and of annotations, and COCO's pictures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from dataload.pack.source import Picture, Source, SourceError, check_folder, inside, load_json, need

PATTERNS = ("COCO_{subtype}_{id:012d}.jpg", "{id:012d}.jpg", "{id}.jpg")
"""of the pictures' names: COCO 2014 and 2015, COCO 2017, others"""


def read_vqa(
    questions: Path,
    images: Path,
    *,
    annotations: Path | None = None,
    split: str = "train",
    pattern: str | None = None,
) -> Source:
    """Reads questions and, but for a test split, their answers; a picture with all its questions is one sample.

    Pictures are images/COCO_<subtype>_<id>.jpg with the subtype that the file states, or images/<id>.jpg; also in a folder
    images/<subtype>. `pattern`: another name, with {id} and {subtype} as Python formats them. OK-VQA's raw answers become
    "answers", its stemmed ones "stemmed_answers". Raises SourceError for other files, and where questions and annotations
    are not of the same split.
    """
    check_folder(images)
    data = load_json(questions, "questions")
    subtype = str(data.get("data_subtype", ""))
    answers = _answers(annotations, questions, subtype) if annotations is not None else {}
    asked: dict[Any, list[dict[str, Any]]] = {}
    numbers: Counter[Any] = Counter()
    for entry in data["questions"]:
        number = need(entry, "question_id", questions)
        numbers[number] += 1
        facts = {"question_id": number, "question": need(entry, "question", questions)}
        if number in answers:
            note = answers[number]
            if note["image_id"] != need(entry, "image_id", questions):
                raise SourceError(
                    f"question {number} is about image {entry['image_id']} in {questions} and "
                    f"{note['image_id']} in {annotations}"
                )
            facts |= note["facts"]
        asked.setdefault(need(entry, "image_id", questions), []).append(facts)
    if doubled := [number for number, count in numbers.items() if count > 1]:
        raise SourceError(f"{questions}: {len(doubled):,} question ids come twice, the first is {doubled[0]}")
    source = Source("vqa", [])
    if annotations is not None:
        _same_questions(numbers.keys(), answers.keys(), questions, annotations, source)
    naming = _Naming(images, subtype, pattern)
    for number, several in asked.items():
        name = naming(number)
        source.pictures.append(
            Picture(
                inside(images, name, str(questions)), name, split, (),
                {"image_id": number, "file_name": name, "questions": several},
            )
        )  # fmt: skip
    source.notes.append(
        f"{len(numbers):,} questions about {len(asked):,} pictures, {len(answers):,} with answers"
    )
    return source


def _answers(file: Path, questions: Path, subtype: str) -> dict[Any, dict[str, Any]]:
    data = load_json(file, "answers")
    theirs = str(data.get("data_subtype", ""))
    if subtype and theirs and subtype != theirs:
        raise SourceError(
            f"{questions} is of {subtype!r} and {file} of {theirs!r}: they are of different splits"
        )
    found: dict[Any, dict[str, Any]] = {}
    for note in data["annotations"]:
        number, given = need(note, "question_id", file), need(note, "answers", file)
        if number in found:
            raise SourceError(f"{file}: question {number} is annotated twice")
        stemmed = [str(need(one, "answer", file)) for one in given]
        raw = [str(one["raw_answer"]) for one in given if "raw_answer" in one]
        facts: dict[str, Any] = {"answers": raw if len(raw) == len(given) else stemmed}
        if raw:
            if len(raw) != len(given):
                raise SourceError(
                    f"{file}: question {number} has {len(raw)} raw answers for {len(given)} answers"
                )
            facts["stemmed_answers"] = stemmed
        facts |= {
            key: str(note[key])
            for key in ("question_type", "answer_type", "multiple_choice_answer")
            if key in note
        }
        found[number] = {"image_id": need(note, "image_id", file), "facts": facts}
    return found


def _same_questions(asked: Any, answered: Any, questions: Path, annotations: Path, source: Source) -> None:
    """Refuses files that have no question in common, and counts what one has and the other has not."""
    common = len(asked & answered)
    if not common:
        raise SourceError(
            f"none of the {len(asked):,} questions of {questions} is among the {len(answered):,} of {annotations}: are they of "
            "the same split?"
        )
    if without := [str(number) for number in asked if number not in answered]:
        source.problems[f"questions without annotations in {annotations.name}, packed without answers"] = (
            without
        )
    if orphans := [str(number) for number in answered if number not in asked]:
        source.problems[f"annotations of questions that {questions.name} does not list"] = orphans


class _Naming:
    """From an image id to the name of its file: by the pattern that finds a picture, or the first."""

    def __init__(self, images: Path, subtype: str, pattern: str | None) -> None:
        self.images, self.subtype, self.found = images, subtype, pattern
        patterns = [one for one in PATTERNS if subtype or "{subtype}" not in one]
        folders = [f"{subtype}/{one}" for one in patterns] if subtype else []
        self.candidates = [pattern] if pattern else [*patterns, *folders]

    def __call__(self, number: Any) -> str:
        if self.found is None:
            # The first pattern that finds a picture is that of all: a name that is missing costs one look each.
            self.found = next(
                (one for one in self.candidates if one and (self.images / self._name(one, number)).is_file()),
                None,
            )
        return self._name(self.found or str(self.candidates[0]), number)

    def _name(self, pattern: str, number: Any) -> str:
        try:
            return pattern.format(id=number, subtype=self.subtype)
        except ValueError:  # an id that is a text has no twelve digits
            return f"{number}.jpg"
        except (KeyError, IndexError) as error:
            raise SourceError(
                f"--image-pattern {pattern!r}: {error} is not known; there are id and subtype"
            ) from None
