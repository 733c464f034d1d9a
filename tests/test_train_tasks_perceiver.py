"""Captions and answers by PerceiverIO: fine-tuned, scored, asked from the shell and from Python, as Aurora's are."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models import load_pretrained
from models.answering import Chooser
from models.matching import Matcher
from models.objectives import ObjectiveConfig
from models.perceiver import PERCEIVER_SIZES, PerceiverIO, Piece, latents
from models.perceiver.queries import text
from models.tokens import IGNORE
from models.writing import Writer
from tests.micro import corpus
from train import finetune
from train.checkpoint import load_model
from train.evaluate import __main__ as evaluate
from train.generate import __main__ as generate
from train.generate.writing import one_line
from train.pretrain import main as pretrain
from train.tasks.config import TuneConfig
from train.tasks.tuning import prepare

SMALL = {
    "latents": 8, "latent-width": 32, "latent-layers": 1, "latent-head-dim": 16, "encoder-width": 32,
    "encoder-head-dim": 16, "image-size": 32, "image-patch": 16, "text-width": 32, "decoder-width": 32,
    "decoder-head-dim": 16, "decoder-layers": 1, "query-width": 32, "embedding-width": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step of a very small model on pictures with captions."""
    pytest.importorskip("av", reason="needs PyAV: pip install 'auroraio[data]'")
    pytest.importorskip("soundfile", reason="needs soundfile: pip install 'auroraio[data]'")
    out, paths = tmp_path_factory.mktemp("start") / "run", corpus()
    words = ["perceiver-tiny", "--out", str(out), "--data.tokenizer", str(paths.tokenizer)]
    words += [
        "--data.image-text.train",
        *map(str, paths.train),
        "--data.image-text.heldout",
        *map(str, paths.heldout),
    ]
    words += [word for name, value in SMALL.items() for word in (f"--model.{name}", str(value))]
    words += "--steps 1 --batch-size 8 --optim.warmup 0 --eval-every 0 --eval-images 2 --device cpu --precision fp32".split()
    assert pretrain(words) == 0
    return out


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("picture")
    with tarfile.open(corpus().heldout[0]) as tar:
        member = next(m for m in tar if m.name.endswith((".png", ".jpg", ".webp")))
        file = tar.extractfile(member)
        assert file is not None
        path = out / f"one{Path(member.name).suffix}"
        path.write_bytes(file.read())
    return path


def command(task: str, start: Path, out: Path, *more: str) -> list[str]:
    data = ("--data.train", *map(str, corpus().train), "--data.workers", "1")
    run = ("--device", "cpu", "--precision", "fp32", "--optim.warmup", "0", "--eval-every", "0")
    return [
        task,
        "--checkpoint",
        str(start),
        *data,
        *run,
        "--batch-size",
        "8",
        "--steps",
        "3",
        "--out",
        str(out),
        *more,
    ]


def replace_objectives(run: Path, copy: Path) -> Path:
    """The run's checkpoint as one that was trained without captions."""
    shutil.copytree(run / "checkpoints/step-000001", copy)
    config = json.loads((copy / "config.json").read_text())
    config["objectives"]["caption"] = 0.0
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def scores_of(task: str, run: Path, folder: Path, *more: str) -> dict[str, Any]:
    """What train.evaluate writes of the run's held-out pictures."""
    output = folder / f"{task}.json"
    data = ["--data", *map(str, corpus().heldout)]
    assert evaluate.main([task, "--checkpoint", str(run), *data, "--output", str(output), *more]) == 0
    record: dict[str, Any] = json.loads(output.read_text())
    return record


def said(capsys: pytest.CaptureFixture[str], picture: Path, *words: str) -> str:
    capsys.readouterr()
    assert generate.main([*words, str(picture)]) == 0
    return capsys.readouterr().out.strip().removeprefix(f"{picture}:").strip()


def test_captions(started: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "captions"
    assert finetune.main(command("captioning", started, out)) == 0
    losses = [json.loads(line)["losses"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(set(one) == {"text"} for one in losses) and losses[-1]["text"] < losses[0]["text"]
    assert json.loads((out / "summary.json").read_text())["model"]["family"] == "PerceiverIO"
    heldout = [*map(str, corpus().heldout)]
    scored = tmp_path / "captioning.json"
    assert (
        evaluate.main(["captioning", "--checkpoint", str(out), "--data", *heldout, "--output", str(scored)])
        == 0
    )
    record = json.loads(scored.read_text())
    assert record["counts"]["images"] == 12 and record["scores"]["CIDEr"]["value"] >= 0
    caption = said(capsys, picture, "--checkpoint", str(out), "--method", "beam", "--beams", "3")
    assert caption == one_line(load_pretrained(out).caption(picture, beams=3))
    critical = tmp_path / "critical"
    assert finetune.main(command("captioning", out, critical, "--objectives.self-critical", "2")) == 0
    losses = [json.loads(line)["losses"] for line in (critical / "metrics.jsonl").read_text().splitlines()]
    assert all(set(one) == {"cider"} for one in losses)


def test_answers(started: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, question = tmp_path / "answers", "what color is the circle?"
    assert finetune.main(command("vqa", started, out)) == 0
    heldout, scored = [*map(str, corpus().heldout)], tmp_path / "vqa.json"
    assert evaluate.main(["vqa", "--checkpoint", str(out), "--data", *heldout, "--output", str(scored)]) == 0
    assert 0 <= json.loads(scored.read_text())["scores"]["accuracy"]["value"] <= 1
    answer = said(capsys, picture, "--checkpoint", str(out), "--question", question)
    assert answer == one_line(load_pretrained(out).answer(picture, question))


def test_answers_are_chosen(started: Path, picture: Path, tmp_path: Path) -> None:
    out, question = tmp_path / "chosen", "what color is the circle?"
    assert finetune.main(command("vqa", started, out, "--task.head", "chosen", "--optim.lr", "3e-3")) == 0
    losses = [json.loads(line)["losses"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(set(one) == {"answer"} for one in losses) and losses[-1]["answer"] < losses[0]["answer"]
    record = scores_of("vqa", out, tmp_path)
    assert 0 <= record["scores"]["accuracy"]["value"] <= 1 and record["head"] == "chosen"
    loaded = load_pretrained(out)
    assert isinstance(loaded.model, Chooser) and isinstance(loaded.base, PerceiverIO)
    assert loaded.answer(picture, question) in loaded.task["classes"]


def test_retrieval_is_learned_and_ranked_anew(started: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "retrieval"
    assert finetune.main(command("retrieval", started, out)) == 0
    losses = [json.loads(line)["losses"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(set(one) == {"itc", "match"} for one in losses)
    record = scores_of("retrieval", out, tmp_path)
    assert record["counts"]["pictures"] == 12 and record["reranked"] == 16
    first = record["scores"]["text_to_image/R@10"]
    assert first["chance"] == pytest.approx(10 / 12) and 0 <= first["embeddings alone"] <= 1
    loaded = load_pretrained(out)
    assert isinstance(loaded.model, Matcher) and isinstance(loaded.base, PerceiverIO)
    assert sum(loaded.classify(picture, ["circle", "star"]).values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="has not learned to write captions"):
        loaded.caption(picture)


def test_classes_by_prompts_alone(started: Path, tmp_path: Path) -> None:
    """The embeddings that are compared are the pre-trained model's own."""
    record = scores_of("classify", started, tmp_path, "--classes", "circle", "star", "--templates", "a {}")
    assert record["scores"]["top-1"]["chance"] >= 0.5 and record["counts"]["classes"] == 2
    loaded = load_pretrained(started)
    tokens = loaded.tokens(["a circle", "two small red stars"])
    pieces = [row[row != 0] for row in tokens]
    offsets = torch.tensor([0, *torch.tensor([len(piece) for piece in pieces]).cumsum(0)], dtype=torch.int32)
    texts = Piece(torch.cat(pieces), torch.arange(2), offsets)
    torch.testing.assert_close(loaded.base.text_embedding(tokens), loaded.base.text_embedding(texts))
    images = torch.randn(2, 3, 32, 32)
    latents = loaded.base.encode({"image": Piece(images, torch.arange(2))}, 2)
    embeddings, memory = loaded.base.features(images)
    torch.testing.assert_close(embeddings, loaded.base.embedding(latents, "image"))
    torch.testing.assert_close(memory, latents)


def test_the_whole_text_is_read_and_nothing_behind_it(started: Path) -> None:
    torch.manual_seed(0)
    base = load_model(started).model.eval()
    latents, tokens = torch.randn(1, 8, 32), torch.randint(5, 60, (1, 6))
    other = tokens.clone()
    other[0, 5] += 1
    first = base.whole_text(tokens, latents)
    assert not torch.allclose(first[:, :5], base.whole_text(other, latents)[:, :5])
    torch.testing.assert_close(first, base.whole_text(F.pad(tokens, (0, 3)), latents)[:, :6])


def test_pictures_may_be_of_another_size(started: Path, tmp_path: Path) -> None:
    """The positions are what the pre-trained model itself gives to a picture of that size."""
    out = tmp_path / "larger"
    larger = ("--model.image-size", "64", "--steps", "1", "--optim.lr", "1e-6")  # so small that nothing moves
    assert finetune.main(command("captioning", started, out, *larger)) == 0
    before, after = load_model(started).model, load_model(out).model.base
    learned = after.adapters["image"].positions.flatten(0, 1)
    torch.testing.assert_close(learned, before.adapters["image"].place((4, 4)), atol=1e-4, rtol=1e-4)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        after.eval().image_memory(images), before.eval().image_memory(images), atol=1e-3, rtol=1e-3
    )


def test_activations_are_recomputed_where_that_is_asked_for(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for module in (text, latents):
        real = module.checkpoint

        def counted(
            *args: object, real: Callable[..., object] = real, name: str = module.__name__, **more: object
        ) -> object:
            calls.append(name)
            return real(*args, **more)

        monkeypatch.setattr(module, "checkpoint", counted)
    assert finetune.main(command("captioning", started, tmp_path / "kept")) == 0 and not calls
    assert (
        finetune.main(command("captioning", started, tmp_path / "again", "--activation-checkpointing")) == 0
    )
    assert {name.rpartition(".")[2] for name in calls} == {"text", "latents"}


def test_a_weight_that_two_parts_share_is_frozen_with_both(started: Path) -> None:
    for part in ("decoder", "decoder.embedding", "text"):
        model = prepare(Writer(load_model(started).model), TuneConfig(freeze=(part,)))
        assert not model.base.decoder.embedding.weight.requires_grad, part
        assert model.base.latent.latents.requires_grad


def test_what_is_aurora_s_alone_is_refused(
    started: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune.main(command("detection", started, tmp_path / "a")) == 2
    assert "detection is for Aurora; the checkpoint is PerceiverIO's" in capsys.readouterr().err
    assert finetune.main(command("captioning", started, tmp_path / "b", "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed[: printed.index("\n}") + 2])["task"]["kind"] == "captioning"
    assert "data        80 items of 80 samples" in printed and not (tmp_path / "b").exists()
    for wrong, words in (
        (("captioning", "--tune.freeze", "encoder"), "the model has no such part"),
        (("captioning", "--resume", "nowhere"), "--resume nowhere: no such directory"),
        (
            ("retrieval", "--accumulation", "8"),
            "retrieval contrasts the pictures of a micro-batch, which has one",
        ),
    ):
        assert finetune.main(command(wrong[0], started, tmp_path / "b", *wrong[1:], "--dry-run")) == 2
        assert words in capsys.readouterr().err
    assert finetune.main(command("segmentation", started, tmp_path / "b", "--dry-run")) == 2
    assert "segmentation is for Aurora" in capsys.readouterr().err
    silent = replace_objectives(started, tmp_path / "silent")
    with pytest.raises(ValueError, match="has not learned to write captions"):
        load_pretrained(silent).caption("none.jpg")


def test_a_pretrained_model_is_scored_as_it_is(started: Path, tmp_path: Path) -> None:
    """On the pictures that its run held out, unless others are named."""
    heldout = [*map(str, corpus().heldout)]
    for name, more in (("named", ["--data", *heldout]), ("own", [])):
        scored = tmp_path / f"{name}.json"
        words = ["captioning", "--checkpoint", str(started), *more, "--output", str(scored)]
        assert evaluate.main(words) == 0
        record = json.loads(scored.read_text())
        assert record["counts"]["images"] == 12 and record["data"]["shards"] == heldout


def test_the_loss_is_that_of_the_words_by_hand(started: Path) -> None:
    """Of two captions of each picture, next-token cross-entropies (and z-losses) over the words asked for."""
    torch.manual_seed(0)
    base = load_model(started).model.eval()
    assert isinstance(base, PerceiverIO)
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(5, 60, (4, 9))
    targets = tokens.clone()
    targets[:, :2] = IGNORE
    targets[1, 6:] = IGNORE
    (loss,) = Writer(base)(images, tokens, targets).values()
    total, count = torch.zeros(()), 0
    for row in range(4):
        latents = base.image_memory(images[row // 2 : row // 2 + 1])
        logits = base.decoder.logits(base.decoder(tokens[row : row + 1, :-1], latents, causal=True))[0]
        wanted = targets[row, 1:]
        total = total + F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum")
        total = total + ObjectiveConfig().z_loss * logits.logsumexp(1)[wanted != IGNORE].square().sum()
        count += int((wanted != IGNORE).sum())
    torch.testing.assert_close(loss, total / count)


def test_the_largest_has_what_writing_asks_for() -> None:
    with torch.device("meta"):
        writer = Writer(PerceiverIO(PERCEIVER_SIZES["xl"]))
    assert sum(p.numel() for p in writer.parameters()) == sum(p.numel() for p in writer.base.parameters())
