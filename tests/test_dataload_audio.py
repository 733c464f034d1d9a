"""Sound: every usual format to 16 kHz without aliases; segments by seeking; bad files cost one sample."""

from __future__ import annotations

import csv
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dataload import audio
from dataload.audio import BrokenAudio
from dataload.broken import BrokenSample
from dataload.decode.mp3 import counted
from dataload.sandbox import Sandbox
from tests.sounds import SECONDS, by_ffmpeg, chirp, encoded

sf = pytest.importorskip("soundfile", reason="needs soundfile: pip install 'auroraio[data]'")


def distance(found: np.ndarray, delay: float = 0.0) -> float:
    """RMS of the difference to the chirp at 16 kHz, over its RMS, within the middle; at the best delay up to `delay`
    seconds."""
    middle = slice(3200, 28800)
    late = 0.0
    if delay:
        reach = round(delay * 16000)
        match = np.correlate(found[middle], chirp(16000)[3200 + reach : 28800 - reach], "valid")
        late = (int(match.argmax()) - reach) / 16000
    near = [chirp(16000, late=late + step / 160000) for step in (range(-10, 11) if delay else (0,))]
    errors = [np.sqrt(np.mean((found[middle] - one[middle]) ** 2)) for one in near]
    return float(min(errors) / np.sqrt(np.mean(near[0][middle] ** 2)))


LOSSLESS = [
    ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_16"), ("W64", "PCM_16"), ("RF64", "PCM_16"),
    ("NIST", "PCM_16"), ("VOC", "PCM_16"), ("WAV", "PCM_U8"), ("WAV", "ULAW"), ("WAV", "IMA_ADPCM"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "subtype"), LOSSLESS)
def test_formats_without_loss_are_the_known_waveform(kind: str, subtype: str) -> None:
    sound = audio.decode(encoded(chirp(44100), 44100, kind, subtype))
    assert sound.problem == "" and sound.samples.dtype == np.float32
    assert len(sound.samples) == (32_638 if subtype == "IMA_ADPCM" else 32_000)  # it comes in blocks
    coarse = {"PCM_U8": 2e-2, "ULAW": 4e-2, "IMA_ADPCM": 4e-2}
    assert distance(sound.samples) < coarse.get(subtype, 2e-4)


LOSSY = {
    "a.mp3": ("-c:a", "libmp3lame", "-b:a", "192k"), "a.ogg": ("-c:a", "libvorbis", "-q:a", "6"),
    "a.opus": ("-c:a", "libopus", "-b:a", "128k"), "a.m4a": ("-c:a", "aac", "-b:a", "160k"), "a.aac": ("-c:a", "aac"),
    "alac.m4a": ("-c:a", "alac"), "a.wma": ("-c:a", "wmav2"), "a.wv": ("-c:a", "wavpack"), "a.mka": ("-c:a", "flac"),
    "a.mp2": ("-c:a", "mp2"), "a.ac3": ("-c:a", "ac3"), "a.tta": ("-c:a", "tta"), "a.spx": ("-c:a", "libspeex", "-ar", "16000"),
    "a.webm": ("-c:a", "libopus"), "flac.oga": ("-c:a", "flac"), "a.mov": ("-c:a", "pcm_s24le"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSY)
def test_other_formats_are_near_it(name: str) -> None:
    sound = audio.decode(by_ffmpeg(name, *LOSSY[name]))
    assert sound.problem == ""
    # Raw streams and old containers do not say how much of the beginning is the encoder's delay.
    delay = 0.06 if name in ("a.aac", "a.ac3", "a.mp2", "a.spx", "a.wma") else 0.0
    assert -1 <= len(sound.samples) - 32_000 <= 350 + 20_000 * delay  # AAC's last frame is full
    lossless = name in ("alac.m4a", "a.wv", "a.mka", "a.tta", "flac.oga", "a.mov")
    assert distance(sound.samples, delay) < (2e-4 if lossless else 0.3 if name == "a.spx" else 0.05)


@pytest.mark.parametrize("channels", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("kind", ["WAV", "FLAC"])  # one for each library
def test_channels_are_averaged(kind: str, channels: int) -> None:
    weights = np.arange(channels) - 0.5
    sound = audio.decode(encoded(chirp(48000, loud=0.2)[:, None] * weights / 8, 48000, kind, "PCM_24"))
    expected = chirp(16000, loud=0.2) * weights.mean() / 8
    assert np.abs(sound.samples - expected)[1000:-1000].max() < 1e-5


def tone(frequency: float, rate: int, seconds: float = 1.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)


def decibels(found: np.ndarray) -> float:
    """The highest line of the spectrum over that of a tone of amplitude 0.5."""
    window = np.hanning(len(found))
    return float(20 * np.log10(np.abs(np.fft.rfft(found * window)).max() / (0.25 * window.sum()) + 1e-12))


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
@pytest.mark.parametrize(
    ("rate", "frequency"), [(44100, 9000), (44100, 15000), (48000, 8200), (96000, 30000), (32000, 12000)]
)
def test_what_16_khz_cannot_hold_does_not_come_back_as_another_tone(
    kind: str, rate: int, frequency: int
) -> None:
    """A 9 kHz tone would appear at 7 kHz: torch and DALI let -13 and 0 dB of it through if nobody filters."""
    found = audio.decode(encoded(tone(frequency, rate), rate, kind, "PCM_24")).samples[2000:-2000]
    assert decibels(found) < -90
    naive = np.interp(np.arange(16000) / 16000, np.arange(rate) / rate, tone(frequency, rate))
    assert decibels(naive[2000:-2000]) > -30, "the measure sees an alias"


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000, 44056])
def test_what_it_can_hold_stays_as_it_is(rate: int) -> None:
    for frequency in (60, 440, 1000, 3000, 5000, 7000):
        if frequency < 0.44 * rate:
            found = audio.decode(encoded(tone(frequency, rate), rate, subtype="FLOAT")).samples
            assert len(found) in (16000, 16001)
            expected = tone(frequency, 16000)
            assert np.abs(found[1000:15000] - expected[1000:15000]).max() < 5e-4  # 0.01 dB


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.opus", "a.mp3", "a.m4a", "a.aac"])
def test_a_segment_is_that_part_of_the_whole(name: str) -> None:
    options = {"a.wav": (), "a.flac": (), **LOSSY}[name]
    data = by_ffmpeg(name, *options, seconds=8.0)
    whole = audio.decode(data).samples
    for start, seconds in ((0.0, 1.0), (0.05, 1.0), (3.21, 2.0), (6.5, 5.0)):
        part = audio.decode(data, start=start, seconds=seconds)
        expected = whole[round(start * 16000) :][: round(seconds * 16000)]
        assert part.start == start and abs(len(part.samples) - len(expected)) <= (2 if start == 6.5 else 0)
        error = np.abs(part.samples[: len(expected)] - expected[: len(part.samples)]).max()
        # AAC fills in noise; Opus predicts from further back than the 0.1 s that are decoded before.
        assert error < {"a.m4a": 2e-2, "a.aac": 2e-2, "a.opus": 2e-3}.get(name, 1e-5)


def test_a_place_is_a_share_of_what_is_possible() -> None:
    data = encoded(chirp(44100, 4.0), 44100)
    for place in (0.0, 0.25, 0.5, 1.0):
        sound = audio.decode(data, seconds=1.0, place=place)
        assert sound.start == pytest.approx(3 * place) and len(sound.samples) == 16000
    short = audio.decode(data, seconds=10.0, place=0.7)
    assert short.start == 0 and len(short.samples) == 64000
    # A header that promises more than there is: the place is one of what there is.
    cut = by_ffmpeg("a.flac", seconds=8.0)
    cut = cut[: len(cut) // 2]
    sound = audio.decode(cut, seconds=1.0, place=1.0)
    assert 1.0 < sound.start < 6.0 and len(sound.samples) == 16000 and sound.problem
    assert np.array_equal(sound.samples, audio.decode(cut).samples[-16000:])


def test_seeking_does_not_decode_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataload.decode.audio as inside

    seen = []
    plain = inside.Resampler.__call__

    def counting(self: inside.Resampler, block: np.ndarray) -> np.ndarray:
        seen.append(len(block))
        return plain(self, block)

    monkeypatch.setattr(inside.Resampler, "__call__", counting)
    for kind in ("WAV", "FLAC"):
        seen.clear()
        audio.decode(encoded(chirp(44100, 60.0), 44100, kind), start=50.0, seconds=1.0)
        assert sum(seen) <= 1.5 * 44100


def wav(channels: int, rate: int, declared: int, body: bytes) -> bytes:
    """A 16-bit WAV whose header says what it likes."""
    form = struct.pack(
        "<HHIIHH", 1, channels, rate, (rate * channels * 2) & 0xFFFFFFFF, (channels * 2) & 0xFFFF, 16
    )
    chunks = b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", declared) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no bytes"),
        (b"RIFF", "libsndfile"),
        (b"nothing that anybody reads" * 9, "Invalid data"),
        (wav(1, 16000, 0, b""), "no samples"),
        (wav(65, 16000, 1300, bytes(1300)), "65 channels; 1 to 64"),
        (wav(60000, 16000, 1200, bytes(1200)), "."),
        (wav(1, 2_000_000_000, 1000, bytes(1000)), "."),
        (wav(1, 1, 1000, bytes(1000)), "1 samples per second; 1000 to 768000"),
        (wav(1, 0, 1000, bytes(1000)), "."),
    ],
)
def test_what_is_no_sound_says_why(data: bytes, says: str) -> None:
    with pytest.raises(BrokenAudio, match=says):
        audio.decode(data)


def test_hours_are_refused_by_the_header_and_by_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    silence = encoded(np.zeros(8000 * 90), 8000, "FLAC")
    assert len(silence) < 20_000
    assert len(audio.decode(silence).samples) == 16000 * 90
    with pytest.raises(BrokenAudio, match="90 seconds declared, over the limit of 60"):
        audio.decode(silence, max_seconds=60)
    lying = bytearray(silence)
    lying[8 + 13] &= 0xF0  # STREAMINFO's 36 bits of samples: unknown
    lying[8 + 14 : 8 + 18] = bytes(4)
    with pytest.raises(BrokenAudio, match="more than 60 seconds, the limit|over the limit"):
        audio.decode(bytes(lying), max_seconds=60)
    assert len(audio.decode(bytes(lying), start=80.0, seconds=5.0).samples) == 16000 * 5


def test_what_is_not_finite_or_too_loud() -> None:
    samples = chirp(16000)
    samples[100:110], samples[200], samples[300] = np.nan, np.inf, 7.0
    found = audio.decode(encoded(samples, 16000, subtype="FLOAT")).samples
    assert np.isfinite(found).all() and found[105] == 0 and found[200] == 0 and found[300] == 1
    wild = np.where(np.arange(44100) % 2, 3e38, -3e38)
    found = audio.decode(encoded(wild, 44100, subtype="FLOAT")).samples
    assert np.isfinite(found).all() and np.abs(found).max() <= 1


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.opus", "a.mp3", "a.aiff", "a.m4a"])
def test_what_is_cut_short_is_used_as_far_as_it_is_whole_and_says_so(name: str) -> None:
    data = by_ffmpeg(
        name, *LOSSY.get(name, ()), *(("-movflags", "+faststart") if name == "a.m4a" else ()), seconds=8.0
    )
    whole, part = audio.decode(data), audio.decode(data[: len(data) * 6 // 10])
    assert whole.problem == "" and part.problem
    n = len(part.samples) - 4000
    assert 16000 < n < 0.8 * len(whole.samples)
    assert np.abs(part.samples[:n] - whole.samples[:n]).max() < 1e-5


@pytest.mark.parametrize("name", ["a.m4a", "a.ogg"])
def test_eight_channels_of_their_own_are_averaged(name: str) -> None:
    found = audio.decode(by_ffmpeg(name, "-ac", "8"))  # the chirp in two, silence in six
    assert not found.problem
    assert distance(4 * found.samples, delay=0.05) < 0.1


@pytest.mark.parametrize(("name", "other"), [("a.flac", "b.flac"), ("a.aac", "b.aac")])
@pytest.mark.parametrize("mono_first", [False, True])
def test_channels_may_change_midway(name: str, other: str, mono_first: bool) -> None:
    both = [by_ffmpeg(name), by_ffmpeg(other, "-af", "pan=mono|c0=c0")]
    found = audio.decode(b"".join(reversed(both) if mono_first else both))
    half = len(found.samples) // 2
    assert half >= 0.99 * SECONDS * audio.RATE
    for part in (found.samples[:half], found.samples[half:]):
        assert distance(part, delay=0.1) < 0.1


@pytest.mark.parametrize("name", ["a.flac", "a.tta", "a.m4a"])
def test_damage_behind_a_segment_is_not_its_problem(name: str) -> None:
    data = by_ffmpeg(name, *(("-movflags", "+faststart") if name == "a.m4a" else ()), seconds=8.0)
    data = data[: len(data) * 6 // 10]
    assert audio.decode(data).problem
    for start, seconds in ((None, 0.1), (None, 3.0), (1.0, 2.5)):
        assert audio.decode(data, start=start, seconds=seconds).problem == ""


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.opus", "a.m4a"])
@pytest.mark.parametrize("damaged", [False, True])
def test_steps_and_blocks_of_other_sizes_give_the_same(
    name: str, damaged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataload.decode import audio_av

    data = by_ffmpeg(name, seconds=8.0)
    if damaged:
        data = data[: len(data) // 2] + bytes(200) + data[len(data) // 2 + 200 :]
    kinds: list[tuple[float | None, float | None]] = [(None, None), (None, 0.5), (0.2, 0.3)]
    usual = [audio.decode(data, start=start, seconds=seconds) for start, seconds in kinds]
    assert bool(usual[0].problem) == damaged
    for packets, block in ((1, 1), (1, 1 << 20), (1000, 1000)):
        monkeypatch.setattr(audio_av, "PACKETS", packets)
        monkeypatch.setattr(audio_av, "BLOCK", block)
        found = [audio.decode(data, start=start, seconds=seconds) for start, seconds in kinds]
        for one, other in zip(usual, found, strict=True):
            assert other.start == one.start
            np.testing.assert_allclose(other.samples, one.samples, atol=1e-6)
        assert found[0].problem == usual[0].problem


# Files from anywhere


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as made:
        yield made


def test_a_sandbox_gives_the_same(sandbox: Sandbox) -> None:
    for data in (encoded(chirp(44100), 44100), by_ffmpeg("a.m4a", *LOSSY["a.m4a"])):
        here = audio.decode(data, seconds=1.0, place=0.3)
        there = audio.decode(data, seconds=1.0, place=0.3, sandbox=sandbox)
        assert np.array_equal(here.samples, there.samples) and here.start == there.start
    with pytest.raises(BrokenAudio, match="^no bytes$"):
        audio.decode(b"", sandbox=sandbox)


def test_odd_real_files_are_read_as_soundfile_reads_them(real_data: Path, sandbox: Sandbox) -> None:
    """All that soundfile reads, we read, with as many samples, or more of MP3s whose frames it does not count; what it does
    not, is read by FFmpeg or says why."""
    files = {f.name: f for f in (real_data / "weird_audio/files").iterdir()}
    with open(real_data / "weird_audio/manifest.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(files) == len(rows) == 87
    said: dict[str, str] = {}
    longer = []
    for row in rows:
        name = next(n for n in files if n == Path(row["path"]).name)
        data = files[name].read_bytes()
        try:
            sound = audio.decode(data, sandbox=sandbox)
        except BrokenAudio as error:
            said[name] = str(error)
            assert row["soundfile_read"] != "ok" or row["frames_read"] == "0", (name, error)
            assert said[name] and "0x" not in said[name]
        else:
            assert np.isfinite(sound.samples).all() and np.abs(sound.samples).max() <= 1
            if row["soundfile_read"] == "ok":
                expected = int(row["frames_read"]) * 16000 / int(row["sample_rate"])
                if len(sound.samples) > expected + 1 and counted(data)[0] is not data:
                    longer.append(name)
                else:
                    assert abs(len(sound.samples) - expected) <= 1, (name, len(sound.samples), expected)
    assert "id3_frames.mp3" in longer
    assert len(said) >= 20 and sandbox.restarts == 0


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Some bits flipped, a piece removed, doubled or zeroed, or the end cut off."""
    out = bytearray(data)
    for _ in range(int(rng.integers(5))):
        out[int(rng.integers(min(len(out), 400) if rng.random() < 0.5 else len(out)))] ^= 1 << int(
            rng.integers(8)
        )
    at, size = int(rng.integers(len(out))), int(rng.integers(1, 200))
    match int(rng.integers(5)):
        case 0:
            del out[at:]
        case 1:
            del out[at : at + size]
        case 2:
            out[at:at] = out[at : at + size]
        case 3:
            out[at : at + size] = bytes(len(out[at : at + size]))
    return bytes(out)


FUZZED = ["a.flac", "a.mp3", "a.ogg", "a.opus", "a.m4a", "a.wv", "a.wma", "a.aiff", "a.wav"]


@pytest.mark.parametrize("name", FUZZED)
def test_fuzzed_files_cannot_take_the_process_down(name: str, sandbox: Sandbox) -> None:
    data = by_ffmpeg(name, *LOSSY.get(name, ()), seconds=3.0)
    rng = np.random.default_rng(len(name))
    whole = broken = 0
    for _ in range(40):
        try:
            sound = audio.decode(
                mutated(data, rng), seconds=0.3, place=rng.random(), sandbox=sandbox, timeout=10.0
            )
            assert (
                sound.samples.dtype == np.float32 and np.isfinite(sound.samples).all() and len(sound.samples)
            )
            whole += 1
        except BrokenSample as error:
            assert str(error)
            broken += 1
    assert whole + broken == 40 and whole
    assert len(audio.decode(data, sandbox=sandbox).samples) > 47_000


@pytest.mark.parametrize(
    "answer",
    [
        lambda: None,
        lambda: (np.zeros(3), 0.0, ""),
        lambda: (np.zeros((2, 2), np.float32), 0.0, ""),
        lambda: ("", 0.0),
    ],
)
def test_an_answer_of_another_type_is_refused(
    answer: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = Sandbox()
    monkeypatch.setattr(sandbox, "call", lambda *_, **__: answer())
    with pytest.raises(BrokenAudio, match="something else than a sound"):
        audio.decode(b"x", sandbox=sandbox)


def test_arguments_are_checked() -> None:
    for wrong in ({"start": -1.0}, {"place": 1.5}, {"seconds": 0.0}, {"seconds": 9999.0}):
        with pytest.raises(ValueError, match="at least 0|more than 0"):
            audio.decode(b"x", **wrong)
