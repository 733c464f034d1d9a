"""What is true of a generated picture beside its captions: boxes and masks of its objects, questions with answers.

They stand in the sample's JSON as those of packed COCO and VQA do (dataload/annotations.py reads them).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataload.scenes.text import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, TEXTURES, Scene, SceneObject

CATEGORIES = tuple(SHAPES)
"""An object's category is its shape; category_id counts from 1."""
ANNOTATORS = 10  # answers to each question, as in VQA
QUESTIONS = 4  # asked of each picture, of different kinds
CLASSES: dict[str, list[dict[str, Any]]] = {
    "objects": [{"id": i, "name": name} for i, name in enumerate(CATEGORIES, 1)],
    "segmentation": [{"id": i, "name": name} for i, name in enumerate(("background", *CATEGORIES))],
}
"""What classes.json beside the shards says."""


def annotate(
    scene: Scene, masks: Sequence[NDArray[np.bool_]], number: int, words: random.Random
) -> dict[str, Any]:
    """Facts of picture `number`: "image_id", "width", "height", "objects", "questions"."""
    height, width = masks[0].shape
    objects = [
        {**vars(item), **place_of(mask), "id": 10 * number + i, "category_id": CATEGORIES.index(item.shape) + 1,
         "category": item.shape, "iscrowd": 0}
        for i, (item, mask) in enumerate(zip(scene.objects, masks, strict=True))
    ]  # fmt: skip
    questions = [
        {"question_id": 10 * number + i, "question": question, "answers": [answer] * ANNOTATORS,
         "question_type": kind, "answer_type": answer_type(answer), "multiple_choice_answer": answer}
        for i, (kind, question, answer) in enumerate(ask(scene, words))
    ]  # fmt: skip
    return {
        "background": scene.background, "image_id": number, "width": width, "height": height,
        "objects": objects, "questions": questions,
    }  # fmt: skip


def place_of(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Box, area and run lengths (COCO's uncompressed RLE: columns one after the other, zeros first) of bool [H, W]."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    flat = mask.T.reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    ends = np.concatenate([[0] if flat[0] else [], [0], changes, [flat.size]]).astype(np.int64)
    return {
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        "area": int(mask.sum()),
        "segmentation": {"size": list(mask.shape), "counts": np.diff(ends).tolist()},
    }


def ask(scene: Scene, rng: random.Random) -> list[tuple[str, str, str]]:
    """(kind, question, answer) of `QUESTIONS` different kinds. What is asked about is named by a word that only one object
    of the picture answers to; yes and no are equally likely where that is asked."""
    item = rng.choice(scene.objects)
    kinds = ["how many", "background", "is there"]
    shape_is_unique = sum(other.shape == item.shape for other in scene.objects) == 1
    kinds += ["what color", "where", "what size", "what texture"] if shape_is_unique else []
    kinds += ["what shape"] if sum(other.color == item.color for other in scene.objects) == 1 else []
    chosen = rng.sample(kinds, min(QUESTIONS, len(kinds)))
    return [(kind, *_question(kind, scene, item, rng)) for kind in sorted(chosen)]


def _question(kind: str, scene: Scene, item: SceneObject, rng: random.Random) -> tuple[str, str]:
    match kind:
        case "how many":
            return "how many objects are there?", str(len(scene.objects))
        case "background":
            return "what color is the background?", scene.background
        case "is there":
            return _is_there(scene, rng)
        case "what color":
            return f"what color is the {item.shape}?", item.color
        case "where":
            return f"where is the {item.shape}?", item.place
        case "what size":
            return f"what size is the {item.shape}?", item.size
        case "what texture":
            return f"what texture has the {item.shape}?", item.texture
    return f"what shape is the {item.color} object?", item.shape


def _is_there(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Half of the pairs of color and shape are there, half are not: of those, one of the two words often is."""
    there = [(item.color, item.shape) for item in scene.objects]
    color, shape = rng.choice(there)
    if rng.random() < 0.5:
        return f"is there a {color} {shape}?", "yes"
    while (color, shape) in there:
        color = rng.choice(tuple(COLORS)) if rng.random() < 0.5 else color
        shape = rng.choice(tuple(SHAPES)) if rng.random() < 0.5 else shape
    return f"is there a {color} {shape}?", "no"


def answer_type(answer: str) -> str:
    """VQA's three: yes/no, number, other."""
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"


def question_texts() -> list[str]:
    """Words of questions and answers, for the tokenizer."""
    first = SceneObject("circle", "red", "solid", "small", "center")
    scene, rng = Scene("gray", (first,)), random.Random(0)
    kinds = (
        "how many",
        "background",
        "what color",
        "where",
        "what size",
        "what texture",
        "what shape",
        "is there",
    )
    texts = [_question(kind, scene, first, rng)[0] for kind in kinds]
    answers = (*BACKGROUNDS, *COLORS, *SHAPES, *SIZES, *TEXTURES, *PLACES, "1", "2", "yes", "no")
    return [*texts, *answers]
