"""The constant caption that a captioning model has to beat is the best of all, not of some."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from train.scores.cider import CiderD
from train.tasks import captioning
from train.tasks.captioning import best_constant


def test_no_caption_of_real_ones_does_better(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a search through all of them; the order alone, without clipping, comes close."""
    captions = json.loads((real_data / "coco_mini/captions.json").read_text())["annotations"]
    by_picture: dict[int, list[str]] = {}
    for one in captions:
        text = one["caption"].lower().strip().rstrip(".").replace(",", " ,")
        by_picture.setdefault(one["image_id"], []).append(text)
    references = list(by_picture.values())[:40]
    texts = list(dict.fromkeys(text for several in references for text in several))
    cider = CiderD(references)
    given = [[cider.weigh(text) for text in several] for several in references]
    every = {text: float(np.mean(cider([text] * len(given), given))) for text in texts}
    assert every[best_constant(texts, references)] == max(every.values())
    assert sorted(every.values())[-2] < max(every.values()), "one alone is the best"
    monkeypatch.setattr(captioning, "CONSTANTS", 1)
    assert every[best_constant(texts, references)] > 0.9 * max(every.values())
