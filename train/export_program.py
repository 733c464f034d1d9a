"""A model's encoder as a program of its own: torch.export's, which torch loads without this project, or ONNX.

    from train.export_program import export_encoder
    export_encoder(load_model("runs/NAME"), Path("exported"), formats=("torch", "onnx"))

The program takes normalised images and gives what retrieval compares: the embedding [B, E] of unit length (of Aurora also its
four maps). It is run beside the model before it is called done, and must give the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import Aurora, PerceiverIO
from models.lora import merge_lora
from models.perceiver import Piece
from train.checkpoint import LoadedModel
from train.config import to_dict

FORMATS = ("torch", "onnx")
SAME = 1e-4  # largest difference of an output of unit length


@dataclass(frozen=True)
class Program:
    """A file that was written, and how far its outputs are from the model's."""

    path: Path
    difference: float


class AuroraEncoder(nn.Module):
    """Normalised images [B, 3, S, S] -> embedding [B, E], and four maps [B, H_i, W_i, C_i]."""

    def __init__(self, model: Aurora) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.model.encode_image(images)
        return (self.model.image_embedding(maps), *maps)


class PerceiverEncoder(nn.Module):
    """Normalised images [B, 3, S, S] -> embedding [B, E] and latents [B, M, D]."""

    def __init__(self, model: PerceiverIO) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        piece = Piece(images, torch.arange(len(images), device=images.device))
        latents = self.model.encode({"image": piece}, len(images))
        return self.model.embedding(latents, "image"), latents


def encoder_of(loaded: LoadedModel) -> nn.Module:
    """The image encoder of a checkpoint, LoRA merged, in eval mode."""
    base: Any = merge_lora(getattr(loaded.model, "base", loaded.model))
    return (AuroraEncoder(base) if isinstance(base, Aurora) else PerceiverEncoder(base)).eval()


@torch.no_grad()
def export_encoder(
    loaded: LoadedModel, folder: Path, formats: Sequence[str] = ("torch",), batch: int = 2
) -> list[Program]:
    """Write encoder.pt2 (torch.export, for batches of `batch` images, to be run under torch.no_grad) and encoder.onnx,
    as asked for, and run each beside the model. Raises ValueError for an unknown format and where the numbers differ,
    ImportError where onnx is missing."""
    if unknown := set(formats) - set(FORMATS):
        raise ValueError(f"unknown formats {sorted(unknown)}; supported: {', '.join(FORMATS)}")
    encoder = encoder_of(loaded)
    size = loaded.config.model.image_size
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    folder.mkdir(parents=True, exist_ok=True)
    wanted = encoder(images)
    program = torch.export.export(encoder, (images,), strict=False)
    made = []
    for kind in formats:
        path = folder / ("encoder.pt2" if kind == "torch" else "encoder.onnx")
        found = _torch(program, path, images) if kind == "torch" else _onnx(program, path, images)
        difference = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
        if not difference <= SAME * max(1.0, max(float(x.abs().max()) for x in wanted)):
            raise ValueError(f"{path}: the program's outputs differ by {difference:g} from the model's")
        made.append(Program(path, difference))
    return made


def _torch(program: torch.export.ExportedProgram, path: Path, images: Tensor) -> list[Tensor]:
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    return list(loaded(images))


def _onnx(program: torch.export.ExportedProgram, path: Path, images: Tensor) -> list[Tensor]:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX needs pip install 'auroraio[onnx]' ({error})") from error
    torch.onnx.export(program, (images,), str(path), dynamo=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return [torch.from_numpy(one) for one in session.run(None, feed)]


def model_card(loaded: LoadedModel, scores: dict[str, Any] | None = None) -> str:
    """README.md of an exported model: what it is, what it was trained on, its scores, and how to use it."""
    config = to_dict(loaded.config)
    task, data = config.get("task", {}), config["data"]
    parameters = sum(p.numel() for p in loaded.model.parameters())
    trained = data.get("train") or "the built-in generated corpus"
    if isinstance(trained, list):
        trained = ", ".join(f"`{name}`" for name in trained)
    uses = {
        "detection": 'print(model.detect("photo.jpg"))',
        "segmentation": 'print(model.segment("photo.jpg").shape)',
        "vqa": 'print(model.answer("photo.jpg", "what is this?"))',
    }
    use = uses.get(task.get("kind", ""), 'print(model.caption("photo.jpg"))')
    lines = [
        f"# {loaded.config.name}",
        "",
        f"{type(getattr(loaded.model, 'base', loaded.model)).__name__}, {parameters / 1e6:.1f}M parameters, "
        f"{loaded.config.model.image_size} px, step {loaded.step}"
        + (f"; fine-tuned for {task['kind']}" if task else "; pre-trained")
        + (", averaged weights" if loaded.averaged else ""),
        "",
        f"Trained on {trained}. Tokenizer: {loaded.tokenizer.vocab_size:,} pieces, SHA-256 `{loaded.tokenizer.sha[:16]}`.",
        "",
        "    from models import load_pretrained",
        '    model = load_pretrained("path/to/this/folder")',
        f"    {use}",
        "",
        "## Scores",
        "",
        "```json",
        json.dumps(scores, indent=2) if scores else "none recorded",
        "```",
        "",
        "## Configuration",
        "",
        "```json",
        json.dumps({"model": config["model"], "task": task or None}, indent=2),
        "```",
    ]
    return "\n".join(lines) + "\n"
