"""Captions of PerceiverIO for pictures, sounds and videos: `train.generate` for models of several modalities."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dataload import audio, images, video
from dataload.broken import BrokenSample
from dataload.multimodal.sample import Clip
from dataload.pack.kinds import kind_of
from dataload.packed import pack
from models.perceiver import PerceiverIO, Piece
from train.checkpoint import LoadedModel
from train.generate.writing import write
from train.multimodal.config import PerceiverPretrainConfig


def caption_media(
    loaded: LoadedModel, paths: Sequence[Path], args: argparse.Namespace, generator: torch.Generator
) -> Iterator[tuple[Path, list[str], str]]:
    """(path, captions, error) for each path, in order; one of the latter two is empty. A file is a sound or a video by its
    suffix, and a picture otherwise; of a long one the middle is taken, as long as the model was trained on."""
    assert isinstance(loaded.config, PerceiverPretrainConfig)
    clips: list[Clip] = []
    errors: dict[int, str] = {}
    for i, path in enumerate(paths):
        try:
            clips.append(read(path, loaded.config))
        except OSError as error:
            errors[i] = error.strerror or str(error)
        except BrokenSample as error:
            errors[i] = f"not a picture, sound or video that can be read ({error})"
    captions = iter(caption_clips(loaded, clips, args, generator) if clips else [])
    for i, path in enumerate(paths):
        yield (path, [], errors[i]) if i in errors else (path, next(captions), "")


def read(path: Path, config: PerceiverPretrainConfig) -> Clip:
    """A file as evaluation reads it. Raises OSError or BrokenSample."""
    data, model = path.read_bytes(), config.model
    match kind_of(path):
        case "audio":
            sound = audio.decode(data, seconds=model.audio_seconds, place=0.5)
            return Clip(audio=sound.samples)
        case "video":
            found = video.decode(
                data, frames=model.video_frames, seconds=config.data.video_seconds, place=0.5,
                size=model.video_size, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0,
            )  # fmt: skip
            clip = Clip(frames=found.frames)
            if found.sound is not None:
                clip.audio = found.sound[: round(model.audio_seconds * audio.RATE)]
            return clip
        case _:
            picture = images.decode(data)
            return Clip(image=images.resize_center_crop(picture, model.image_size))


@torch.no_grad()
def caption_clips(
    loaded: LoadedModel, clips: Sequence[Clip], args: argparse.Namespace, generator: torch.Generator
) -> list[list[str]]:
    """`num` captions for each."""
    model: PerceiverIO = loaded.model
    latents = model.encode(pieces(clips, generator.device), len(clips))
    return write(loaded, latents, args, generator)


def pieces(clips: Sequence[Clip], device: torch.device) -> dict[str, Piece]:
    """What the model reads of samples without texts."""
    found: dict[str, Piece] = {}
    for name, field in (("image", "image"), ("audio", "audio"), ("video", "frames")):
        have = [i for i, clip in enumerate(clips) if getattr(clip, field) is not None]
        if not have:
            continue
        arrays = [torch.tensor(getattr(clips[i], field)) for i in have]
        sample = torch.tensor(have, device=device)
        if name == "image":
            found[name] = Piece(torch.stack(arrays).to(device), sample)
        else:
            packed = pack(arrays).to(device)
            found[name] = Piece(packed.values, sample, packed.cu_seqlens)
    return found
