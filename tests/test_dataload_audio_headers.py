"""A sound file whose headers tell all is opened without decoding any of it first, and gives the same."""

from __future__ import annotations

import numpy as np
import pytest

from dataload import audio
from dataload.audio import BrokenAudio
from tests.sounds import by_ffmpeg

pytest.importorskip("soundfile", reason="needs soundfile: pip install 'auroraio[data]'")
# (name, options, rate, whether its headers are believed without decoding anything)
HEADERS: list[tuple[str, tuple[str, ...], int, bool]] = [
    ("a.m4a", (), 44100, True),
    ("a.m4a", (), 22050, False),  # it might be the lower half of a stream of 44,100 samples per second
    ("a.mp4", ("-c:a", "libmp3lame"), 44100, False),
    ("a.ogg", (), 44100, True),
    ("a.opus", (), 48000, True),
    ("a.ogg", ("-c:a", "flac"), 44100, False),
    ("a.flac", (), 44100, True),
    ("a.mp4", ("-c:a", "flac", "-strict", "-2"), 44100, False),
    ("a.mp4", ("-c:a", "libopus", "-strict", "-2"), 48000, False),
]


@pytest.mark.parametrize(("name", "options", "rate", "believed"), HEADERS)
def test_headers_that_tell_all_are_believed(
    name: str, options: tuple[str, ...], rate: int, believed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import av

    from dataload.decode.audio_av import AvReader

    data = by_ffmpeg(name, *options, rate=rate)
    with AvReader(data) as careful:
        told = careful.rate, careful.channels, careful.frames
        samples = np.concatenate(list(careful.blocks(0, None)))
    opened: list[bool] = []
    plain = av.open
    monkeypatch.setattr(
        av, "open", lambda *a, **k: opened.append("codec_whitelist" not in k["options"]) or plain(*a, **k)
    )
    if not believed:
        with pytest.raises(BrokenAudio, match="headers do not tell all"):
            AvReader(data, trusting=True)
    else:
        with AvReader(data, trusting=True) as reader:
            assert (reader.rate, reader.channels, reader.frames) == told
            np.testing.assert_array_equal(np.concatenate(list(reader.blocks(0, None))), samples)
    assert opened == [False]
    assert len(audio.decode(data).samples) == pytest.approx(len(samples) * 16000 / told[0], abs=2)
    assert opened[1:] == ([False] if believed else [False, True])


@pytest.mark.parametrize(("told", "lie"), [("rate", 48000), ("rate", 500), ("channels", 99)])
def test_where_headers_lied_it_is_decoded_without_them(
    told: str, lie: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataload.decode import audio_av

    data, plain, lies = by_ffmpeg("a.ogg"), audio_av.AvReader._open, []

    def lying(reader: audio_av.AvReader) -> None:
        plain(reader)
        if reader._trusting:
            lies.append(getattr(reader, told))
            setattr(reader, told, lie)

    usual = audio.decode(data)
    monkeypatch.setattr(audio_av.AvReader, "_open", lying)
    found = audio.decode(data)
    assert lies and found.problem == ""
    np.testing.assert_array_equal(found.samples, usual.samples)


def test_what_is_too_long_is_not_decoded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    data = bytearray(by_ffmpeg("a.flac"))
    data[21] &= 0xF0  # STREAMINFO's number of samples, 36 bits: 0 is unknown
    data[22:26] = bytes(4)
    opened, plain = [], av.open
    monkeypatch.setattr(av, "open", lambda *a, **k: opened.append(k["options"]) or plain(*a, **k))
    assert len(audio.decode(bytes(data)).samples) == 32000
    opened.clear()
    with pytest.raises(BrokenAudio, match="more than 0.5 seconds"):
        audio.decode(bytes(data), max_seconds=0.5)
    assert len(opened) == 1
