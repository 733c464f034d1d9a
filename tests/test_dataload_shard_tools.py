"""python -m dataload.index, verify and reshard."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
import warnings
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from dataload import index as index_tool
from dataload import reshard, shards, verify
from dataload.shards import ShardIndex, ShardWarning
from tests.tars import contents_of_files, count_scans, pairs, write_tar


def indexed(*paths: Path, **options: Any) -> ShardIndex:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShardWarning)
        return shards.index(paths, **options)


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8 + number, 8), (number, 0, 0)).save(out, "PNG")
    return out.getvalue()


def wav(seconds: float) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(int(32000 * seconds)))
    return out.getvalue()


# --- index ----------------------------------------------------------------------------------------


def test_index_writes_and_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "a.tar", [*pairs(3), ("s.flac", b"x"), ("00000.cls", b"1"), ("README", b"x")])
    write_tar(tmp_path / "b.tar", [*pairs(2), ("lonely.txt", b"x")])
    (tmp_path / "c.tar").write_bytes(b"no tar" * 1000)
    assert index_tool.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "2 shards, 0.0 MiB: 6 samples" in out and "5 with image, 1 with audio, 5 with captions" in out
    assert "other files: 1 .cls, 1 without a key" in out
    assert "b.tar: lonely: left out: no picture" in out
    assert "1 shards cannot be used:\n" in out and "c.tar: no readable tar header" in out
    assert "indexes: 2 beside their shards, 0 in" in out
    assert sorted(path.name for path in tmp_path.glob("*.index")) == ["a.tar.index", "b.tar.index"]
    scans = count_scans(monkeypatch)
    (tmp_path / "c.tar").unlink()
    assert index_tool.main([str(tmp_path)]) == 0 and not scans
    assert index_tool.main([str(tmp_path), "--rebuild"]) == 0 and len(scans) == 2
    assert index_tool.main([str(tmp_path / "nothing.tar")]) == 2
    assert "error: no shard at" in capsys.readouterr().err


@pytest.mark.parametrize("tool", [index_tool, verify, reshard])
def test_help_has_an_example(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        tool.main(["--help"])
    assert f"  python -m {tool.__name__} " in capsys.readouterr().out


def test_progress_is_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    write_tar(tmp_path / "a.tar", pairs(3))
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert index_tool.main([str(tmp_path)]) == 0
    assert "1/1" in terminal.getvalue() and "shards" in terminal.getvalue()


# --- verify ---------------------------------------------------------------------------------------


def test_verify_decodes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [(f"{n}.png", png(n)) for n in range(3)] + [("s.wav", wav(0.1)), ("0.txt", b"a caption")]
    bad = write_tar(
        tmp_path / "bad.tar",
        [
            *good,
            ("cut.png", png(90)[:-30]),
            ("not.jpg", b"no picture"),
            ("t.wav", b"RIFF no sound"),
            ("big.png", png(100)),
        ],
    )
    listed = tmp_path / "broken.jsonl"
    options = [str(bad), "--workers", "1", "--quarantine", str(listed), "--max-pixels", "800"]
    assert verify.main(options) == 1
    out = capsys.readouterr().out
    assert "4 samples are broken" in out and "decode 4" in out
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [entry["key"] for entry in entries] == ["cut", "not", "t", "big"]
    assert all(entry["shard"] == str(bad) and entry["reason"] for entry in entries)
    data = bad.read_bytes()
    for entry, start in zip(entries, (b"\x89PNG", b"no picture", b"RIFF no", b"\x89PNG"), strict=True):
        assert data[entry["offset"] :].startswith(start)
    # what was written is an exclude list
    rest = indexed(bad, exclude=[listed])
    assert [rest.where(n)[1] for n in range(len(rest))] == ["0", "1", "2", "s"]
    with pytest.raises(SystemExit, match="2"):
        verify.main(options)
    assert "exists; choose another file" in capsys.readouterr().err


def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder of pictures that needs nothing, and does what it is told."""
    (tmp_path / "planted.py").write_text(
        "import os, signal\n"
        "def image(data, max_pixels):\n"
        "    if data == b'kill':\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    while data == b'hang':\n"
        "        pass\n"
        "    return ''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(verify.CHECKS, "image", verify.Check("planted:image", ()))


def test_verify_survives_what_kills_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that crashes and one that never ends, planted in the child."""
    path = write_tar(
        tmp_path / "t.tar",
        [(f"{n}.png", b"hang" if n == 1 else b"kill" if n == 2 else png(n)) for n in range(4)],
    )
    plant(tmp_path, monkeypatch)
    found = list(verify.verify(indexed(path), ["image"], workers=1, timeout=1.0))
    assert [one.key for one in found] == ["1", "2"]
    assert "1" in found[0].reason and "SIGSEGV" in found[1].reason


def test_verify_of_what_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, monkeypatch)
    path = write_tar(tmp_path / "t.tar", pairs(5))
    assert verify.main([str(path), "--workers", "2", "--quarantine", str(tmp_path / "q.jsonl")]) == 0
    assert "all 5 samples are whole" in capsys.readouterr().out
    assert (tmp_path / "q.jsonl").read_text() == ""


def test_verify_says_what_it_cannot_decode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "t.tar", [("a.png", png(1)), ("b.wav", wav(0.1))])
    plant(tmp_path, monkeypatch)
    monkeypatch.setitem(verify.CHECKS, "audio", verify.Check("x:y", ("no_such_module",)))
    assert verify.main([str(path), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert (
        "1 samples with audio are not decoded: that needs no_such_module (pip install 'auroraio[data]')"
        in out
    )
    assert "what was decoded is whole" in out


def test_verify_reports_shards_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 1000)
    assert verify.main([str(tmp_path)]) == 1
    assert "1 shards cannot be used" in capsys.readouterr().out


def test_real_broken_pictures(real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fuzzed and truncated files of Pillow's own tests: all are looked at, none ends the tool."""
    pictures = sorted(
        path for path in (real_data / "broken_images").rglob("*") if path.suffix[1:] in ("jpg", "png", "gif")
    )
    pictures = pictures[:60]
    path = write_tar(
        tmp_path / "t.tar", [(f"{n:03d}{file.suffix}", file.read_bytes()) for n, file in enumerate(pictures)]
    )
    assert verify.main([str(path), "--workers", "1", "--quarantine", str(tmp_path / "q.jsonl")]) in (0, 1)
    entries = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert entries
    for entry in entries:
        with pytest.raises(Exception), warnings.catch_warnings():  # noqa: B017  # Pillow agrees, in its own ways
            warnings.simplefilter("error")
            Image.open(pictures[int(entry["key"])]).load()


# --- reshard --------------------------------------------------------------------------------------

SAMPLES = [
    *pairs(5), ("00000.cls", b"3"), ("00001.seg.png", b"mask"), ("s.flac", b"sound"), ("s.json", b'{"label": 1}'),
    ("é" * 80 + "/long.jpg", b"a long name"),
]  # fmt: skip


def test_reshard_keeps_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write_tar(tmp_path / "old.tar", SAMPLES, tarfile.GNU_FORMAT)
    out = tmp_path / "new"
    assert reshard.main([str(old), "--output", str(out), "--max-samples", "3"]) == 0
    assert "7 samples written to 3 shards" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["reshard.json", *(f"train-{n:06d}.tar{end}" for n in range(3) for end in ("", ".index"))]
    )
    before, after = indexed(old), indexed(*sorted(out.glob("*.tar")))
    assert [len(shard) for shard in after.shards] == [3, 3, 1]
    stripped = [
        {key.split("/", 1)[1]: files for key, files in contents_of_files(index).items()}
        for index in (before, after)
    ]
    assert stripped[0] == stripped[1] and list(stripped[0]) == list(stripped[1])
    assert json.loads((out / "reshard.json").read_text())["shards"] == {
        "train-000000.tar": 3, "train-000001.tar": 3, "train-000002.tar": 1,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_reshard_writes_opens_in_webdataset(tmp_path: Path) -> None:
    old = write_tar(tmp_path / "old.tar", SAMPLES, tarfile.GNU_FORMAT)
    _, paths = reshard.reshard(indexed(old), tmp_path / "new", max_samples=3, shuffle_seed=4)
    theirs = {
        sample["__key__"]: {name: data for name, data in sample.items() if not name.startswith("__")}
        for sample in webdataset.WebDataset([str(path) for path in paths], shardshuffle=False)
    }
    ours = {key.split("/", 1)[1]: dict(files) for key, files in contents_of_files(indexed(old)).items()}
    assert theirs == ours


def test_reshard_is_deterministic_and_shuffles(tmp_path: Path) -> None:
    olds = [write_tar(tmp_path / f"{n}.tar", pairs(30, first=30 * n)) for n in range(2)]
    bytes_of = {}
    for name, seed in (("a", 7), ("b", 7), ("c", 8), ("d", None)):
        _, paths = reshard.reshard(indexed(*olds), tmp_path / name, max_samples=25, shuffle_seed=seed)
        bytes_of[name] = [path.read_bytes() for path in paths]
    assert bytes_of["a"] == bytes_of["b"] != bytes_of["c"]
    index = indexed(*sorted((tmp_path / "a").glob("*.tar")))
    keys = [index.where(n)[1] for n in range(60)]
    assert sorted(keys) == [f"{n:05d}" for n in range(60)] != keys
    assert sum(abs(int(key) - n) for n, key in enumerate(keys)) > 600, (
        "a shuffle moves them far: 1200 is expected"
    )
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def test_reshard_by_size(tmp_path: Path) -> None:
    old = write_tar(tmp_path / "old.tar", [(f"{n}.jpg", bytes(100_000)) for n in range(30)])
    plan, paths = reshard.reshard(indexed(old), tmp_path / "new", max_bytes=2**20)
    assert [len(samples) for samples in plan.shards] == [10, 10, 10]
    assert [path.stat().st_size for path in paths] == plan.sizes and max(plan.sizes) <= 2**20 + 10240


def test_keys_that_collide_are_made_unique_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [("a.jpg", b"1"), ("a-2.jpg", b"2"), ("dir/a.jpg", b"3")]
    olds = [
        write_tar(tmp_path / f"{n}.tar", [(name, data + b"%d" % n) for name, data in files]) for n in range(3)
    ]
    assert reshard.main([*map(str, olds), "--output", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert "6 samples had the key of an earlier one" in out and f"{olds[1]}: a is now a-3" in out
    index = indexed(tmp_path / "new" / "train-000000.tar")
    assert {index.where(n)[1]: index.image(n) for n in range(9)} == {
        "a": b"10", "a-2": b"20", "dir/a": b"30", "a-3": b"11", "a-2-2": b"21", "dir/a-2": b"31",
        "a-4": b"12", "a-2-3": b"22", "dir/a-3": b"32",
    }  # fmt: skip


def test_reshard_leaves_out_what_is_listed(tmp_path: Path) -> None:
    old = write_tar(tmp_path / "old.tar", pairs(5))
    (tmp_path / "list").write_text(
        json.dumps({"shard": str(old), "key": "00003", "reason": "cut"}) + "\n00001\n"
    )
    arguments = [str(old), "--output", str(tmp_path / "new"), "--exclude", str(tmp_path / "list")]
    assert reshard.main(arguments) == 0
    index = indexed(tmp_path / "new" / "train-000000.tar")
    assert [index.where(n)[1] for n in range(len(index))] == ["00000", "00002", "00004"]


def test_reshard_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_tar(tmp_path / "old.tar", pairs(40))
    _, whole = reshard.reshard(indexed(old), tmp_path / "whole", max_samples=10)
    out = tmp_path / "new"
    written: list[str] = []
    write = reshard._write

    def failing(index: Any, samples: np.ndarray, renamed: Any, path: Path, progress: Any) -> None:
        write(index, samples, renamed, path, progress)
        written.append(path.name)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(reshard, "_write", failing)
    with pytest.raises(KeyboardInterrupt):
        reshard.reshard(indexed(old), out, max_samples=10)
    assert not list(out.glob("*.tar")), "none before all"
    monkeypatch.setattr(
        reshard, "_write", lambda *arguments: written.append(arguments[3].name) or write(*arguments)
    )
    _, paths = reshard.reshard(indexed(old), out, max_samples=10)
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in whole]
    assert [name[:12] for name in written] == [f"train-{n:06d}" for n in (0, 1, 2, 2, 3)]
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".index") == [
        "reshard.json",
        *(p.name for p in paths),
    ]


def test_reshard_starts_anew_with_other_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_tar(tmp_path / "old.tar", pairs(40))
    out = tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: None)
        reshard.reshard(indexed(old), out, max_samples=10)
    for path in out.glob("*.tar"):  # as if it had been killed before any was moved
        path.replace(next(out.glob(".resharding-*")) / path.name)
    (out / "reshard.json").unlink()
    _, paths = reshard.reshard(indexed(old), out, max_samples=20)
    assert len(paths) == 2 and not list(out.glob(".resharding-*"))
    with pytest.raises(reshard.ReshardError, match=r"is not empty \(reshard.json, train-000000.tar"):
        reshard.reshard(indexed(old), out, max_samples=20)


def test_reshard_refuses_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write_tar(tmp_path / "old.tar", pairs(3))
    index = indexed(old)
    old.write_bytes(old.read_bytes()[:2000])
    with pytest.raises(OSError, match="shorter than when it was indexed"):
        reshard.reshard(index, tmp_path / "new")
    (tmp_path / "bad.tar").write_bytes(b"x" * 1000)
    assert reshard.main([str(tmp_path / "bad.tar"), "--output", str(tmp_path / "other")]) == 2
    assert "every shard has to be usable" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    good = write_tar(tmp_path / "good.tar", pairs(3))
    assert reshard.main([str(good), "--output", str(tmp_path / "full")]) == 2
    assert "is not empty (mine.txt ...)" in capsys.readouterr().err
