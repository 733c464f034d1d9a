"""The benchmark of sound: what comes back of tones that 16 kHz cannot hold is found, of ours and of others."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from bench.peers import media
from bench.record import Row


def every_third(data: bytes) -> media.Call:
    """The nearest sample for each of 16 kHz, without a filter."""
    samples, rate = soundfile.read(io.BytesIO(data))
    return lambda: samples[np.arange(0, len(samples), rate / 16_000).round().astype(int), 0]


def row(peer: str) -> Row:
    kind = media.SoundCase("wav")
    return Row(media.AUDIO, kind.name, "decode", peer, "float32", kind.shape, peer in media.OURS, "ok")


def test_tones_that_come_back_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = media.OURS[1]
    assert media.leak(ours) < media.ALIAS
    good = media._checked(row(ours), media.SoundCase("wav"))
    assert (good.status, good.note) == ("ok", "") and good.accuracy[0].error < media.ALIAS
    for peer in ("bare", ours, media.CLEAN):
        monkeypatch.setitem(media.PEERS[media.AUDIO], peer, every_third)
    media.leak.cache_clear()
    try:
        assert media.leak("bare") == pytest.approx(1, abs=0.1)
        other = media._checked(row("bare"), media.SoundCase("wav"))
        assert (other.status, other.note, other.accuracy) == (
            "ok", "tones of 8 to 21 kHz come back at up to -1 dB", (),
        )  # fmt: skip
        # What promises -90 dB has no time without them.
        assert [media._checked(row(peer), media.SoundCase("wav")).status for peer in (ours, media.CLEAN)] == [
            "wrong"
        ] * 2
    finally:
        media.leak.cache_clear()
