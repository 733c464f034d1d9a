"""COCO average precision of boxes and masks, by pycocotools.

    truth = load_truth(Path("instances_val2017.json"))                 # or truth_of(annotated(index, ...), classes)
    found = score_detections(read_results(Path("boxes.json")), truth, "bbox")
    found.scores["AP"], found.scores["AP50"], found.per_category["person"]

A detection is COCO's: {"image_id", "category_id", "bbox": [left, top, width, height], "score"} with, for masks,
"segmentation" (run lengths or polygons), all in pixels of the picture as the truth has it. At most 100 per picture count.

Masks are sorted into small, medium and large by their own area: pycocotools takes the box's where a box is there, so
boxes are left out when masks are scored.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataload.annotations import Annotations, mask_tools, run_lengths

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KINDS = ("bbox", "segm")
Detection = Mapping[str, Any]


@dataclass(frozen=True)
class DetectionScores:
    """Shares of 1."""

    kind: str
    scores: dict[str, float | None]
    """AP (mean over IoU .50 to .95), AP50, AP75, of small, medium, large ones, and average recalls. None: the truth has
    nothing of that size, for which pycocotools says -1"""
    per_category: dict[str, float]
    """AP by name, of the categories in the truth"""
    absent: tuple[str, ...]
    """categories that the truth has no object of; they are in no mean"""
    counts: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """For a results file."""
        return {
            "kind": self.kind, "scores": self.scores, "per_category": self.per_category,
            "absent_categories": list(self.absent), "counts": self.counts,
        }  # fmt: skip


def check(kind: str = "bbox") -> None:
    """Before any compute: ValueError for an unknown kind, ImportError where pycocotools is missing."""
    if kind not in KINDS:
        raise ValueError(f"detections are scored by {' or '.join(KINDS)}, not by {kind!r}")
    mask_tools()


def score_detections(
    detections: Sequence[Detection],
    truth: Mapping[str, Any],
    kind: str = "bbox",
    image_ids: Iterable[int | str] | None = None,
) -> DetectionScores:
    """Scores detections against COCO's annotations {"images", "annotations", "categories"}.

    kind: "bbox" or "segm". image_ids: the pictures that are scored (None: all of the truth). Pictures without a
    detection count; so does an empty list. ValueError for pictures or categories that the truth does not have, and for
    detections without a member that is needed; the message counts them.
    """
    check(kind)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    numbers = _image_numbers(truth, image_ids)
    _check_detections(detections, truth, kind, numbers)
    gt, dt = COCO(), COCO()
    gt.dataset = _renumbered(truth, numbers)
    dt.dataset = {
        "images": gt.dataset["images"],
        "categories": gt.dataset["categories"],
        "annotations": [
            _as_annotation(one, place + 1, kind, numbers, truth) for place, one in enumerate(detections)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        gt.createIndex()
        dt.createIndex()
        run = COCOeval(gt, dt, kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    scores = {name: float(v) if v > -1 else None for name, v in zip(NAMES, run.stats, strict=True)}
    precision = run.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, category] of all sizes, 100 detections
    names = {entry["id"]: str(entry["name"]) for entry in truth["categories"]}
    per_category, absent = {}, []
    for place, category in enumerate(run.params.catIds):
        values = precision[:, :, place]
        if (values > -1).any():
            per_category[names[category]] = float(np.mean(values[values > -1]))
        else:
            absent.append(names[category])
    counts = {
        "images": len(numbers),
        "objects": sum(not note["iscrowd"] for note in gt.dataset["annotations"]),
        "crowds": sum(note["iscrowd"] for note in gt.dataset["annotations"]),
        "detections": len(detections),
        "categories": len(per_category),
    }
    return DetectionScores(kind, scores, per_category, tuple(absent), counts)


def _image_numbers(truth: Mapping[str, Any], image_ids: Iterable[int | str] | None) -> dict[int | str, int]:
    """Image id -> a running number: pycocotools wants ids that numpy can sort."""
    there = [entry["id"] for entry in truth["images"]]
    if image_ids is None:
        chosen = there
    else:
        chosen = list(dict.fromkeys(image_ids))
        if unknown := set(chosen) - set(there):
            raise ValueError(
                f"{len(unknown):,} of {len(chosen):,} pictures that are to be scored are not in the truth, the first is "
                f"{min(unknown, key=str)!r}"
            )
    if not chosen:
        raise ValueError("there are no pictures to score")
    return {
        number: place + 1
        for place, number in enumerate(sorted(chosen, key=lambda one: (str(type(one)), one)))
    }


def _check_detections(
    detections: Sequence[Detection], truth: Mapping[str, Any], kind: str, numbers: Mapping[int | str, int]
) -> None:
    needed = ("image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation")
    for name in needed:
        if lacking := [place for place, one in enumerate(detections) if name not in one]:
            raise ValueError(
                f"{len(lacking):,} of {len(detections):,} detections have no {name!r}, the first is number {lacking[0]}"
            )
    categories = {entry["id"] for entry in truth["categories"]}
    for name, known in (("image_id", set(numbers)), ("category_id", categories)):
        if strange := [one[name] for one in detections if one[name] not in known]:
            raise ValueError(
                f"{len(strange):,} of {len(detections):,} detections have a {name} that is not among the {len(known):,} of the "
                f"truth, the first is {strange[0]!r}: is it the right split?"
            )
    if odd := sum(not np.isfinite(one["score"]) for one in detections):
        raise ValueError(f"{odd:,} of {len(detections):,} detections have a score that is not finite")


def _renumbered(truth: Mapping[str, Any], numbers: Mapping[int | str, int]) -> dict[str, Any]:
    """What pycocotools reads: chosen pictures alone, running ids (0 would count as no match), areas filled in."""
    notes: list[dict[str, Any]] = []
    for note in truth["annotations"]:
        if note["image_id"] in numbers:
            area = note.get("area", note["bbox"][2] * note["bbox"][3])
            notes.append(
                copy.copy(note)
                | {"id": len(notes) + 1, "image_id": numbers[note["image_id"]], "area": area}
                | {"iscrowd": int(note.get("iscrowd", 0))}
            )
    images = [entry | {"id": numbers[entry["id"]]} for entry in truth["images"] if entry["id"] in numbers]
    return {"images": images, "annotations": notes, "categories": list(truth["categories"])}


def _as_annotation(
    one: Detection, number: int, kind: str, numbers: Mapping[int | str, int], truth: Mapping[str, Any]
) -> dict[str, Any]:
    found = {
        "id": number, "image_id": numbers[one["image_id"]], "category_id": one["category_id"],
        "score": float(one["score"]), "iscrowd": 0,
    }  # fmt: skip
    if kind == "bbox":
        left, top, width, height = map(float, one["bbox"])
        return found | {"bbox": [left, top, width, height], "area": width * height}
    tools = mask_tools()
    size = (
        one["segmentation"]["size"]
        if isinstance(one["segmentation"], Mapping)
        else _size(truth, one["image_id"])
    )
    packed = run_lengths(one["segmentation"], *size)
    return found | {
        "segmentation": packed,
        "area": float(tools.area(packed)),
        "bbox": tools.toBbox(packed).tolist(),
    }


def _size(truth: Mapping[str, Any], image: int | str) -> tuple[int, int]:
    entry = next(entry for entry in truth["images"] if entry["id"] == image)
    return int(entry["height"]), int(entry["width"])


# --- files ---------------------------------------------------------------------------------------------------


def load_truth(path: Path) -> dict[str, Any]:
    """COCO's instances file. OSError, and ValueError for another file."""
    data = json.loads(path.read_text(encoding="utf-8"))
    notes = data.get("annotations") if isinstance(data, dict) else None
    if not isinstance(notes, list) or not {"images", "categories"} <= data.keys():
        raise ValueError(
            f'{path} is not COCO\'s instances: {{"images", "annotations", "categories"}} are expected'
        )
    if lacking := sum("bbox" not in note or "category_id" not in note for note in notes):
        raise ValueError(
            f"{path}: {lacking:,} of {len(notes):,} annotations have no bbox or category_id; is it instances_*.json?"
        )
    return dict(data)


def truth_of(annotations: Iterable[Annotations], categories: Mapping[int, str]) -> dict[str, Any]:
    """The same from packed samples, in pixels of the stored pictures; a sample without an id goes by its key."""
    images, notes = [], []
    for one in annotations:
        number = one.key if one.image_id is None else one.image_id
        images.append({"id": number, "width": one.width, "height": one.height})
        for thing in one.objects:
            note: dict[str, Any] = {
                "id": thing.id, "image_id": number, "category_id": thing.category_id, "bbox": list(thing.bbox),
                "area": thing.area, "iscrowd": int(thing.iscrowd),
            }  # fmt: skip
            if thing.segmentation is not None:
                shape = thing.segmentation
                note["segmentation"] = shape if isinstance(shape, dict) else [list(part) for part in shape]
            notes.append(note)
    named = [{"id": number, "name": name} for number, name in categories.items()]
    return {"images": images, "annotations": notes, "categories": named}


def write_results(path: Path, detections: Iterable[Detection]) -> None:
    """COCO's results file: a list of detections. Run lengths in bytes become text."""
    entries = []
    for one in detections:
        entry = dict(one)
        shape = entry.get("segmentation")
        if isinstance(shape, Mapping) and isinstance(shape.get("counts"), bytes):
            entry["segmentation"] = {"size": list(shape["size"]), "counts": shape["counts"].decode("ascii")}
        entries.append(entry)
    path.write_text(json.dumps(entries) + "\n", encoding="utf-8")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The detections of a results file. ValueError for another layout."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, list) or not all(isinstance(one, dict) and "image_id" in one for one in data):
        raise ValueError(
            f'{path} is no results file of COCO detections, [{{"image_id", "category_id", "bbox", "score"}}, ...]'
        )
    return data
