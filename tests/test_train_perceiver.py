"""Pre-training PerceiverIO on pictures, clips and sounds: the same command, loop and promises as Aurora's."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import captions, wav, write_tar
from micro import ROOT
from PIL import Image
from ranks import Launch
from safetensors.torch import load_file

from dataload import shards
from dataload.multimodal import MIXTURES, PAIRS, ImageConfig, MixtureConfig, PairSet, SourceConfig, mixture
from dataload.scenes import media as scenes_media
from dataload.tokenizer import Tokenizer
from models import load_pretrained
from models.perceiver import PerceiverObjectives, Piece
from train import cli
from train.checkpoint import load_model
from train.config import ConfigError, problems, to_dict
from train.evaluate.__main__ import main as evaluate
from train.evaluate.pairs import score_pairs
from train.generate.__main__ import main as generate
from train.multimodal.config import PerceiverPretrainConfig
from train.multimodal.data import evaluation_sets, find_pairs, open_pairs
from train.presets import preset
from train.pretrain import main

pytest.importorskip("av", reason="needs PyAV: pip install 'auroraio[data]'")
pytest.importorskip("soundfile", reason="needs soundfile: pip install 'auroraio[data]'")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> scenes_media.MediaPaths:
    folder = tmp_path_factory.mktemp("corpus")
    return scenes_media.build(
        folder, train=60, uncaptioned=0, heldout=12, sounds=20, clips=20, heldout_media=12, workers=1
    )


def arguments(data: scenes_media.MediaPaths, out: Path, *more: str) -> list[str]:
    """A run of a very small model: 6 steps of 18 samples, 12.5 pictures, 4 clips and 1.5 sounds each."""
    pictures = data.pictures
    shards = {
        "image-text": (pictures.train, pictures.heldout),
        "video-text": (data.clips, data.heldout_clips),
        "audio-text": (data.sounds, data.heldout_sounds),
    }
    given: list[str] = ["perceiver-tiny", "--out", str(out), "--data.tokenizer", str(data.tokenizer)]
    for kind, (train, heldout) in shards.items():
        given += [f"--data.{kind}.train", *map(str, train), f"--data.{kind}.heldout", *map(str, heldout)]
    model = {
        "latents": 8, "latent-width": 32, "latent-layers": 1, "latent-head-dim": 16, "encoder-width": 32,
        "encoder-head-dim": 16, "image-patch": 16, "text-width": 32, "decoder-width": 32, "decoder-head-dim": 16,
        "decoder-layers": 1, "query-width": 32, "embedding-width": 16,
    }  # fmt: skip
    for name, value in model.items():
        given += [f"--model.{name}", str(value)]
    given += "--steps 6 --batch-size 18 --optim.warmup 2 --eval-every 3 --eval-images 8 --eval-views 5 --save-every 3".split()
    return [*given, "--device", "cpu", "--precision", "fp32", *more]


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


@pytest.fixture(scope="module")
def straight(data: scenes_media.MediaPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps without interruption."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main(arguments(data, out)) == 0
    return out


WAYS = [f"{a}_to_{b}" for m in ("image", "video", "audio") for a, b in (("text", m), (m, "text"))]


def test_every_modality_is_trained_scored_and_reported(straight: Path) -> None:
    first = lines(straight, "train")[0]["losses"]
    assert set(first) == {"itc", "vtc", "atc", "caption", "mlm", "mim", "mvm", "mam"}
    assert all(value > 0 for value in first.values())
    scores = lines(straight, "eval")[-1]["scores"]
    assert {f"{way}/R@{k}" for way in WAYS for k in (1, 5, 10)} <= set(scores)
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["model"]["family"] == "PerceiverIO"
    counts = summary["evaluation"]["counts"]
    for many in ("images", "videos", "sounds"):
        assert (counts[many], counts[f"captions_of_{many}"], counts[f"generated_of_{many}"]) == (12, 60, 12)
        assert counts[f"masked_tokens_of_{many}"] >= 12
    perplexity = summary["evaluation"]["scores"]["perplexity"]
    assert set(perplexity) == {"perplexity", "perplexity_of_videos", "perplexity_of_sounds"}
    assert set(perplexity["perplexity"]) == {"value", "shuffled", "unigram"}
    retrieval = summary["evaluation"]["scores"]["retrieval"]
    assert retrieval["text_to_video/R@5"]["chance"] == pytest.approx(5 / 12)
    assert set(retrieval["audio_to_text/R@1"]) == {"value", "chance", "shuffled"}
    consumed = summary["data"]["consumed"]
    assert sum(consumed.values()) == 6 * 18 and consumed == {
        "image-text": 75,
        "video-text": 24,
        "audio-text": 9,
    }
    page = (straight / "report.html").read_text()
    for words in (
        "PerceiverIO",
        "Finding the video",
        "Finding the sound",
        "Captions and videos",
        "Captions and sounds",
    ):
        assert words in page


def test_two_processes_contrast_what_one_does(
    straight: Path, data: scenes_media.MediaPaths, tmp_path: Path
) -> None:
    """2 ranks x 3 micro-steps of 3 samples, against the run of one process: the same contrasts and captions. (What sounds and
    clips hide is drawn by each rank.)"""
    out = tmp_path / "two"
    more = arguments(data, out, "--steps", "3", "--accumulation", "3", "--itc-negatives", "global")
    more += ["--objectives.masked-share", "0.5"]  # of 3 samples in a micro-batch
    ranks = Launch(2, main, [*more, "--eval-every", "0"], RANKS_OUTPUT=str(tmp_path / "rank"))
    assert ranks.results() == [0, 0]
    assert "those of its kind in a step over all processes" in (tmp_path / "rank-0.txt").read_text()
    alone, found = (lines(run, "train")[0]["losses"] for run in (straight, out))
    for loss in ("itc", "vtc", "atc", "caption"):
        assert found[loss] == pytest.approx(alone[loss], rel=1e-4), loss
    assert json.loads((out / "summary.json").read_text())["world_size"] == 2


def test_loss_falls(straight: Path) -> None:
    losses = [line["loss"] for line in lines(straight, "train")]
    assert losses[-1] < losses[0]


def test_resume_is_exact(straight: Path, data: scenes_media.MediaPaths, tmp_path: Path) -> None:
    out = tmp_path / "halfway"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "checkpoints/step-000006")
    assert main(arguments(data, out, "--resume", "auto")) == 0
    one, other = (load_file(run / "checkpoints/step-000006/model.safetensors") for run in (straight, out))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert [line["losses"] for line in lines(straight, "train")] == [
        line["losses"] for line in lines(out, "train")
    ]
    assert lines(straight, "eval")[-1]["scores"] == lines(out, "eval")[-1]["scores"]


def test_a_checkpoint_loads_with_its_tied_embedding(straight: Path) -> None:
    loaded = load_model(straight)
    assert isinstance(loaded.config, PerceiverPretrainConfig)
    assert loaded.model.decoder.embedding.weight is loaded.model.text.embedding.weight
    saved = load_file(straight / "checkpoints/step-000006/model.safetensors")
    assert torch.equal(saved["text.embedding.weight"], loaded.model.text.embedding.weight)


def test_evaluate_scores_what_the_run_scored(
    straight: Path, data: scenes_media.MediaPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    asked = ["--checkpoint", str(straight), "--output", str(out)]
    assert evaluate(["retrieval", *asked]) == 0
    record = json.loads(out.read_text())
    summary = json.loads((straight / "summary.json").read_text())
    assert record["scores"]["retrieval"] == summary["evaluation"]["scores"]["retrieval"]
    assert set(record["data"]["shards"]) == set(PAIRS)
    assert "12 images with 60 captions, 12 videos with 60 captions" in capsys.readouterr().out
    assert record["data"]["views"] == summary["data"]["evaluation_views"] == 5

    sounds = [str(path) for path in data.heldout_sounds]
    assert evaluate(["perplexity", *asked, "--data", *sounds, "--unigram-from", *sounds]) == 0
    record = json.loads(out.read_text())
    assert list(record["data"]["shards"]) == ["audio-text"]
    words = record["scores"]["perplexity"]["perplexity_of_sounds"]
    assert set(words) == {"value", "shuffled", "unigram"} and 1 < words["value"] < 2048
    assert record["counts"]["masked_tokens_of_sounds"] >= 60  # a word or more of each caption


def test_the_views_of_a_picture_have_one_embedding(straight: Path, data: scenes_media.MediaPaths) -> None:
    """It is what load_pretrained makes of the same files."""
    loaded = load_model(straight)
    index = shards.index(shards.expand([str(path) for path in data.pictures.heldout]))
    pictures = [Image.open(io.BytesIO(index.image(i))) for i in range(len(index))]
    sets = evaluation_sets(loaded.config, {"image-text": data.pictures.heldout}, loaded.tokenizer, 7)
    for views in (1, 14):
        found = score_pairs(loaded.model, sets, loaded.tokenizer, views=views)
        expected = load_pretrained(straight).image_embedding(pictures, views=views)
        torch.testing.assert_close(found.material.image_embeddings, expected, rtol=1e-3, atol=2e-3)
    with pytest.raises(ValueError, match="2 views of a picture"):
        score_pairs(loaded.model, sets, loaded.tokenizer, views=2)


def test_evaluate_says_what_does_not_fit(
    straight: Path, data: scenes_media.MediaPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    several = [str(data.heldout_sounds[0]), str(data.heldout_clips[0])]
    asked = ["retrieval", "--checkpoint", str(straight)]
    for more, words in (
        (["--data", *several], "hold samples for video-text and audio-text; say which with --pairs"),
        (
            ["--data", str(data.heldout_sounds[0]), "--pairs", "image-text"],
            "none of its 12 samples has image and text",
        ),
        (["--split", "x"], "no shards of split 'x'"),
        (["--pairs", "audio-text", "--views", "5"], "--views 5 is for pictures; scored are audio-text"),
    ):
        assert evaluate([*asked, *more]) == 2
        assert words in capsys.readouterr().err


def test_generate_describes_pictures_sounds_and_videos(
    straight: Path, data: scenes_media.MediaPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for tar, suffix in (
        (data.pictures.heldout, "png"),
        (data.heldout_clips, "mp4"),
        (data.heldout_sounds, "wav"),
    ):
        with tarfile.open(tar[0]) as archive:
            name = next(one for one in archive.getnames() if one.endswith(suffix))
            files.append(tmp_path / f"file.{suffix}")
            member = archive.extractfile(name)
            assert member
            files[-1].write_bytes(member.read())
    files.insert(1, tmp_path / "broken.wav")
    files[1].write_bytes(b"RIFF and nothing else")
    assert generate(["--checkpoint", str(straight), "--json", *map(str, files)]) == 1
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["image"] for one in said] == [str(path) for path in files]
    assert [len(one.get("captions", [])) for one in said] == [1, 0, 1, 1]
    assert "can be read" in said[1]["error"]


def test_word_logits_are_those_of_training(straight: Path) -> None:
    """Nothing but text hidden, the losses' own masked-word loss comes from the same logits."""
    model = load_model(straight).model.eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=generator)
    hidden = torch.tensor([2, 9, 4, 11, 3, 2, 4, 8, 3])  # BOS 2, EOS 3, MASK 4
    targets = torch.tensor([-100, -100, 10, -100, -100, -100, 7, -100, -100])
    true = torch.where(targets >= 0, targets, hidden)
    offsets = torch.tensor([0, 5, 9], dtype=torch.int32)
    sample = torch.arange(2)
    pieces = {"image": Piece(images, sample, mask=torch.zeros(2, 2, 2, dtype=torch.bool))}
    objectives = PerceiverObjectives(
        itc=0.0, vtc=0.0, atc=0.0, caption=0.0, mim=0.0, mvm=0.0, mam=0.0, z_loss=0.0
    )
    loss = model(pieces | {"text": Piece(true, sample, offsets)}, 2, hidden, targets, objectives=objectives)
    logits = model.word_logits(pieces, Piece(hidden, sample, offsets), 2)
    expected = torch.nn.functional.cross_entropy(logits[[0, 1], [2, 1]], torch.tensor([10, 7]))
    torch.testing.assert_close(loss["mlm"], expected, atol=1e-5, rtol=1e-5)


def test_excluded_samples_are_left_out(data: scenes_media.MediaPaths, tmp_path: Path) -> None:
    with tarfile.open(data.sounds[0]) as archive:
        keys = sorted({Path(name).stem for name in archive.getnames()})
    (tmp_path / "leave.txt").write_text("\n".join(f"{data.sounds[0].stem}/{key}" for key in keys[:3]))
    config = cli.parse(arguments(data, tmp_path / "run", "--data.exclude", str(tmp_path / "leave.txt")))
    assert isinstance(config, PerceiverPretrainConfig)
    opened = open_pairs(config, find_pairs(config.data, 64, print), 0, 1)
    try:
        assert opened.loader.counters["audio-text"]["samples"] == 20 - 3
        assert opened.loader.counters["image-text"]["samples"] == 60
    finally:
        opened.loader.close()


def test_control_c_saves_and_says_how_to_go_on(
    straight: Path, data: scenes_media.MediaPaths, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "train.pretrain",
        *arguments(data, out, "--log-every", "1", "--steps", "100000"),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stdout
    for line in process.stdout:
        if line.startswith("step "):
            process.send_signal(signal.SIGINT)
            break
    said = process.stdout.read()
    assert process.wait(timeout=60) == 130
    assert re.search(r"go on with: \S*python -m train.pretrain perceiver-tiny", said)
    assert (out / "checkpoints/latest").is_file()


def test_a_checkpoint_of_another_family_is_refused(
    straight: Path, data: scenes_media.MediaPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [str(path) for path in data.pictures.train]
    asked = ["aurora-tiny", "--resume", str(straight), "--data.train", *pictures]
    assert main([*asked, "--data.tokenizer", str(data.pictures.tokenizer)]) == 2
    assert "the checkpoint is of PerceiverIO, this run trains Aurora" in capsys.readouterr().err


def test_xl_is_the_specified_recipe() -> None:
    xl = preset("perceiver-xl")
    assert isinstance(xl, PerceiverPretrainConfig)
    assert (xl.model.image_size, xl.data.interpolation, xl.model.audio_seconds) == (512, "bicubic", 10.0)
    optim = xl.optim
    assert (optim.lr, optim.final_lr, optim.warmup, optim.clip) == (1e-4, 1e-5, 10_000, 1.0)
    assert (xl.batch_size, xl.batch_size // 256, xl.activation_checkpointing) == (2048, 8, True)
    assert xl.steps * 2048 >= 3.6e9 > (xl.steps - 1) * 2048
    assert xl.data.mixture == "mm-align"


@pytest.mark.parametrize("size", ["tiny", "real", "small", "base", "large", "xl"])
def test_presets_resolve_and_say_what_they_lack(size: str) -> None:
    config = preset(f"perceiver-{size}")
    assert json.loads(json.dumps(to_dict(config)))["name"] == f"perceiver-{size}"
    found = problems(config)
    assert found == [] if size == "tiny" else "is for your own shards" in found[0]


def test_dry_run_of_a_preset(
    data: scenes_media.MediaPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(data, tmp_path / "run", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "image-text: 60 samples, 69.4% of each batch; 12 held out" in said
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused() -> None:
    assert problems(replace(preset("perceiver-tiny"), batch_size=64), world_size=2) == []
    few = replace(preset("perceiver-tiny"), batch_size=4, accumulation=2)
    assert (
        "micro-batches of 1: no sample would ever be read with hidden parts" in problems(few, world_size=2)[0]
    )


def test_mixture_is_mm_aligns() -> None:
    shards = {"image-text": ("a.tar",), "audio-text": ("b.tar",)}
    found = mixture("mm-align", shards)
    assert list(found) == list(shards)
    assert found["image-text"].weight / found["audio-text"].weight == pytest.approx(2.5 / 0.3)
    assert MIXTURES["mm-align"]["video-text"] == 800e6
    assert mixture("mm-align", shards, {"audio-text": 5.0})["audio-text"].weight == 5.0
    for wrong, words in ((("x", shards, None), "mixture"), (("equal", {"smell-text": ("a",)}, None), "pair")):
        with pytest.raises(ValueError, match=f"no .*{words}"):
            mixture(*wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        preset("perceiver")


def test_a_broken_heldout_sample_is_listed_and_left_out(
    data: scenes_media.MediaPaths, tmp_path: Path
) -> None:
    files = {
        f"{n}": {"wav": wav(300.0 + 50 * n), "json": captions(f"sound {n}", f"tone {n}")} for n in range(4)
    }
    files["2"]["wav"] = b"RIFF and nothing else"
    write_tar(tmp_path / "sounds.tar", files)
    source = SourceConfig(
        (str(tmp_path / "sounds.tar"),), modalities=PAIRS["audio-text"], needs=("audio", "text")
    )
    config = MixtureConfig({"audio-text": source}, batch_size=2, image=ImageConfig(64, cell=16))
    pairs = PairSet("audio-text", source, config, Tokenizer.load(data.tokenizer), batch_size=3)
    for _ in range(2):
        batches = list(pairs)
        assert [batch.captions for batch in batches] == [
            [["sound 0", "tone 0"], ["sound 1", "tone 1"]],
            [["sound 3", "tone 3"]],
        ]
        assert [len(batch.texts) for batch in batches] == [4, 2]
        assert [batch.sample_of_text.tolist() for batch in batches] == [[0, 0, 1, 1], [0, 0]]
    assert len(pairs) == 4
    assert [one.key for one in pairs.broken] == ["2"]
