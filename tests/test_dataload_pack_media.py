"""python -m dataload.pack with sounds and videos: bytes kept, captions and labels, files that belong together."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from packing import listing, picture, read, run, write


def sound(path: Path, seed: int = 0) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.1, 0.1, 800), 8000)
    return path.read_bytes()


def fact(sample: dict[str, Any], name: str) -> Any:
    return json.loads(sample["json"])[name]


def test_digits_of_real_speakers_with_labels_from_their_folders(real_data: Path, tmp_path: Path) -> None:
    files = sorted((real_data / "fsdd" / "recordings").glob("[0-3]_theo_1*.wav"))
    for path in files:
        folder = tmp_path / "digits" / path.name[0]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    out = tmp_path / "out"
    options = ("--media", tmp_path / "digits", "--label-from-folder", "--verify", "--output", out)
    status, text, _ = run("folder", *options)
    assert status == 0 and f"{len(files)} samples ({len(files)} sounds)" in text
    assert f"{len(files)} with a label" in text and listing(out)["splits"]["train"]["sounds"] == len(files)
    samples = read(out)
    assert [fact(sample, "label") for sample in samples] == [path.name[0] for path in files]
    assert [sample["wav"] for sample in samples] == [path.read_bytes() for path in files]
    assert all("txt" not in sample for sample in samples)


def test_sounds_of_a_table_of_labels(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "audio_events"
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:6]
    path_column, label_column = list(rows[0])[:2]
    table = "".join(f"{row[path_column]},{row[label_column]}\n" for row in rows)
    file_name = write(tmp_path / "some.csv", f"{path_column},{label_column}\n{table}")
    where = folder if (folder / rows[0][path_column]).is_file() else folder / "audio"
    options = ("--media-column", path_column, "--label-column", label_column)
    status, text, err = run(
        "csv", "--csv", file_name, "--media", where, *options, "--output", tmp_path / "out"
    )
    assert status == 0, err
    samples = read(tmp_path / "out")
    assert [fact(sample, "label") for sample in samples] == [row[label_column] for row in rows]
    assert [sample["ogg"] for sample in samples] == [(where / row[path_column]).read_bytes() for row in rows]


def test_videos_keep_their_bytes_and_captions(real_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    kept = {}
    for name in ("lbax4n.mpg", "sbwe5n.mpg"):
        shutil.copy(real_data / "video_small" / "videos" / name, folder)
        write(folder / name.replace(".mpg", ".txt"), f"A face says {name}.")
        kept[name] = (folder / name).read_bytes()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_bytes(b"this is no video" * 9)
    status, text, _ = run("folder", "--media", folder, "--output", tmp_path / "out", "--verify")
    assert status == 0 and "2 samples (2 videos)" in text and "2 broken samples, not packed:" in text
    assert "empty.mp4: an empty file" in text and "text.mp4: FFmpeg: Invalid data" in text
    samples = read(tmp_path / "out")
    assert {fact(sample, "file_name"): sample["mpg"] for sample in samples} == kept
    assert [sample["txt"].decode() for sample in samples] == [f"A face says {name}." for name in kept]


def test_files_of_one_name_are_one_sample(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    one = {"wav": sound(folder / "one.wav"), "mp4": b"moving", "jpg": picture(folder / "one.jpg")}
    (folder / "one.mp4").write_bytes(one["mp4"])
    second = sound(folder / "one.flac", 1)  # a second sound of that name: a sample of its own
    write(folder / "one.json", {"captions": ["One."], "label": 7})
    (folder / "two.MP4").write_bytes(b"moving too")
    status, text, _ = run("folder", "--media", folder, "--output", tmp_path / "out")
    assert status == 0 and "3 samples (1 pictures, 2 sounds, 2 videos)" in text
    first, other, two = sorted(read(tmp_path / "out"), key=lambda sample: -len(sample))
    assert (first["mp4"], first["jpg"]) == (one["mp4"], one["jpg"])
    sounds = {suffix: s[suffix] for s in (first, other) for suffix in ("wav", "flac") if suffix in s}
    assert sounds == {"wav": one["wav"], "flac": second}
    assert fact(first, "label") == 7 and fact(first, "captions") == ["One."]
    assert first["__key__"] != other["__key__"]
    assert set(two) - {"__key__", "__url__", "__local_path__"} == {"mp4"}
    assert two["mp4"] == b"moving too"


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (lambda folder: sound(folder / "a.wav"), ("--label-from-folder",), "a.wav lies in no folder below"),
        (
            lambda folder: (sound(folder / "a.wav"), write(folder / "a.json", {"label": [1]})),
            (),
            "a label is a text or a whole number, but this one is [1]",
        ),
    ],
)
def test_label_errors(tmp_path: Path, make: Any, options: tuple[str, ...], said: str) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    make(folder)
    status, _, err = run("folder", "--media", folder, "--output", tmp_path / "out", *options)
    assert status == 2 and said in err


def test_a_file_with_two_labels_is_refused(tmp_path: Path) -> None:
    sound(tmp_path / "media" / "a.wav")
    file = write(tmp_path / "t.csv", "file,class\na.wav,dog\na.wav,cat\n")
    options = ("--media", tmp_path / "media", "--media-column", "file", "--label-column", "class")
    status, _, err = run("csv", "--csv", file, *options, "--output", tmp_path / "out")
    assert status == 2 and "a.wav has the label 'cat' here and 'dog' above" in err
