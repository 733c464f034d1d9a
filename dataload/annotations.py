"""What is known of a packed sample beside its captions: boxes, masks, questions, labels, regions.

One parser of KEY.json and KEY.seg.png for everything that trains or scores on them:

    found = shards.index(shards.expand(["shards/val-*.tar"]))
    for one in annotated(found, needs=("objects",)):
        print(one.key, one.width, one.height, [(thing.category, thing.bbox) for thing in one.objects])

Boxes, polygons, regions and label maps are in pixels of the stored picture (upright, as `dataload.images` reads it),
whose size is `width` and `height`; `Annotations.scale_to` gives the factors for another size. All from
`python -m dataload.pack`; dataload/README.md lists the members of KEY.json. Needs no torch.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataload.broken import BrokenSample
from dataload.captions import json_captions
from dataload.shards import ShardIndex

IGNORE = 255
"""of a label map: pixels that belong to no class"""
CLASSES = "classes.json"
SEGMENTATION = "seg.png"
KINDS = ("objects", "questions", "labels", "regions", "segmentation")
"""what `annotated(needs=...)` may ask for"""


@dataclass(frozen=True)
class Object:
    """One annotated thing of a picture, as COCO describes it."""

    id: int
    bbox: tuple[float, float, float, float]
    """left, top, width, height in pixels of the stored picture"""
    category_id: int
    category: str
    iscrowd: bool = False
    area: float = 0.0
    """of its mask in pixels, which decides small, medium or large in COCO's scores; of the box where there is no mask"""
    segmentation: tuple[tuple[float, ...], ...] | dict[str, Any] | None = None
    """polygons (x0, y0, x1, y1, ...), or COCO's run lengths {"size": [height, width], "counts": ...}, or none"""

    def mask(self, height: int, width: int) -> np.ndarray:
        """bool [height, width] of the stored picture; the box where there is no mask. Needs pycocotools. Raises BrokenSample
        for a mask that cannot be read, and for one of another size."""
        if self.segmentation is None:
            left, top, w, h = self.bbox
            inside = np.zeros((height, width), dtype=bool)
            inside[round(top) : round(top + h), round(left) : round(left + w)] = True
            return inside
        tools = mask_tools()
        try:
            decoded: np.ndarray = tools.decode(run_lengths(self.segmentation, height, width)).astype(bool)
        except Exception as error:  # pycocotools raises the class itself
            raise BrokenSample(f"an object's mask cannot be read: {error}") from None
        if decoded.shape != (height, width):
            down, across = decoded.shape
            raise BrokenSample(f"an object's mask is {across}x{down}, the picture {width}x{height}")
        return decoded


@dataclass(frozen=True)
class Question:
    """One question about a picture."""

    question_id: int | str
    question: str
    answers: tuple[str, ...] = ()
    """as people gave them, ten in VQA v2 and OK-VQA; empty for a test split"""
    question_type: str = ""
    answer_type: str = ""
    multiple_choice_answer: str = ""
    """VQA v2: the most frequent answer"""
    stemmed_answers: tuple[str, ...] = ()
    """OK-VQA only: the processed answers, which its official score compares with"""


@dataclass(frozen=True)
class Region:
    """A part of a picture with its description (Visual Genome)."""

    region_id: int
    bbox: tuple[float, float, float, float]
    """left, top, width, height in pixels of the stored picture"""
    phrase: str


@dataclass(frozen=True)
class Annotations:
    """Everything that is known of one sample."""

    key: str
    """'shard-name/sample-key'"""
    sample: int = -1
    """its number in the index"""
    image_id: int | str | None = None
    width: int = 0
    """of the stored picture in pixels; 0 where the source says nothing"""
    height: int = 0
    captions: tuple[str, ...] = ()
    objects: tuple[Object, ...] = ()
    questions: tuple[Question, ...] = ()
    labels: tuple[str, ...] = ()
    """of a sound or a picture: display names of AudioSet, or the folder's name"""
    label_ids: tuple[str, ...] = ()
    """AudioSet's ids (/m/...) of `labels`"""
    regions: tuple[Region, ...] = ()
    label_map: np.ndarray | None = None
    """uint8 [height, width], class per pixel, 255 = none; None where there is none, or it was not asked for"""
    has: frozenset[str] = frozenset()
    """which of KINDS the sample states, be it with an empty list: a picture without objects is annotated too"""

    def scale_to(self, width: int, height: int) -> tuple[float, float]:
        """Factors for x and y from the stored picture to one of width x height. ValueError where the size is unknown."""
        if not self.width or not self.height:
            raise ValueError(f"{self.key}: its annotations do not say the picture's size")
        return width / self.width, height / self.height


@dataclass(frozen=True)
class Classes:
    """classes.json beside the shards: what numbers and ids stand for."""

    objects: dict[int, str]
    """category id -> name, in the source's order (COCO's ids have gaps)"""
    segmentation: dict[int, str]
    """value in a label map -> name"""
    labels: dict[str, str]
    """id (/m/... of AudioSet, else the name) -> name"""


def annotated(
    index: ShardIndex, needs: Sequence[str] = (), *, label_maps: bool = True
) -> Iterator[Annotations]:
    """The annotations of all samples, in order, that state each kind in `needs` (of KINDS).

    `label_maps=False` leaves KEY.seg.png unread (`label_map` is then None). Raises ValueError where no sample has what is
    needed, or for a kind that is not known; BrokenSample and OSError as `read_annotations` does.
    """
    if unknown := [kind for kind in needs if kind not in KINDS]:
        raise ValueError(f"annotated: {unknown[0]!r} is not known; supported: {', '.join(KINDS)}")
    found = False
    for sample in range(len(index)):
        if "segmentation" in needs and not _has_map(index, sample):
            continue
        one = read_annotations(index, sample, label_map=label_maps)
        if all(kind in one.has for kind in needs):
            found = True
            yield one
    if needs and not found:
        raise ValueError(f"none of the {len(index):,} samples has {' and '.join(needs)}")


def read_annotations(index: ShardIndex, sample: int, *, label_map: bool = True) -> Annotations:
    """The annotations of a sample. Raises BrokenSample where they are not what dataload/README.md says, OSError where
    the tar cannot be read."""
    key = index.key(sample)
    data = index.read(sample, SEGMENTATION) if _has_map(index, sample) else None
    return parse(
        index.record(sample), key, sample=sample, label_map=data, read_map=label_map, captions=index.captions(sample)
    )  # fmt: skip


def _has_map(index: ShardIndex, sample: int) -> bool:
    return any(extension == SEGMENTATION for extension, _, _ in index.files(sample))


def parse(
    record: Mapping[str, Any],
    key: str = "",
    *,
    sample: int = -1,
    label_map: bytes | None = None,
    read_map: bool = True,
    captions: Sequence[str] | None = None,
) -> Annotations:
    """Annotations from the object in KEY.json and the bytes of KEY.seg.png. `captions`: where they are known already.

    Raises BrokenSample where a member is missing or has another type, naming it.
    """
    has = {kind for kind in KINDS if kind in record}
    if "label" in record:
        has.add("labels")
    if label_map is not None:
        has.add("segmentation")
    try:
        if captions is None:
            captions = json_captions(json.dumps(dict(record)).encode())
        labels = record.get("labels", [record["label"]] if "label" in record else [])
        return Annotations(
            key=key,
            sample=sample,
            image_id=record.get("image_id"),
            width=int(record.get("width") or 0),
            height=int(record.get("height") or 0),
            captions=tuple(captions),
            objects=tuple(map(_object, record.get("objects", ()))),
            questions=tuple(map(_question, record.get("questions", ()))),
            labels=tuple(map(str, labels)),
            label_ids=tuple(map(str, record.get("label_ids", ()))),
            regions=tuple(map(_region, record.get("regions", ()))),
            label_map=decode_label_map(label_map) if label_map is not None and read_map else None,
            has=frozenset(has),
        )
    except BrokenSample:  # the label map's own
        raise
    except KeyError as error:
        raise BrokenSample(f"{key}: the json has an entry without {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise BrokenSample(f"{key}: the json is not as expected: {error}") from None


def _object(entry: Mapping[str, Any]) -> Object:
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, list):
        segmentation = tuple(tuple(map(float, polygon)) for polygon in segmentation) or None
    elif segmentation is not None and not isinstance(segmentation, dict):
        raise TypeError(f"a segmentation is polygons or run lengths, not {type(segmentation).__name__}")
    bbox = _box(entry["bbox"])
    return Object(
        id=int(entry["id"]),
        bbox=bbox,
        category_id=int(entry["category_id"]),
        category=str(entry["category"]),
        iscrowd=bool(entry.get("iscrowd", 0)),
        area=float(entry.get("area", bbox[2] * bbox[3])),
        segmentation=segmentation,
    )


def _box(values: Sequence[float]) -> tuple[float, float, float, float]:
    left, top, width, height = map(float, values)
    return left, top, width, height


def _question(entry: Mapping[str, Any]) -> Question:
    return Question(
        question_id=entry["question_id"],
        question=str(entry["question"]),
        answers=tuple(map(str, entry.get("answers", ()))),
        question_type=str(entry.get("question_type", "")),
        answer_type=str(entry.get("answer_type", "")),
        multiple_choice_answer=str(entry.get("multiple_choice_answer", "")),
        stemmed_answers=tuple(map(str, entry.get("stemmed_answers", ()))),
    )


def _region(entry: Mapping[str, Any]) -> Region:
    return Region(int(entry["region_id"]), _box(entry["bbox"]), str(entry["phrase"]))


def decode_label_map(data: bytes) -> np.ndarray:
    """uint8 [H, W] of a KEY.seg.png. BrokenSample where it is no 8-bit PNG of one channel."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode not in ("L", "P"):
                raise BrokenSample(f"a label map has one channel of 8 bits, this one is {image.mode}")
            return np.asarray(image)
    except BrokenSample:
        raise
    except Exception as error:  # Pillow raises nearly anything for bytes that are no whole picture
        raise BrokenSample(f"the label map cannot be read: {error}") from None


def read_classes(folder: Path) -> Classes:
    """classes.json of a folder of shards (or of the folder that a shard lies in). FileNotFoundError, ValueError."""
    folder = folder if folder.is_dir() else folder.parent
    path = folder / CLASSES
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; `python -m dataload.pack` writes it beside the shards"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Classes(
            {int(entry["id"]): str(entry["name"]) for entry in data.get("objects", ())},
            {int(entry["id"]): str(entry["name"]) for entry in data.get("segmentation", ())},
            {str(entry["id"]): str(entry["name"]) for entry in data.get("labels", ())},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not what dataload.pack writes: {type(error).__name__}: {error}"
        ) from None


def run_lengths(segmentation: Any, height: int, width: int) -> Any:
    """COCO's compressed run lengths of polygons, of plain run lengths, or of such as are compressed already."""
    tools = mask_tools()
    if not isinstance(segmentation, dict):
        return tools.merge(tools.frPyObjects([list(polygon) for polygon in segmentation], height, width))
    if isinstance(segmentation["counts"], list):
        return tools.frPyObjects(segmentation, *segmentation["size"])
    return segmentation


def mask_tools() -> Any:
    """pycocotools.mask, or an ImportError that says what to install."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(f"masks need pycocotools: pip install 'auroraio[eval]' ({error})") from error
    return mask
