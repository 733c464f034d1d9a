"""PerceiverIO on real sounds: packed, trained for a moment, named by their labels, and nothing learned from shuffled ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from dataload.pack.__main__ import main as pack
from dataload.tokenizer import train_tokenizer
from train.evaluate.__main__ import main as evaluate
from train.pretrain import main

pytest.importorskip("soundfile", reason="needs soundfile: pip install 'auroraio[data]'")
pytest.importorskip("av", reason="needs PyAV: pip install 'auroraio[data]'")

WORDS = {"0": "zero", "3": "three", "6": "six"}


def test_spoken_digits_are_named_by_their_label(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three digits of six speakers; every fifth take is held out."""
    takes: dict[tuple[str, str], list[dict[str, str]]] = {}
    with (real_data / "fsdd/labels.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["digit"] in WORDS:
                takes.setdefault((row["digit"], row["speaker"]), []).append(row)
    with (tmp_path / "sounds.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "caption", "split"))
        for (digit, _), rows in takes.items():
            rows.sort(key=lambda row: int(row["index"]))
            for i, row in enumerate(rows):
                writer.writerow((row["path"], WORDS[digit], "test" if i % 5 == 4 else "train"))
    shards = tmp_path / "shards"
    table = [
        "--csv",
        str(tmp_path / "sounds.csv"),
        "--media",
        str(real_data / "fsdd"),
        "--media-column",
        "path",
    ]
    assert pack(["csv", *table, "--split-column", "split", "--output", str(shards)]) == 0
    train_tokenizer(list(WORDS.values()) * 20, tmp_path / "t.model", 276, model_type="bpe")

    run, test = tmp_path / "run", str(shards / "test-000000.tar")
    asked = ["perceiver-real", "--out", str(run), "--data.tokenizer", str(tmp_path / "t.model")]
    asked += ["--data.audio-text.train", str(shards / "train-000000.tar"), "--data.audio-text.heldout", test]
    asked += "--steps 40 --batch-size 24 --optim.warmup 5 --ema-decay 0 --eval-every 0 --device cpu".split()
    assert main([*asked, "--data.captions-per-sample", "1", "--precision", "fp32"]) == 0

    summary = json.loads((run / "summary.json").read_text())
    named = summary["evaluation"]["scores"]["naming"]["audio/accuracy"]
    assert summary["evaluation"]["counts"]["sounds"] == 54
    assert named["chance"] == pytest.approx(1 / 3)
    assert named["value"] > 0.65
    assert named["shuffled"] < 0.55  # 54 sounds: chance is 0.33 with a deviation of 0.064
    assert "Naming the sounds" in (run / "report.html").read_text()
    capsys.readouterr()
    assert (
        evaluate(["retrieval", "--checkpoint", str(run), "--data", test, "--output", str(tmp_path / "s")])
        == 0
    )
    assert json.loads((tmp_path / "s").read_text())["scores"]["naming"]["audio/accuracy"] == named
