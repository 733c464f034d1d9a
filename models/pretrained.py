"""Trained models in a few lines, without the training code:

    from models import load_pretrained
    aurora = load_pretrained("runs/aurora-tiny")
    print(aurora.caption("photo.jpg"))

A checkpoint is a folder with config.json, model.safetensors and tokenizer.model, as `train.pretrain`, `train.finetune` and
`train.export` write it; a run's folder stands for its newest one. Nothing is downloaded, and nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union, cast

import numpy as np
import torch
from torch import Tensor, nn

from models.answering import Chooser
from models.aurora import AuroraConfig
from models.aurora.detection import Detector
from models.aurora.segmentation import Segmenter
from models.base import new_base
from models.generation import DecodingState, generate
from models.lora import add_lora, merge_lora
from models.matching import Matcher
from models.perceiver import PerceiverConfig
from models.perceiver.classify import SoundClassifier
from models.tokens import BOS, EOS
from models.writing import Writer

if TYPE_CHECKING:
    from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in training
VIEWS = {1: ((1.0, 1),), 5: ((1.0, 1), (0.75, 2)), 14: ((1.0, 1), (0.75, 2), (0.5, 3))}  # as in evaluation
TEMPLATES = ("{}", "a picture of {}", "there is {}")
Picture: TypeAlias = Union[str, Path, "Image.Image"]
View: TypeAlias = tuple[float, float, float]
"""A square of a picture's middle square: share of its side, and its place, 0 (left, top) to 1 (right, bottom)"""
WHOLE: View = (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Box:
    """Something that was detected: left, top, right, bottom in pixels of the picture."""

    name: str
    score: float
    box: tuple[float, float, float, float]


class Pretrained:
    """A trained model with what it needs to read pictures and write text. `model` is the module itself, in eval mode."""

    def __init__(
        self, model: nn.Module, config: Any, tokenizer: bytes, task: Mapping[str, Any], *, writes: bool = True
    ) -> None:
        """writes: whether the model has learned to write captions."""
        import sentencepiece

        self.model: Any = model
        self.config = config
        self.task = dict(task)
        self.writes = writes
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)

    @property
    def base(self) -> Any:
        """The pre-trained model within a task's model, or the model itself."""
        return getattr(self.model, "base", self.model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> Pretrained:
        """The same on another device."""
        self.model.to(device)
        return self

    def pixels(self, pictures: Sequence[Picture], fit: str = "crop") -> Tensor:
        """Pictures (files or PIL images) -> normalised float32 [B, 3, S, S]. fit: "crop" takes the middle square, "squash" the
        whole picture, "pad" puts it at the upper left on grey."""
        side = self.config.image_size
        arrays = np.stack([fitted(_open(one), side, fit) for one in pictures])
        return self._normalized(arrays)

    def _normalized(self, arrays: np.ndarray) -> Tensor:
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in (MEAN, STD))
        x = (torch.from_numpy(arrays) - 255 * mean) * (1 / (255 * std))
        return x.permute(0, 3, 1, 2).contiguous().to(self.device)

    def tokens(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """int64 [B, T]: BOS, ids (cut to fit), EOS, padding."""
        length = length or self.config.text_length
        rows = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = [BOS, *self.tokenizer.encode(text)[: length - 2], EOS]
            row[: len(ids)] = torch.tensor(ids)
        return rows.to(self.device)

    @torch.no_grad()
    def caption(self, picture: Picture, *, beams: int = 4, length_penalty: float = 1.0) -> str:
        """A caption, by beam search. Raises ValueError of a model that never learned to write them."""
        if not self.writes:
            raise ValueError(
                "this model has not learned to write captions: python -m train.finetune captioning"
            )
        fit = "squash" if self.task.get("kind") == "captioning" else "crop"
        memory = self.base.image_memory(self.pixels([picture], fit))
        prompt = None
        if self.task.get("kind") == "captioning" and self.task.get("prompt"):
            prompt = torch.tensor([[BOS, *self.tokenizer.encode(self.task["prompt"])]], device=self.device)
        return self._write(memory, prompt, self.config.text_length, beams, length_penalty)

    @torch.no_grad()
    def answer(self, picture: Picture, question: str, *, beams: int = 1) -> str:
        """The answer of a model that was fine-tuned for questions (`train.finetune vqa`). Raises ValueError for another."""
        if self.task.get("kind") != "vqa":
            raise ValueError("this model was not fine-tuned for questions: python -m train.finetune vqa")
        asked = (self.task.get("prompt") or "{question}").replace("{question}", question)
        images = self.pixels([picture], "squash")
        if isinstance(self.model, Chooser):
            best = int(self.model.answers(images, self.tokens([asked])).argmax())
            return str(self.task["classes"][best])
        longest = min(8, self.config.text_length // 3)  # tokens of an answer, as in training
        room = self.config.text_length - longest - 2
        prompt = torch.tensor([[BOS, *self.tokenizer.encode(asked)[:room], EOS]], device=self.device)
        memory = self.base.image_memory(images)
        return self._write(memory, prompt, prompt.shape[1] + longest, beams, 1.0)

    @torch.no_grad()
    def detect(self, picture: Picture, *, least: float = 0.3) -> list[Box]:
        """Boxes of at least this score, best first, of a model that was fine-tuned for detection. Raises ValueError for
        another."""
        if not isinstance(self.model, Detector):
            raise ValueError(
                "this model was not fine-tuned for detection: python -m train.finetune detection"
            )
        image = _open(picture)
        shown = shown_size(image.size, self.config.image_size)
        back = torch.tensor([full / part for full, part in zip(image.size, shown, strict=True)] * 2)
        limit = torch.tensor([*image.size] * 2)
        (found,) = self.model.detect(self.pixels([image], "pad"), least=least)
        names = self.task["classes"]
        return [
            Box(names[int(c)], float(s), tuple((back * box).clamp(min=0).minimum(limit).tolist()))
            for box, s, c in zip(found.boxes.cpu(), found.scores, found.classes, strict=True)
        ]

    @torch.no_grad()
    def segment(self, picture: Picture) -> np.ndarray:
        """Class of each pixel, int64 [height, width], numbers into `task["classes"]`, of a model that was fine-tuned for
        segmentation. Raises ValueError for another."""
        if not isinstance(self.model, Segmenter):
            raise ValueError(
                "this model was not fine-tuned for segmentation: python -m train.finetune segmentation"
            )
        image = _open(picture)
        across, down = shown_size(image.size, self.config.image_size)
        logits = self.model.logits(self.pixels([image], "pad"))[:, :, :down, :across]
        large = nn.functional.interpolate(logits, size=image.size[::-1], mode="bilinear", align_corners=False)
        found: np.ndarray = large[0].argmax(0).cpu().numpy()
        return found

    @torch.no_grad()
    def image_embedding(self, pictures: Picture | Sequence[Picture], *, views: int = 1) -> Tensor:
        """fp32 [B, E] of unit length, in the joint space of pictures and texts; of one picture [1, E].

        views: squares of each picture's middle square whose embeddings are averaged: 1, all of it; 5, four of 3/4 of its side
        too; 14, nine of 1/2 of its side as well (`train.evaluate retrieval --views`), in as many times the time. Raises
        ValueError for another number."""
        if views not in VIEWS:
            raise ValueError(f"{views} views of a picture; supported: {', '.join(map(str, VIEWS))}")
        one = isinstance(pictures, str | Path) or hasattr(pictures, "convert")  # a picture of PIL's
        places = [
            (share, x / max(row - 1, 1), y / max(row - 1, 1))
            for share, row in VIEWS[views]
            for y in range(row)
            for x in range(row)
        ]
        side, looks = self.config.image_size, []
        for picture in cast("Sequence[Picture]", [pictures] if one else pictures):
            image = _open(picture)  # one at a time: photographs are large
            looks.append(np.stack([fitted(image, side, "crop", place) for place in places]))
        seen = [self.base.features(self._normalized(view))[0] for view in np.stack(looks, axis=1)]
        return nn.functional.normalize(torch.stack(seen).sum(0), dim=-1) if views > 1 else seen[0]

    @torch.no_grad()
    def text_embedding(self, texts: str | Sequence[str]) -> Tensor:
        """fp32 [B, E] of unit length; of one text [1, E]."""
        found: Tensor = self.base.text_embedding(self.tokens([texts] if isinstance(texts, str) else texts))
        return found

    def classify(
        self, picture: Picture, labels: Sequence[str], templates: Sequence[str] = TEMPLATES
    ) -> dict[str, float]:
        """Zero-shot: how likely each label is, by the cosine of the picture with the mean of the label's prompts."""
        classes = class_embeddings(self.text_embedding, labels, templates)
        scale = float(self.base.logit_scale.detach().exp().clamp(max=100))
        odds = (scale * self.image_embedding([picture]) @ classes.T).softmax(-1)[0]
        return dict(zip(labels, odds.tolist(), strict=True))

    def _write(self, memory: Tensor, prompt: Tensor | None, length: int, beams: int, penalty: float) -> str:
        (ids,) = generate(
            _Speaker(self.base, self.tokenizer.get_piece_size()), memory, method="beam" if beams > 1 else "greedy",
            beams=beams, length_penalty=penalty, max_length=length, prompt=prompt,
        )  # fmt: skip
        return str(self.tokenizer.decode([token for token in ids if token != EOS])).strip()


class _Speaker:
    """The model kept from saying ids that the tokenizer lacks."""

    def __init__(self, model: Any, pieces: int) -> None:
        self.model, self.pieces = model, pieces

    def start(self, memory: Tensor) -> DecodingState:
        """See `models.generation.Generator`."""
        state: DecodingState = self.model.start(memory)
        return state

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        """Logits [N, V]."""
        logits: Tensor = self.model.step(tokens, state)
        logits[:, self.pieces :] = -torch.inf
        return logits


def load_pretrained(path: str | Path, device: torch.device | str = "cpu", *, ema: bool = True) -> Pretrained:
    """The model of a checkpoint, in eval mode; LoRA's changes are merged into the weights, averaged weights are taken where
    there are some. Raises FileNotFoundError where there is no checkpoint, ValueError where it does not fit this version."""
    from safetensors.torch import load_file

    folder = find_checkpoint(Path(path))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    task = config.get("task") or {}
    settings = read_model_config(config["model"])
    model = build(settings, task, config.get("tune") or {})
    weights = load_file(folder / "model.safetensors")
    if ema and (folder / "ema.safetensors").is_file():
        weights |= load_file(folder / "ema.safetensors")
    problems = model.load_state_dict(weights, strict=False)
    own = dict(model.named_parameters())  # without tied ones, which files hold once
    if missing := [name for name in problems.missing_keys if name in own] + problems.unexpected_keys:
        raise ValueError(f"{folder} does not fit: {len(missing)} weights, the first is {missing[0]}")
    merge_lora(model)
    others = ("audio", "vqa", "retrieval")  # which teach the text stack something else, or nothing
    writes = task.get("kind") not in others and bool((config.get("objectives") or {}).get("caption", 1))
    words = (folder / "tokenizer.model").read_bytes()
    return Pretrained(model.to(device).eval(), settings, words, task, writes=writes)


def find_checkpoint(path: Path) -> Path:
    """The folder with the weights that `path` means. Raises FileNotFoundError."""
    if (path / "model.safetensors").is_file():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = (
        sorted(
            (int(match[1]), entry)
            for entry in folder.iterdir()
            if (match := re.fullmatch(r"step-(\d+)", entry.name)) and (entry / "model.safetensors").is_file()
        )
        if folder.is_dir()
        else []
    )
    if not steps and any(folder.glob("**/model-00001-of-*.safetensors")):
        raise FileNotFoundError(
            f"{path}: its checkpoints are in parts, one of each rank; python -m train.export makes one file of them"
        )
    if not steps:
        raise FileNotFoundError(
            f"{path}: no checkpoint there; give a run (runs/NAME), a checkpoint or an exported model"
            + (f". There is a {run}" if (run := Path("runs") / path.name).is_dir() and run != path else "")
        )
    return steps[-1][1]


def read_model_config(found: Mapping[str, Any]) -> AuroraConfig | PerceiverConfig:
    """The model's configuration from its JSON. Raises ValueError for a field that this version lacks."""
    kind: type[AuroraConfig] | type[PerceiverConfig] = (
        PerceiverConfig if "latent_width" in found else AuroraConfig
    )
    names = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(found) - names):
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}: written by another version?")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in found.items()
    }
    if isinstance(values.get("classic"), dict):
        from models.perceiver import ClassicBlocks

        values["classic"] = ClassicBlocks(**found["classic"])
    return kind(**values)


def build(
    config: AuroraConfig | PerceiverConfig, task: Mapping[str, Any], tune: Mapping[str, Any]
) -> nn.Module:
    """A new model of this configuration, as the task wants it."""
    classes = len(task.get("classes", ()))
    model: nn.Module
    match task.get("kind"):
        case "audio" if isinstance(config, PerceiverConfig):
            model = SoundClassifier(config, classes)
        case "detection" if isinstance(config, AuroraConfig):
            model = Detector(config, classes)
        case "segmentation" if isinstance(config, AuroraConfig):
            model = Segmenter(config, classes)
        case "vqa" if task.get("head") == "chosen":
            model = Chooser(new_base(config), classes)
        case "vqa" | "captioning":
            model = Writer(new_base(config))
        case "retrieval":
            model = Matcher(new_base(config))
        case _:
            model = new_base(config)
    if rank := tune.get("lora_rank"):
        add_lora(model.get_submodule("base"), tune["lora_layers"], rank, tune["lora_alpha"])
    return model


def class_embeddings(embed: Any, labels: Sequence[str], templates: Sequence[str]) -> Tensor:
    """fp32 [C, E] of unit length: the mean of what `embed` (texts -> [N, E]) gives for a label in each template."""
    if wrong := [template for template in templates if "{}" not in template]:
        raise ValueError(f"the prompt template {wrong[0]!r} lacks {{}}, the place of the label")
    rows = [embed([template.replace("{}", label) for template in templates]).mean(0) for label in labels]
    return nn.functional.normalize(torch.stack(rows), dim=-1)


def fitted(image: Image.Image, side: int, fit: str, view: View = WHOLE) -> np.ndarray:
    """uint8 [S, S, 3] of an RGB picture. view: which part of the middle square, of fit "crop"."""
    from PIL import Image

    width, height = image.size
    bilinear = Image.Resampling.BILINEAR
    if fit == "crop":
        share, x, y = view
        edge = share * min(width, height)
        left, top = (
            (full - min(width, height)) / 2 + at * (min(width, height) - edge)
            for full, at in ((width, x), (height, y))
        )
        return np.asarray(image.resize((side, side), bilinear, box=(left, top, left + edge, top + edge)))
    if fit == "squash":
        return np.asarray(image.resize((side, side), bilinear))
    shown = shown_size(image.size, side)
    out = np.empty((side, side, 3), np.uint8)
    out[:] = [round(255 * m) for m in MEAN]
    out[: shown[1], : shown[0]] = np.asarray(image.resize(shown, bilinear))
    return out


def shown_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height of a picture of this size whose longer side becomes `side`."""
    scale = side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _open(picture: Picture) -> Image.Image:
    """An upright RGB picture on white."""
    from PIL import Image, ImageOps

    image = picture if isinstance(picture, Image.Image) else Image.open(picture)
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
