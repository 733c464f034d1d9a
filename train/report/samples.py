"""Picks the pictures and captions that the report shows, and writes them to RUN/samples.json.

    images         {id: data URI}, each picture once, however often it is shown
    text_to_image  [{caption, right, rank, top: [id]}]             a caption and the pictures it found
    image_to_text  [{image, rank, top: [{caption, right}], own}]   a picture and the captions it found
    restored       [{image, masked, restored}]                     masked image modelling; both are data URIs
    others         [{id, one, many, shown, pool, found, asked}]    the same of videos and sounds, where there are some
    generated      [{image, said, true: [..], agreement, place}]   place: top, middle, bottom by agreement

Retrieval examples are drawn at random, generated captions from the top, the middle and the bottom: none is
picked for looking good.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.evaluate.result import EvalResult, Material

SHOWN = 6  # examples per retrieval direction, and masked pictures
TOP_PICTURES, TOP_CAPTIONS = 5, 3
PER_PLACE = 4  # generated captions from each of top, middle, bottom
_LOSSLESS = 96  # pixels; larger pictures are stored as JPEG, a tenth of the size


def write_samples(result: EvalResult, run_dir: Path | str, seed: int = 0) -> Path:
    """Write RUN/samples.json from an evaluation with keep_images=True; what was not evaluated is left out.

    Raises ValueError when the result holds no pictures.
    """
    material = result.material
    if material.thumbnails is None:
        raise ValueError("the report's pictures need an evaluation with keep_images=True")
    rng = np.random.Generator(np.random.Philox(key=seed))
    samples: dict[str, object] = {
        "pool": {"images": len(material.keys), "captions": sum(map(len, material.captions))}
    }
    if len(material.text_embeddings):
        samples["text_to_image"] = _text_to_image(material, rng)
        samples["image_to_text"] = _image_to_text(material, rng)
    samples["restored"] = _restored(material, material.thumbnails)
    samples["generated"] = _generated(material)
    images = samples["images"] = {
        str(i): data_uri(material.thumbnails[i].numpy()) for i in sorted(_image_ids(samples))
    }
    samples["others"] = [
        part
        for kind, other in result.materials.items()
        if other is not material and (part := _other(kind, other, rng, images)) is not None
    ]
    path = Path(run_dir) / "samples.json"
    path.write_text(json.dumps(samples), encoding="utf-8")
    return path


def data_uri(pixels: np.ndarray) -> str:
    """uint8 [h, w, 3 or 4] as a data URI: PNG when small or transparent, JPEG otherwise."""
    buffer = io.BytesIO()
    if max(pixels.shape[:2]) <= _LOSSLESS or pixels.shape[2] == 4:
        kind = "png"
        Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    else:
        kind = "jpeg"
        Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def agreement(said: str, true: list[str]) -> float:
    """F1 of the words that a generated caption shares with the closest true caption (0 = none, 1 = all)."""
    words = Counter(re.findall(r"\w+", said.lower()))
    best = 0.0
    for caption in true:
        other = Counter(re.findall(r"\w+", caption.lower()))
        best = max(best, 2 * (words & other).total() / max(words.total() + other.total(), 1))
    return best


def _text_to_image(material: Material, rng: np.random.Generator) -> list[dict[str, object]]:
    flat = [caption for captions in material.captions for caption in captions]
    examples = []
    for image in _draw(material, rng):
        caption = int(rng.choice(torch.nonzero(material.image_of_text == image).flatten().numpy()))
        scores = material.image_embeddings @ material.text_embeddings[caption]
        top = scores.argsort(descending=True, stable=True)[:TOP_PICTURES].tolist()
        rank = top.index(image) + 1 if image in top else int((~(scores < scores[image])).sum())
        examples.append({"caption": flat[caption], "right": image, "rank": rank, "top": top})
    return examples


def _image_to_text(material: Material, rng: np.random.Generator) -> list[dict[str, object]]:
    flat = [caption for captions in material.captions for caption in captions]
    examples = []
    for image in _draw(material, rng):
        scores = material.text_embeddings @ material.image_embeddings[image]
        order = scores.argsort(descending=True, stable=True)
        own = material.image_of_text[order] == image
        top = [
            {"caption": flat[int(c)], "right": bool(o)}
            for c, o in zip(order[:TOP_CAPTIONS], own, strict=False)
        ]
        examples.append(
            {
                "image": image,
                "rank": int(own.int().argmax()) + 1,
                "top": top,
                "own": material.captions[image][0],
            }
        )
    return examples


OTHERS = {
    "image-text": ("picture", "pictures", "The pictures are resized."),
    "video-text": ("video", "videos", "The first frame of each is shown."),
    "audio-text": ("sound", "sounds", "Spectrograms are shown: time to the right, pitch upwards."),
}


def _other(
    kind: str, material: Material, rng: np.random.Generator, images: dict[str, str]
) -> dict[str, object] | None:
    """Retrieval examples of another kind of pair; its pictures are added to `images` as "KIND-NUMBER"."""
    if material.thumbnails is None or not len(material.text_embeddings):
        return None
    found, asked = _text_to_image(material, rng), _image_to_text(material, rng)
    for number in sorted(_image_ids([found, asked])):
        images[f"{kind}-{number}"] = data_uri(material.thumbnails[number].numpy())
    for example in found:
        example["right"] = f"{kind}-{example['right']}"
        example["top"] = [f"{kind}-{number}" for number in example["top"]]  # type: ignore[attr-defined]
    for example in asked:
        example["image"] = f"{kind}-{example['image']}"
    one, many, shown = OTHERS[kind]
    pool = {"images": len(material.keys), "captions": sum(map(len, material.captions))}
    return {
        "id": kind, "one": one, "many": many, "shown": shown, "pool": pool, "found": found, "asked": asked,
    }  # fmt: skip


def _draw(material: Material, rng: np.random.Generator) -> list[int]:
    """Different pictures that have captions, at random."""
    asking = torch.unique(material.image_of_text).numpy()
    return [int(i) for i in rng.choice(asking, size=min(SHOWN, len(asking)), replace=False)]


def _restored(material: Material, thumbnails: Tensor) -> list[dict[str, object]]:
    rows = []
    for i in range(min(SHOWN, len(material.masks))):
        original, mask = thumbnails[i], material.masks[i]
        height, width = original.shape[:2]
        rows_of = torch.arange(height) * mask.shape[0] // height
        columns_of = torch.arange(width) * mask.shape[1] // width
        alpha = (~mask[rows_of][:, columns_of]).to(torch.uint8)[
            ..., None
        ] * 255  # hidden places are transparent
        masked = torch.cat([original * (alpha > 0), alpha], dim=2)
        rows.append(
            {
                "image": i,
                "masked": data_uri(masked.numpy()),
                "restored": data_uri(material.restored[i].numpy()),
            }
        )
    return rows


def _generated(material: Material) -> list[dict[str, object]]:
    scored = [
        {
            "image": i,
            "said": said,
            "true": material.captions[i],
            "agreement": agreement(said, material.captions[i]),
        }
        for i, said in enumerate(material.generated)
    ]
    scored.sort(key=lambda s: -s["agreement"])  # type: ignore[operator]  # stable: ties keep the set's order
    if len(scored) <= 3 * PER_PLACE:
        return [s | {"place": "all"} for s in scored]
    middle = (len(scored) - PER_PLACE) // 2
    parts = {
        "top": scored[:PER_PLACE],
        "middle": scored[middle : middle + PER_PLACE],
        "bottom": scored[-PER_PLACE:],
    }
    return [s | {"place": place} for place, part in parts.items() for s in part]


def _image_ids(value: object) -> set[int]:
    """Every picture that the chosen samples name."""
    if isinstance(value, dict):
        own = {int(value["image"])} if "image" in value else set()
        own |= {int(value["right"]), *value["top"]} if "caption" in value and "top" in value else set()
        return own.union(*(_image_ids(v) for v in value.values()))
    return set().union(*(_image_ids(v) for v in value)) if isinstance(value, list) else set()
