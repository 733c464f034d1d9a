"""Waveforms to a model's input: segments of one length, and log-mel against transformers' filters and spectrograms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dataload import audio
from tests.test_dataload_audio import chirp, tone


def test_segments() -> None:
    waveform = np.arange(1000, dtype=np.float32)
    assert audio.segment(waveform, 100, where="start")[0].tolist() == list(range(100))
    assert audio.segment(waveform, 100)[0][0] == 450
    drawn = [audio.segment(waveform, 100, np.random.default_rng(i)) for i in range(300)]
    starts = np.array([one[0][0] for one in drawn])
    assert starts.min() < 30 and starts.max() > 870 and all(length == 100 for _, length in drawn)
    again, _ = audio.segment(waveform, 100, np.random.default_rng(7))
    assert np.array_equal(again, drawn[7][0])
    padded, length = audio.segment(waveform[:30], 100, np.random.default_rng(0))
    assert (
        length == 30
        and padded[:30].tolist() == list(range(30))
        and not padded[30:].any()
        and len(padded) == 100
    )
    assert audio.segment(waveform, 1000)[1] == 1000
    with pytest.raises(ValueError, match="where="):
        audio.segment(waveform, 10, where="end")


# Log-mel


def test_no_band_is_empty_and_the_filters_are_those_of_transformers() -> None:
    pytest.importorskip("transformers", reason="needs transformers: pip install 'auroraio[test]'")
    from transformers.audio_utils import mel_filter_bank

    for mels in (64, 80, 128):
        filters = audio.mel_filters(mels)
        assert (filters > 0).any(axis=1).all()
        theirs = mel_filter_bank(513, mels, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney").T
        assert np.abs(filters - theirs).max() < 1e-8 + 1e-6 * theirs.max()
    with pytest.raises(ValueError, match="of 128 mel bands would be empty with an FFT of 256"):
        audio.mel_filters(128, 256)


def test_log_mel_is_that_of_transformers() -> None:
    pytest.importorskip("transformers", reason="needs transformers: pip install 'auroraio[test]'")
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    waveform = np.stack([chirp(16000), np.random.default_rng(0).normal(0, 0.1, 32000)]).astype(np.float32)
    ours = audio.log_mel(torch.from_numpy(waveform)).numpy()
    assert ours.shape == (2, 128, 200) and ours.dtype == np.float32
    filters = mel_filter_bank(513, 128, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    for mine, row in zip(ours, waveform, strict=True):
        theirs = spectrogram(
            row.astype(np.float64), window_function(400, "hann"), 400, 160, fft_length=1024, power=2.0,
            center=True, mel_filters=filters, mel_floor=0.0,
        )  # fmt: skip
        # They put the window's 400 samples first in the FFT, which changes phases alone, and pad by half a window.
        frames = min(mine.shape[1], theirs.shape[1])
        inner = slice(4, frames - 4)
        expected, mine = np.log(theirs[:, inner] + 1e-10), mine[:, inner]
        loud = expected > -14  # what is 60 dB below the loudest is float32's rounding
        assert (
            loud.mean() > 0.2
            and np.abs(mine - expected)[loud].max() < 2e-3
            and mine[~loud].max(initial=-np.inf) < -13.9
        )


def test_log_mel_places_a_tone_and_refuses_what_is_too_short() -> None:
    mel = audio.log_mel(torch.from_numpy(tone(1000, 16000)).float()[None])
    centre = np.argmax(audio.mel_filters()[:, 64])  # bin 64 of 1024 is 1 kHz
    assert (mel[0, :, 5:-5].argmax(dim=0) == centre).all()
    assert torch.allclose(audio.log_mel(torch.zeros(1, 1600)), torch.tensor(math.log(audio.FLOOR)))
    with pytest.raises(ValueError, match="more than 512 samples"):
        audio.log_mel(torch.zeros(1, 512))


def test_log_mel_is_float32_under_autocast() -> None:
    sound = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        low = audio.log_mel(sound)
    assert low.dtype == torch.float32 and torch.equal(low, audio.log_mel(sound))
