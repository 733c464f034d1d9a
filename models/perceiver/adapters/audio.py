"""Sounds: waveforms of 16 kHz, read as a log-mel spectrogram or as they are; the model sees one interface.

Letters: P sounds, N samples of all of them, S samples of the longest.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.perceiver.adapters.base import Adapter
from models.perceiver.adapters.image import patchify, unpatchify
from models.perceiver.config import PerceiverConfig
from models.perceiver.pieces import Piece, no_offsets, no_samples, padded, visible

RATE, FFT, WINDOW, HOP = 16_000, 1024, 400, 160
"""Samples: per second, of a Fourier transform, of what it looks at (25 ms), between two frames (10 ms)."""
FLOOR = 1e-10
LOUD, SPREAD = (
    -10.5,
    6.8,
)  # about the mean and deviation of the logarithms, over spoken digits and sound events
GAIN_OF_GELU = 1.5  # keeps the variance of what goes through a GELU about as it is
GAIN = 10.0  # makes a waveform's deviation about 1


def audio_adapter(config: PerceiverConfig) -> Adapter:
    """The one that the configuration asks for. Both take waveforms packed, float [N], -1..1."""
    match config.audio_kind:
        case "mel":
            return MelAdapter(config)
        case "waveform":
            return WaveformAdapter(config)
        case other:
            raise ValueError(f"audio_kind {other!r}; supported: 'mel', 'waveform'")


class SoundAdapter(Adapter):
    """What both have in common."""

    def empty(self, device: torch.device) -> Piece:
        return Piece(torch.empty(0, device=device), no_samples(device), no_offsets(device))


class MelAdapter(SoundAdapter):
    """Patches of the log-mel spectrogram, those of a moment one behind the other; two-dimensional rotary positions. A
    sound that does not fill its last patch is continued with silence."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__(config, config.patch_widths["audio"], config.audio_grid)
        self.patch, self.mels, self.range = config.audio_patch, config.audio_mels, config.audio_range
        if config.audio_stem == "conv":
            bands, frames = config.audio_patch
            self.stem = SpectrumStem((frames, bands), config.encoder_width)  # type: ignore[assignment]

    def patches(self, piece: Piece) -> tuple[Tensor, Tensor]:
        bands, frames = self.patch
        moments = -(-piece.lengths // (HOP * frames))
        longest = HOP * frames * max(int(moments.max()) if len(moments) else 0, 1)
        spectrum = log_mel(padded(piece.data, piece.lengths, longest), self.mels)  # [P, mels, frames]
        if self.range and len(spectrum):
            spectrum = torch.maximum(spectrum, spectrum.amax((1, 2), keepdim=True) - self.range)
        spectrum = (spectrum - LOUD) / SPREAD
        return patchify(spectrum.transpose(1, 2)[:, None], (frames, bands)), moments * self.grid[1]

    def embed(self, piece: Piece, patches: Tensor, mask: Tensor | None) -> Tensor:
        if not isinstance(self.stem, SpectrumStem):
            return super().embed(piece, patches, mask)
        if (
            mask is not None
        ):  # convolutions overlap: a hidden patch is of middling loudness before they see it
            patches = patches.masked_fill(mask[..., None], 0)
        bands, frames = self.patch
        shape = self.shape(piece, patches.shape[1])
        own = frames * -(-piece.lengths // (HOP * frames))
        x = self.stem(unpatchify(patches, shape, (frames, bands)), own).flatten(2).transpose(1, 2)
        return x if mask is None else torch.where(mask[..., None], self.mask_token.to(x.dtype), x)


class SpectrumStem(nn.Module):
    """Spectrograms [P, 1, frames, bands] -> [P, E, T, F] by convolutions whose strides multiply to the patch. What a batch pads
    a sound by is zero for every layer, so that a sound is the same alone and in a batch. There is one norm, over the channels
    of each place, at the end: after the first layers it would remove how loud a place is."""

    def __init__(self, patch: tuple[int, int], dim: int) -> None:
        super().__init__()
        strides = [prime_factors(side) for side in patch]
        steps = max(map(len, strides))
        self.strides = list(zip(*(found + [1] * (steps - len(found)) for found in strides), strict=True))
        widths = [1, *(max(dim >> (steps - 1 - i), 16) for i in range(steps))]
        self.layers = nn.ModuleList()
        for i, stride in enumerate(self.strides):
            # an odd kernel that covers the stride
            kernel = (max(3, stride[0] + 1 - stride[0] % 2), max(3, stride[1] + 1 - stride[1] % 2))
            around = (kernel[0] // 2, kernel[1] // 2)
            self.layers.append(nn.Conv2d(widths[i], widths[i + 1], kernel, stride, around))
        self.norm = PlaceNorm(widths[-1])
        self.out = nn.Conv2d(widths[-1], dim, 1)

    def forward(self, x: Tensor, frames: Tensor) -> Tensor:
        """frames int [P]: those of each sound that are its own, a multiple of the patch's."""
        for layer, stride in zip(self.layers, self.strides, strict=True):
            own = visible(frames, x.shape[2])[:, None, :, None]
            x = GAIN_OF_GELU * F.gelu(layer(x * own))
            frames = frames // stride[0]
        return self.out(self.norm(x))


class PlaceNorm(nn.LayerNorm):
    """Layer norm over the channels of each place: [P, C, T, F] -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def prime_factors(number: int) -> list[int]:
    """12 -> [2, 2, 3]; 1 -> []."""
    found, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return found


class WaveformAdapter(SoundAdapter):
    """Pieces of the waveform itself; one-dimensional rotary positions."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__(config, config.patch_widths["audio"], config.audio_grid[:1])
        self.piece = config.waveform_patch

    def patches(self, piece: Piece) -> tuple[Tensor, Tensor]:
        lengths = -(-piece.lengths // self.piece)
        longest = self.piece * max(int(lengths.max()) if len(lengths) else 0, 1)
        return GAIN * padded(piece.data, piece.lengths, longest).unflatten(1, (-1, self.piece)), lengths


def log_mel(waveforms: Tensor, mels: int) -> Tensor:
    """float [P, S] at 16 kHz, S a multiple of 160 -> float32 [P, mels, S / 160]: ln(power + 1e-10) in `mels` bands.

    A frame looks at 25 ms (a Hann window in a transform of 1024) from 160 samples to 160 samples. Beyond a sound's ends
    there is silence, so that the frames are the same however far a batch pads it.
    """
    window = torch.hann_window(WINDOW, device=waveforms.device)
    x = F.pad(waveforms.float(), (FFT // 2, FFT // 2))
    if len(x) == 0:
        return x.new_zeros(0, mels, waveforms.shape[1] // HOP)
    spectrum = torch.stft(x, FFT, HOP, WINDOW, window, center=False, return_complex=True)
    power = spectrum[..., : waveforms.shape[1] // HOP].abs().square()
    filters = torch.from_numpy(mel_filters(mels)).to(power.device)
    with torch.autocast(power.device.type, enabled=False):
        return (filters @ power).add(FLOOR).log()


def mel_filters(mels: int) -> np.ndarray:
    """float32 [mels, 513]: triangles on Slaney's mel scale (linear below 1 kHz, then 27 steps per factor of 6.4), each of
    area 1 (Slaney 1998, Auditory Toolbox), from 0 to 8 kHz. Raises ValueError where one would lie between two bins."""
    bins = np.linspace(0, RATE / 2, FFT // 2 + 1)
    steps = np.linspace(0, 15 + 27 * np.log(RATE / 2 / 1000) / np.log(6.4), mels + 2)
    edges = np.where(steps < 15, steps * 200 / 3, 1000 * 6.4 ** ((steps - 15) / 27))
    below, middle, above = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangle = np.minimum((bins - below) / (middle - below), (above - bins) / (above - middle)).clip(min=0)
    if not (triangle.max(axis=1) > 0).all():
        raise ValueError(f"{mels} mel bands: some would be empty with a transform of {FFT}; take fewer")
    return (triangle * 2 / (above - below)).astype(np.float32)
