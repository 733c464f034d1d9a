"""The multimodal loader: several sources, any subset of modalities, exact shares, exact and elastic resume."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import captions, mp4, png, wav, write_tar

from dataload import audio
from dataload.batch import IGNORE
from dataload.multimodal import (
    AudioConfig,
    ImageConfig,
    MixtureConfig,
    MixtureLoader,
    MultimodalBatch,
    SourceConfig,
    TextConfig,
    VideoConfig,
)
from dataload.packed import Packed
from dataload.tokenizer import BOS, EOS, Tokenizer, train_tokenizer

pytest.importorskip("soundfile", reason="needs soundfile: pip install 'auroraio[data]'")
pytest.importorskip("av", reason="needs PyAV: pip install 'auroraio[data]'")

PICTURES, SOUNDS, VIDEOS = 20, 8, 6
FRAMES = 4


def hertz(number: int) -> float:
    return 400.0 + 100.0 * number


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions; sounds with captions, one of them without; videos, the odd ones silent, some with a
    picture or a sound file beside them."""
    folder = tmp_path_factory.mktemp("clips")
    write_tar(
        folder / "pictures.tar",
        {f"{n:03d}": {"png": png(n), "json": captions(f"picture {n} on the left")} for n in range(PICTURES)},
    )
    sounds = {
        f"{n:03d}": {"wav": wav(hertz(n), 0.25 + 0.05 * n), "json": captions(f"the sound {n}")}
        for n in range(SOUNDS)
    }
    del sounds["007"]["json"]
    write_tar(folder / "sounds.tar", sounds)
    videos: dict[str, dict[str, bytes]] = {}
    for n in range(VIDEOS):
        clip = mp4(40 * n, hertz=None if n % 2 else hertz(n))
        videos[f"{n:03d}"] = {"mp4": clip, "json": captions(f"a video {n} from the right")}
    videos["000"]["png"] = png(200)
    videos["003"]["wav"] = wav(3000.0, 0.3)
    write_tar(folder / "videos.tar", videos)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [f"the picture video sound {n} from a left or on the right" for n in range(60)]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "t.model", 400, model_type="bpe")


def config(data: Path, **changes: Any) -> MixtureConfig:
    plain = MixtureConfig(
        {
            "image-text": SourceConfig((str(data / "pictures.tar"),), 2.5, needs=("image", "text")),
            "video-text": SourceConfig((str(data / "videos.tar"),), 0.8, needs=("video", "text")),
            "audio-text": SourceConfig((str(data / "sounds.tar"),), 0.3, needs=("audio", "text")),
        },
        batch_size=12,
        image=ImageConfig(size=32, crop_scale=(0.6, 1.0), cell=8),
        audio=AudioConfig(seconds=0.4),
        video=VideoConfig(frames=FRAMES, size=24, crop_scale=(0.6, 1.0)),
        text=TextConfig(length=16),
    )
    return dataclasses.replace(plain, **changes)


def take(loader: MixtureLoader, count: int) -> list[MultimodalBatch]:
    with loader:
        return list(itertools.islice(loader, count))


def tensors(batch: MultimodalBatch) -> dict[str, torch.Tensor]:
    found = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Packed):
            found[field.name], found[f"{field.name}_cu"] = value.values, value.cu_seqlens
        elif isinstance(value, torch.Tensor):
            found[field.name] = value
    return found


def equal(first: MultimodalBatch, second: MultimodalBatch) -> bool:
    a, b = tensors(first), tensors(second)
    return first.keys == second.keys and all(torch.equal(a[name], b[name]) for name in a)


def test_batch(data: Path, tokenizer: Tokenizer) -> None:
    """Every piece is its sample's, by what is drawn and heard in it."""
    met: Counter[str] = Counter()
    for batch in take(MixtureLoader(config(data), tokenizer), 6):
        assert len(batch) == 12 and batch.sources.tolist() == sorted(batch.sources.tolist())
        kinds = [key.split("/")[0] for key in batch.keys]
        numbers = [int(key.split("/")[1]) for key in batch.keys]
        assert kinds == [("pictures", "videos", "sounds")[source] for source in batch.sources.tolist()]
        met.update(batch.keys)

        expected = [i for i in range(12) if kinds[i] == "pictures" or (kinds[i], numbers[i]) == ("videos", 0)]
        assert batch.image_sample.tolist() == expected
        assert batch.images.shape == (len(expected), 32, 32, 3) and batch.images.dtype == torch.uint8
        assert batch.image_mask.shape == (len(expected), 4, 4)
        assert (batch.image_mask.sum((1, 2)) == 10).all()  # 0.6 of 16
        for i, image in zip(expected, batch.images, strict=True):
            assert (image[..., 0] == (numbers[i] if kinds[i] == "pictures" else 200)).all()

        assert batch.video_sample.tolist() == [i for i in range(12) if kinds[i] == "videos"]
        assert (batch.video.lengths == FRAMES).all() and batch.video.values.shape[1:] == (24, 24, 3)
        clips = zip(batch.video_sample.tolist(), batch.video, batch.video_times.view(-1, FRAMES), strict=True)
        for i, frames, times in clips:
            assert abs(frames[..., 0].float().mean() - 40 * numbers[i]) < 6
            at = (times * 12).floor()  # 12 frames a second, blue rises by 20 with each
            assert times.diff().min() > 0
            assert (frames[..., 2].float().mean((1, 2)) - 20 * at).abs().max() < 8

        heard = [
            i
            for i in range(12)
            if kinds[i] == "sounds" or (kinds[i] == "videos" and (numbers[i] % 2 == 0 or numbers[i] == 3))
        ]
        assert batch.audio_sample.tolist() == heard
        for i, wave in zip(heard, batch.audio, strict=True):
            pitch = 3000.0 if (kinds[i], numbers[i]) == ("videos", 3) else hertz(numbers[i])
            loudest = np.abs(np.fft.rfft(wave.numpy() * np.hanning(len(wave)))).argmax() * 16_000 / len(wave)
            assert abs(loudest - pitch) < 6
            if kinds[i] == "sounds":
                length = min(0.25 + 0.05 * numbers[i], 0.4)
                assert abs(len(wave) - 16_000 * length) <= 1
        assert batch.audio.values.dtype == torch.float32

        assert batch.text_sample.tolist() == list(range(12))
        start = 0
        for i, tokens in enumerate(batch.text):
            assert tokens[0] == BOS and tokens[-1] == EOS and len(tokens) <= 16
            assert str(numbers[i]) in tokenizer.decode(tokens.tolist())
            targets = batch.mlm_targets[start : start + len(tokens)]
            asked = targets != IGNORE
            assert asked.any() and (targets[asked] == tokens[asked]).all()
            kept = batch.mlm_tokens[start : start + len(tokens)] == tokens
            assert kept[~asked].all()
            start += len(tokens)
    assert {key.split("/")[0] for key in met} == {"pictures", "videos", "sounds"}


def test_mirrored_pictures_and_videos_have_mirrored_words(data: Path, tokenizer: Tokenizer) -> None:
    sides = {"pictures": "left", "videos": "right"}
    other = {"left": "right", "right": "left"}
    seen = set()
    for batch in take(MixtureLoader(config(data, batch_size=24), tokenizer), 4):
        pictures = dict(zip(batch.image_sample.tolist(), batch.images, strict=True))
        for i, (key, tokens) in enumerate(zip(batch.keys, batch.text, strict=True)):
            kind = key.split("/")[0]
            if kind != "pictures":
                continue
            flipped = bool(pictures[i][0, 0, 1] > pictures[i][0, -1, 1])
            seen.add(flipped)
            words = tokenizer.decode(tokens.tolist()).split()
            assert (other[sides[kind]] if flipped else sides[kind]) in words
    assert seen == {True, False}


def test_several_captions_of_a_sample(tmp_path: Path, tokenizer: Tokenizer) -> None:
    many = [f"picture {n} on the left" for n in range(4)]
    write_tar(
        tmp_path / "p.tar",
        {
            "0": {"png": png(0), "json": captions(*many)},
            "1": {"png": png(1), "json": captions("one picture")},
        },
    )
    plain = MixtureConfig(
        {"image-text": SourceConfig((str(tmp_path / "p.tar"),), needs=("image", "text"))},
        batch_size=4,
        image=ImageConfig(32, flip=0.0),
        text=TextConfig(16, captions=3),
    )
    drawn = set()
    for batch in take(MixtureLoader(plain, tokenizer), 6):
        assert batch.text_sample.tolist() == [i for i in range(4) for _ in range(3)]
        texts = [tokenizer.decode(one.tolist()) for one in batch.text]
        for i, key in enumerate(batch.keys):
            of = texts[3 * i : 3 * i + 3]
            assert of == ["one picture"] * 3 if key == "p/1" else len(set(of)) == 3 and set(of) <= set(many)
            drawn |= set(of)
        assert len(batch.mlm_targets) == len(batch.text.values)
    assert drawn == {*many, "one picture"}


def test_shares_and_counters(data: Path, tokenizer: Tokenizer) -> None:
    with MixtureLoader(config(data), tokenizer) as loader:
        sources = torch.cat([batch.sources for batch in itertools.islice(loader, 9)])  # 108 = 3 periods of 36
        assert sources.bincount().tolist() == [75, 24, 9]
        counters = loader.counters
        assert [c["consumed"] for c in counters.values()] == [75, 24, 9]
        assert counters["audio-text"]["samples"] == SOUNDS - 1 and counters["audio-text"]["left_out"] == 1
        assert counters["video-text"]["epoch"] == 24 / VIDEOS
        text = str(loader)
        assert "image-text   69.4%  20 samples; 75 consumed (epoch 3.75), 0 broken" in text
        assert "1 left out" in text and "decode frames and sound track" in text
        assert all(cost.calls for cost in loader.stages.costs().values())


def test_every_sample_of_a_source_once_per_epoch(data: Path, tokenizer: Tokenizer) -> None:
    keys = [key for batch in take(MixtureLoader(config(data), tokenizer), 9) for key in batch.keys]
    for kind, count in (("pictures", PICTURES), ("videos", VIDEOS)):
        mine = [key for key in keys if key.startswith(kind)]
        for start in range(0, len(mine) - count + 1, count):
            assert len(set(mine[start : start + count])) == count


def test_batches_depend_on_neither_threads_nor_ranks(data: Path, tokenizer: Tokenizer) -> None:
    alone = take(MixtureLoader(config(data), tokenizer), 3)
    threaded = take(MixtureLoader(config(data, workers=0), tokenizer), 3)
    assert all(equal(a, b) for a, b in zip(alone, threaded, strict=True))
    for ranks in (2, 3):
        parts = [
            take(MixtureLoader(config(data, batch_size=12 // ranks), tokenizer, rank=r, world_size=ranks), 3)
            for r in range(ranks)
        ]
        for step, whole in enumerate(alone):
            assert Counter(whole.keys) == Counter(key for part in parts for key in part[step].keys)
            waves = sorted(wave.tolist() for part in parts for wave in part[step].audio)
            assert waves == sorted(wave.tolist() for wave in whole.audio)


def test_elastic_resume_loses_and_repeats_nothing(data: Path, tokenizer: Tokenizer) -> None:
    """Two global batches each on 1, 2 and 4 ranks, from saved states: the keys of one rank that never stopped."""
    expected = [Counter(batch.keys) for batch in take(MixtureLoader(config(data), tokenizer), 6)]
    state, got = None, []
    for ranks in (1, 2, 4):
        loaders = [
            MixtureLoader(config(data, batch_size=12 // ranks), tokenizer, rank=r, world_size=ranks)
            for r in range(ranks)
        ]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(2):
            got.append(Counter(key for loader in loaders for key in next(loader).keys))
        states = [loader.state_dict() for loader in loaders]
        assert all(one == states[0] for one in states)
        state = states[0]
        for loader in loaders:
            loader.close()
    assert got == expected


def test_resume_is_exact_and_other_data_is_refused(data: Path, tokenizer: Tokenizer) -> None:
    with MixtureLoader(config(data), tokenizer) as loader:
        next(loader)
        state = loader.state_dict()
        copied = pickle.loads(pickle.dumps(loader))  # noqa: S301
        expected = [next(loader), next(loader)]
    assert all(equal(a, b) for a, b in zip(take(copied, 2), expected, strict=True))
    broken = json.loads(json.dumps(state))
    broken["sources"]["video-text"]["consumed"] += 1
    with MixtureLoader(config(data), tokenizer) as loader:
        loader.load_state_dict(broken)
        assert not equal(next(loader), expected[0])
    changed = config(data).sources
    other = {**changed, "audio-text": dataclasses.replace(changed["audio-text"], weight=0.4)}
    with (
        MixtureLoader(config(data, sources=other), tokenizer) as loader,
        pytest.raises(ValueError, match="audio-text: share was 1/12, is"),
    ):
        loader.load_state_dict(state)
    fewer = {name: changed[name] for name in ("image-text", "video-text")}
    with (
        MixtureLoader(config(data, sources=fewer), tokenizer) as loader,
        pytest.raises(ValueError, match="the sources were"),
    ):
        loader.load_state_dict(state)


def test_broken_clips_are_reported_and_replaced(data: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = wav(500.0)
    clip = mp4(100)
    write_tar(
        tmp_path / "mixed.tar",
        {
            "a": {"wav": good, "txt": b"good"},
            "b": {"wav": b"RIFF nothing of the kind", "txt": b"bad sound"},
            "c": {"mp4": clip, "txt": b"good video"},
            "d": {"mp4": clip[:200], "txt": b"bad video"},
            "e": {"png": png(9), "txt": b"good picture"},
            "f": {"png": png(9)[:60], "txt": b"bad picture"},
        },
    )
    quarantine = tmp_path / "broken.jsonl"
    one = MixtureConfig(
        {"all": SourceConfig((str(tmp_path / "mixed.tar"),))},
        batch_size=6,
        image=ImageConfig(size=32),
        video=VideoConfig(frames=2, size=16),
        max_broken=0.9,
        quarantine=str(quarantine),
    )
    batches = take(MixtureLoader(one, tokenizer), 4)
    again = take(MixtureLoader(one, tokenizer), 4)
    assert [batch.keys for batch in batches] == [batch.keys for batch in again]
    assert {key.split("/")[1] for batch in batches for key in batch.keys} == {"a", "c", "e"}
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert {line["key"] for line in lines} == {"b", "d", "f"}
    content = (tmp_path / "mixed.tar").read_bytes()
    starts = {"b": b"RIFF nothing", "d": clip[:50], "f": png(9)[:50]}
    for line in lines:
        assert line["tier"] == "decode" and line["shard"] == str(tmp_path / "mixed.tar") and line["reason"]
        assert content[line["offset"] :].startswith(starts[line["key"]])


def test_sources_that_cannot_give_what_they_need(data: Path, tokenizer: Tokenizer) -> None:
    source = SourceConfig((str(data / "pictures.tar"),), needs=("audio",))
    with pytest.raises(
        ValueError, match=r"source 'x': none of its 20 samples has audio \(20 have image, 0 have audio"
    ):
        MixtureLoader(config(data, sources={"x": source}), tokenizer)
    with pytest.raises(ValueError, match="needs is"):
        SourceConfig(("x",), modalities=("image",), needs=("text",))
    with pytest.raises(ValueError, match="modalities is"):
        SourceConfig(("x",), modalities=("smell",))
    with pytest.raises(ValueError, match="size is 30"):
        ImageConfig(size=30)
    with pytest.raises(ValueError, match="rank is 2"):
        MixtureLoader(config(data), tokenizer, rank=2, world_size=2)


def test_real_clips(real_data: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Spoken digits and talking faces, as they are on the disk."""
    digits = sorted((real_data / "fsdd").rglob("*.wav"))[:12]
    faces = sorted(path for path in (real_data / "video_small").rglob("*.mp4"))
    write_tar(
        tmp_path / "digits.tar",
        {path.stem: {"wav": path.read_bytes(), "txt": path.stem.split("_")[0].encode()} for path in digits},
    )
    write_tar(tmp_path / "faces.tar", {path.stem: {"mp4": path.read_bytes()} for path in faces})
    mixture = MixtureConfig(
        {
            "digits": SourceConfig((str(tmp_path / "digits.tar"),), needs=("audio", "text")),
            "faces": SourceConfig((str(tmp_path / "faces.tar"),), needs=("video",)),
        },
        batch_size=8,
        video=VideoConfig(frames=4, size=64),
        max_broken=1.0,
    )
    with MixtureLoader(mixture, tokenizer) as loader:
        for batch in itertools.islice(loader, 4):
            assert set(batch.text_sample.tolist()) == {
                i for i, s in enumerate(batch.sources.tolist()) if s == 0
            }
            for wave in batch.audio:
                assert 0 < len(wave) <= 160_000 and 1e-4 < wave.abs().max() <= 1
            spectrum = audio.log_mel(batch.audio.padded()[0])
            assert spectrum.isfinite().all()
            assert batch.video.values.shape[1:] == (64, 64, 3) and batch.video.values.float().std() > 10
