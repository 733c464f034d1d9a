"""A model's encoder as a program of its own: torch.export's, which torch loads without this project, or ONNX.

    python -m train.export runs/NAME --output exported --program torch onnx

The program takes normalised images, any number of them, and gives what retrieval compares: the embedding [B, E] of unit length,
and what lies under it, Aurora's four maps or PerceiverIO's latents. It is run beside the model, with another number of images
than it was traced with, before it is called done, and must give the same numbers.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import Aurora, PerceiverIO
from models.lora import merge_lora
from models.perceiver import Piece
from train.checkpoint import LoadedModel
from train.config import PretrainConfig

FORMATS = {"torch": "encoder.pt2", "onnx": "encoder.onnx"}
SAME = 1e-4
"""largest difference between program and model, in shares of the largest number of an output (at least 1)"""
TRACED, TRIED = 2, (1, 3)  # images
Run = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Program:
    """A file that was written, and how far its outputs are from the model's."""

    path: Path
    difference: float


class AuroraEncoder(nn.Module):
    """Normalised images [B, 3, S, S] -> embedding [B, E], and four maps [B, H_i, W_i, C_i]."""

    names = ("embedding", "map4", "map8", "map16", "map32")

    def __init__(self, model: Aurora) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.model.encode_image(images)
        return (self.model.image_embedding(maps), *maps)


class PerceiverEncoder(nn.Module):
    """Normalised images [B, 3, S, S] -> embedding [B, E] and latents [B, M, D]."""

    names = ("embedding", "latents")

    def __init__(self, model: PerceiverIO) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        # one picture to a sample: the latents read them side by side, where batches of any pieces are packed
        tokens = self.model.adapters["image"](
            Piece(images, torch.arange(images.shape[0], device=images.device))
        )
        latents = self.model.latent(tokens.values)
        return self.model.embedding(latents, "image"), latents


def check_program(formats: Sequence[str], config: PretrainConfig) -> None:
    """Whatever can be refused before anything is written. Raises ValueError for an unknown format and for a model without an
    encoder of pictures, ImportError where a package is missing."""
    if unknown := set(formats) - set(FORMATS):
        raise ValueError(f"unknown formats {sorted(unknown)}; supported: {', '.join(FORMATS)}")
    kind = getattr(getattr(config, "task", None), "kind", "")
    if formats and kind == "audio":
        raise ValueError(
            "--program writes encoders of pictures; this model was fine-tuned for audio, and its sounds have any length"
        )
    if "onnx" in formats:
        _onnx_packages()


def encoder_of(loaded: LoadedModel) -> AuroraEncoder | PerceiverEncoder:
    """The image encoder of a checkpoint, LoRA merged, in eval mode; of a fine-tuned model that of the model within."""
    base: Any = merge_lora(getattr(loaded.model, "base", loaded.model))
    encoder = AuroraEncoder(base) if isinstance(base, Aurora) else PerceiverEncoder(base)
    return encoder.eval().float()


@torch.no_grad()
def export_encoder(loaded: LoadedModel, folder: Path, formats: Sequence[str] = ("torch",)) -> list[Program]:
    """Write encoder.pt2 (torch.export, to be run under torch.no_grad) and encoder.onnx, as asked for, and run each beside the
    model. Raises what `check_program` does, and ValueError where the encoder cannot be traced or the numbers differ."""
    check_program(formats, loaded.config)
    encoder = encoder_of(loaded)
    size = loaded.config.model.image_size
    images = [
        torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))
        for count in (TRACED, *TRIED)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    program = _traced(encoder, images[0])
    made = []
    for kind in formats:
        path = folder / FORMATS[kind]
        run = _torch(program, path) if kind == "torch" else _onnx(program, path, encoder.names)
        difference = max(_difference(run(one), encoder(one)) for one in images)
        if not difference <= SAME:
            path.unlink()
            raise ValueError(f"{path}: the program's outputs differ by {difference:g} from the model's")
        made.append(Program(path, difference))
    return made


def _traced(encoder: AuroraEncoder | PerceiverEncoder, images: Tensor) -> torch.export.ExportedProgram:
    """The graph, for any number of images."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            any_number = {0: torch.export.Dim("batch", min=1)}
            return torch.export.export(encoder, (images,), strict=False, dynamic_shapes=(any_number,))
    except (RuntimeError, AssertionError, torch._dynamo.exc.TorchDynamoException) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        name = type(encoder.model).__name__
        raise ValueError(f"torch.export cannot trace this {name}'s encoder of pictures: {first}") from error


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest, in shares of the output's largest number, which counts as 1 at least."""
    return max(
        float((a - b).abs().max()) / max(1.0, float(b.abs().max()))
        for a, b in zip(found, wanted, strict=True)
    )


def _torch(program: torch.export.ExportedProgram, path: Path) -> Run:
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    return lambda images: loaded(images)


def _onnx(program: torch.export.ExportedProgram, path: Path, names: Sequence[str]) -> Run:
    runtime = _onnx_packages()
    try:
        with _quiet():
            written = torch.onnx.export(
                program, (), dynamo=True, input_names=["images"], output_names=list(names), verbose=False
            )
        assert written is not None
        written.save(str(path), external_data=False)
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(f"{path}: torch.onnx cannot write this encoder: {error}") from error
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(one) for one in session.run(list(names), {"images": images.numpy()})]

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx prints its progress and warns of its own dependencies."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _onnx_packages() -> Any:
    """onnxruntime. Raises ImportError where one of the extra's packages is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"--program onnx needs pip install 'auroraio[onnx]' ({error})") from error
    return onnxruntime
