"""python -m dataload.pack, interrupted: what stays, what the next call makes of it, what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packing import five_pictures, hashes, listing, read, run, write
from PIL import Image

import dataload.pack
from dataload.pack.writer import ShardWriter

ROOT = Path(dataload.pack.__file__).parents[2]


@pytest.fixture
def table(tmp_path: Path) -> list[object]:
    """A command without its output: thirteen rows with captions, a missing and a broken file, a duplicate, two
    splits, in shards of two."""
    folder = five_pictures(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / f"noise{number}.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "again.jpg").write_bytes((folder / "red.jpg").read_bytes())
    names = ["red.jpg", "noise0.png", "lost.jpg", "green.jpg", "broken.jpg", "noise1.png", "blue.jpg"]
    names += ["again.jpg", "noise2.png", "gold.jpg", "noise3.png", "gray.jpg", "noise4.png"]
    rows = "".join(f"{name},A {name[:-4]},{'test' if i > 9 else 'train'}\n" for i, name in enumerate(names))
    file = write(tmp_path / "table.csv", "image,caption,split\n" + rows)
    options = ("--split-column", "split", "--max-samples", "2")
    return ["csv", "--csv", file, "--images", folder, *options]


def fail_at(monkeypatch: pytest.MonkeyPatch, place: int, error: type[BaseException]) -> None:
    """The `place`th sample of this process cannot be written."""
    written, count = ShardWriter.write_files, iter(range(1, 1000))

    def write_files(self: Any, *rest: Any) -> None:
        if next(count) == place:
            raise error(28, "No space left on device")
        written(self, *rest)

    monkeypatch.setattr(ShardWriter, "write_files", write_files)


@pytest.mark.parametrize("place", range(1, 12))
def test_wherever_it_fails_it_goes_on_to_the_same_bytes(
    table: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    assert run(*table, "--output", tmp_path / "whole")[0] == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_at(patch, place, OSError)
        status, _, err = run(*table, "--output", out)
    # Eight samples of train make four shards, three of test two; one is finished when the next begins or its
    # split ends.
    whole = [0, 0, 0, 1, 1, 2, 2, 3, 4, 4, 4][place - 1]
    assert status == 1 and "No space left" in err
    assert (f"{whole} whole shards are kept" if whole else "begins anew") in err
    assert [path.name for path in out.iterdir()] == ([".packing"] if whole else [])
    status, text, err = run(*table, "--output", out)
    assert status == 0 and ("goes on after" in err) == bool(whole)
    assert "1 pictures missing on disk" in text and "broken.jpg" in text and "again.jpg = red.jpg" in text
    assert hashes(out) == hashes(tmp_path / "whole")


def test_a_killed_packing_goes_on(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (800, 800, 3), np.uint8)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(16):  # each takes some 30 ms to decode and shrink, so the kill is in time
        Image.fromarray(np.roll(noise, number)).save(folder / f"{number:02d}.png", compress_level=0)
    options = ["folder", "--images", str(folder), "--resize", "40", "--max-samples", "2", "--workers", "1"]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dataload.pack", *options, "--output", str(out)]
    packing = subprocess.Popen(command, cwd=ROOT)
    try:
        third = out / ".packing" / "train-000002.tar"
        end = time.monotonic() + 60
        while not third.exists() and time.monotonic() < end:
            time.sleep(0.002)
        packing.send_signal(signal.SIGKILL)
    finally:
        packing.kill()
        packing.wait()
    assert packing.returncode == -signal.SIGKILL, "the packing was over before it was killed"
    kept = {path.name: path.stat().st_mtime_ns for path in (out / ".packing").glob("*.tar")}
    assert 3 <= len(kept) < 8 and not (out / "dataset.json").exists()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    # Where it was killed between a shard's last rename and its line, that shard is written again.
    assert any(f"in {n} whole shards" in again.stderr for n in (len(kept), len(kept) - 1)), again.stderr
    assert out.joinpath("train-000000.tar").stat().st_mtime_ns == kept["train-000000.tar"], "written again"
    assert run(*options, "--output", tmp_path / "whole")[0] == 0
    assert hashes(out) == hashes(tmp_path / "whole")


def test_ctrl_c(table: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, 6, KeyboardInterrupt)
    status, _, err = run(*table, "--output", tmp_path / "out")
    assert status == 130 and "interrupted" in err and "the same command goes on from there" in err


def interrupted(table: list[object], out: Path, monkeypatch: pytest.MonkeyPatch, *more: object) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, 6, OSError)
        assert run(*table, "--output", out, *more)[0] == 1


def test_another_packing_is_refused(
    table: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(table, out, monkeypatch)
    status, _, err = run(*table, "--output", out, "--max-samples", "3", "--resize", "16")
    assert status == 2 and "max_samples was 2, now 3" in err and "resize was None, now 16" in err
    picture = tmp_path / "pictures" / "gray.jpg"
    os.utime(picture, (1, 1))
    status, _, err = run(*table, "--output", out)
    assert status == 2 and "files of the source have another size or time" in err and "max_samples" not in err
    csv = Path(str(table[2]))
    csv.write_text(csv.read_text().replace("A gray", "Another gray"))
    assert "the source lists other samples or captions" in run(*table, "--output", out)[2]
    assert not list(out.glob("*.tar"))
    assert run(*table, "--output", out, "--restart")[0] == 0
    assert run(*table, "--output", tmp_path / "whole")[0] == 0
    assert hashes(out) == hashes(tmp_path / "whole")


def test_a_damaged_journal(table: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run(*table, "--output", tmp_path / "whole")
    interrupted(table, out, monkeypatch)
    journal = out / ".packing" / "journal.jsonl"
    lines = journal.read_bytes()
    journal.write_bytes(lines[:-20])  # its writer died: the last shard is written again
    assert run(*table, "--output", out)[0] == 0
    assert hashes(out) == hashes(tmp_path / "whole")

    out = tmp_path / "out2"
    interrupted(table, out, monkeypatch)
    shard = next((out / ".packing").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    status, _, err = run(*table, "--output", out)
    assert status == 2 and "is not as the interrupted packing left it" in err and "--restart" in err
    (out / ".packing" / "journal.jsonl").write_bytes(b"{\n")
    status, _, err = run(*table, "--output", out)
    assert status == 2 and "is damaged" in err


@pytest.mark.parametrize("place", range(1, 12))
def test_killed_while_the_shards_are_moved(
    table: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """Over an earlier packing, whose shards have the same names: nothing of either is mixed up or lost."""
    out = tmp_path / "out"
    run(*table, "--output", tmp_path / "whole")
    run("folder", "--images", tmp_path / "pictures", "--output", out, "--max-samples", "1")
    assert len(listing(out)["splits"]["train"]["shards"]) == 12
    moved, removed, count = Path.rename, Path.unlink, iter(range(1, 1000))

    class Killed(BaseException):
        pass

    def die_in_time(doing: Any) -> Any:
        def instead(self: Path, *rest: Any, **options: Any) -> Any:
            if self.suffix == ".tar" and self.name.startswith("t") and next(count) == place:
                raise Killed
            return doing(self, *rest, **options)

        return instead

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die_in_time(moved))
        if place % 2:  # while the old ones are removed
            patch.setattr(Path, "unlink", die_in_time(removed))
        try:
            run(*table, "--output", out, "--overwrite")
        except Killed:
            assert (out / ".packing").is_dir()
            assert run(*table, "--output", out, "--overwrite")[0] == 0
    if (out / ".packing").exists():
        assert run(*table, "--output", out, "--overwrite")[0] == 0
    assert hashes(out) == hashes(tmp_path / "whole")
    assert len(read(out)) == 8


def test_two_at_once_are_refused(table: list[object], tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="needs a POSIX system: fcntl is not on Windows")
    folder = tmp_path / "out" / ".packing"
    folder.mkdir(parents=True)
    with open(folder / "journal.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, _, err = run(*table, "--output", tmp_path / "out")
    assert status == 2 and "another packing writes to" in err
    assert run(*table, "--output", tmp_path / "out")[0] == 0


def test_the_journal_names_no_file_outside(table: list[object], tmp_path: Path) -> None:
    """dataset.json of an earlier packing says what --overwrite removes: names, whatever it holds."""
    out, victim = tmp_path / "out", tmp_path / "victim.tar"
    run(*table, "--output", out)
    victim.write_bytes(b"keep")
    told = listing(out)
    told["splits"]["train"]["shards"].append("../victim.tar")
    (out / "dataset.json").write_text(json.dumps(told))
    assert run(*table, "--output", out, "--overwrite")[0] == 0
    assert victim.exists()
