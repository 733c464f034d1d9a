"""Broken samples in a training loader: counted, reported, replaced, left out of the next run."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from clips import png, write_tar
from pairs import ALONE, PAIRS, config, equal, numbers, partly_broken, sample, take, tokenizer

from dataload.pipeline import Broken, BrokenReport, Loader, TooManyBroken
from dataload.tokenizer import Tokenizer

__all__ = ["partly_broken", "tokenizer"]  # fixtures


def test_broken_pictures_are_counted_and_replaced(partly_broken: Path, tokenizer: Tokenizer) -> None:
    quarantine = partly_broken / "quarantine.jsonl"
    settings = config(partly_broken, max_broken=0.5, quarantine=str(quarantine))
    with Loader(settings, tokenizer) as loader:
        batches = list(itertools.islice(loader, 14))  # two epochs
        report = loader.broken
    seen = [n for batch in batches for n in numbers(batch)]
    assert len(seen) == 112 and not {5, 17, 50} & set(seen)
    assert [n >= PAIRS for b in batches for n in numbers(b)] == [
        i >= len(b.pair_images) for b in batches for i in range(8)
    ], "a substitute comes from the same source"
    assert all(b.pair_images[:, 0, 0, 0].tolist() == numbers(b)[: len(b.pair_images)] for b in batches)
    assert report.count >= 6 and report.tried == 112 + report.count
    assert sorted(broken.key for broken in report.samples) == ["005", "017", "050"]
    assert all(broken.shard.endswith("b.tar") and broken.reason for broken in report.samples)
    assert "samples are broken" in str(report) and "017" in str(report)
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert lines == [dataclasses.asdict(broken) for broken in report.samples]
    for workers in (0, 3):
        again = take(Loader(config(partly_broken, max_broken=0.5, workers=workers), tokenizer), 14)
        assert all(map(equal, batches, again))


def test_too_many_broken_pictures_stop_the_run(partly_broken: Path, tokenizer: Tokenizer) -> None:
    with Loader(config(partly_broken, max_broken=0.01), tokenizer) as loader:
        with pytest.raises(
            TooManyBroken, match=r"b\.tar: 0\d\d: .*limit \(max_broken\) is a share of 0\.01"
        ) as raised:
            for _ in range(14):
                next(loader)
        assert "of " in str(raised.value)
        batches = loader.state_dict()["batches"]
        assert 2 <= batches < 8  # not before 20 samples
        with pytest.raises(TooManyBroken):
            next(loader)
        assert loader.state_dict()["batches"] == batches


def test_share_of_broken_pictures_is_judged_from_twenty_on() -> None:
    broken = [Broken("a.tar", str(i), "why") for i in range(9)]
    report = BrokenReport(limit=0.1)
    report.add(10, broken)  # 9 of 19
    with pytest.raises(
        TooManyBroken, match=r"^9 of 20 samples are broken: a\.tar: 0: why; .*; and 4 more\. "
    ):
        report.add(1, [])
    exact = BrokenReport(limit=0.1)
    exact.add(18, broken[:2])
    assert exact.share == 0.1


def test_nothing_but_broken_pictures(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_tar(tmp_path / "b.tar", {f"{n}": {"png": b"x", "txt": b"a"} for n in range(5)})
    with Loader(config(tmp_path, max_broken=1.0), tokenizer) as loader:
        with pytest.raises(TooManyBroken, match="20 substitutes"):
            next(loader)


def test_bombs_and_vanished_tars_count_as_broken(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_tar(
        tmp_path / "a.tar",
        {f"{n:03d}": sample(n) for n in range(20)} | {"big": sample(0) | {"png": png(1, 65)}},
    )
    with Loader(config(tmp_path, max_broken=0.5, max_pixels=64 * 64), tokenizer) as loader:
        for _ in range(6):
            next(loader)
        assert "65x65 is 4225 pixels, over the limit of 4096" in str(loader.broken)
        (tmp_path / "a.tar").write_bytes(b"")  # the open file has shrunk
        with pytest.raises(TooManyBroken, match="shorter than when it was indexed"):
            for _ in range(20):
                next(loader)


def test_a_quarantine_file_leaves_its_samples_out_of_the_next_run(
    partly_broken: Path, tokenizer: Tokenizer
) -> None:
    quarantine = partly_broken / "quarantine.jsonl"
    settings = config(partly_broken, max_broken=0.5, quarantine=str(quarantine))
    take(Loader(settings, tokenizer), 14)
    content = (partly_broken / "b.tar").read_bytes()
    for line in map(json.loads, quarantine.read_text().splitlines()):
        wanted = {"005": png(5)[:60], "017": b"", "050": b"no picture"}[line["key"]]
        assert line["tier"] == "decode" and content[line["offset"] :].startswith(wanted)
    with Loader(config(partly_broken, max_broken=0.0, exclude=(str(quarantine),)), tokenizer) as loader:
        assert loader.counts == {"captioned": PAIRS - 2, "uncaptioned": ALONE - 1, "shards": 1}
        assert loader.index.manifest["excluded"] == 3
        seen = [n for batch in itertools.islice(loader, 14) for n in numbers(batch)]
        assert loader.broken.count == 0 and not {5, 17, 50} & set(seen)


def test_printing_a_loader_shows_its_stages(partly_broken: Path, tokenizer: Tokenizer) -> None:
    with Loader(config(partly_broken, max_broken=0.5), tokenizer) as loader:
        for _ in range(7):
            next(loader)
        lines = str(loader).splitlines()
        costs = loader.stages.costs()
    assert lines[0] == (
        "Loader, rank 0 of 1: 40 pairs and 16 uncaptioned pictures in 1 shards; decoded by cpu, 2 threads"
    )
    stages = [line.split()[0] for line in lines[2:-2]]
    assert stages == list(costs) == ["fetch", "header", "decode", "resize", "text", "mask", "collect"]
    assert costs["collect"].calls == 7 and costs["resize"].calls >= 56 <= costs["header"].calls
    assert lines[-1].startswith("  7 batches; the reader waited ") and "samples are broken" in lines[-1]


def test_a_quarantine_file_that_cannot_be_written_is_refused_at_once(
    partly_broken: Path, tokenizer: Tokenizer
) -> None:
    in_a_file = config(partly_broken, quarantine=str(partly_broken / "b.tar" / "q.jsonl"))
    with pytest.raises(OSError, match=r"b\.tar is no folder that can be written to"):
        Loader(in_a_file, tokenizer)
    new = partly_broken / "a" / "folder" / "q.jsonl"
    take(Loader(config(partly_broken, max_broken=0.5, quarantine=str(new)), tokenizer), 14)
    assert len(new.read_text().splitlines()) == 3
