"""Which tasks there are."""

from __future__ import annotations

from train.config import ConfigError
from train.tasks.base import Task

TASKS = {
    "captioning": "captions of pictures: CIDEr, SPICE, BLEU-4, METEOR, ROUGE-L",
    "vqa": "answers to questions about pictures: VQA accuracy",
    "retrieval": "pictures by captions and back, re-ranked by the cross-attention decoder: R@1, 5, 10",
    "detection": "boxes of objects: COCO AP",
    "segmentation": "a class per pixel: mIoU",
    "audio": "classes of sounds: accuracy, or mean average precision",
}


def task_of(name: str) -> Task:
    """The task of this name. Raises ConfigError for another."""
    match name:
        case "detection":
            from train.tasks.detection import Detection

            return Detection()
        case "segmentation":
            from train.tasks.segmentation import Segmentation

            return Segmentation()
        case "vqa":
            from train.tasks.vqa import QuestionAnswering

            return QuestionAnswering()
        case "captioning":
            from train.tasks.captioning import Captioning

            return Captioning()
        case "audio":
            from train.tasks.audio import AudioClassification

            return AudioClassification()
        case "retrieval":
            from train.tasks.retrieval import Retrieval

            return Retrieval()
    raise ConfigError(f"no task is called {name!r}; there are: {', '.join(TASKS)}")
