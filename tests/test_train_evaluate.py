from __future__ import annotations

import dataclasses
import json
import shutil
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import micro
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dataload import shards
from dataload.batch import EvalBatch
from dataload.pipeline import EvalSet
from dataload.tokenizer import Tokenizer, train_tokenizer
from models import Aurora, load_pretrained
from models.objectives import ObjectiveConfig
from train import checkpoint
from train.checkpoint import Snapshot
from train.config import DataConfig, PretrainConfig
from train.engine import Ranks, TorchEngine, rng_state
from train.evaluate import measure
from train.evaluate.__main__ import evaluate_model, main, unigram_counts
from train.machine import Precision
from train.pretrain import main as pretrain

# A world of known answers: picture i is gray of level 10 * i, and its captions hold the word i.
NAMES = "zero one two three four five six seven eight nine ten eleven twelve".split()


def captions_of(i: int) -> list[str]:
    return [f"gray {NAMES[i]} picture", f"the picture called {NAMES[i]}"]


def write_shard(path: Path, count: int, broken: tuple[int, ...] = (), captions: bool = True) -> Path:
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            buffer = BytesIO()
            Image.new("RGB", (32, 32), (10 * i,) * 3).save(buffer, "PNG")
            files = {"png": buffer.getvalue()[: 40 if i in broken else None]}
            if captions:
                files["json"] = json.dumps({"captions": captions_of(i)}).encode()
            for extension, data in files.items():
                entry = tarfile.TarInfo(f"{i:03d}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, BytesIO(data))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer([t for i in range(13) for t in captions_of(i)] * 20, path, 320, model_type="bpe")


class Knowing(nn.Module):
    """A model that reads the gray level and the word, exactly: the interface of Aurora with known answers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = SimpleNamespace(text_length=12)
        self.tokenizer = tokenizer
        self.seen: list[int] = []  # pictures per encode_image call
        self.asked: list[int] = []  # which caption of its picture (0, 1) each masked row was

    def encode_image(self, images: Tensor) -> list[Tensor]:
        assert not self.training and not torch.is_grad_enabled()
        self.seen.append(len(images))
        level = (images[:, 0].mean((1, 2)) * 0.229 + 0.485) * 255 / 10
        return [nn.functional.one_hot(level.round().long(), 13).float()]

    def image_embedding(self, maps: list[Tensor]) -> Tensor:
        return maps[0]

    def memory(self, maps: list[Tensor]) -> Tensor:
        return maps[0][:, None]  # [B, 1, 13]

    def number(self, tokens: Tensor) -> int:
        words = self.tokenizer.decode(tokens.tolist()).split()
        return next((NAMES.index(word) for word in words if word in NAMES), 0)

    def text_embedding(self, tokens: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.tensor([self.number(row) for row in tokens]), 13).float()

    def mlm_logits(self, memory: Tensor, tokens: Tensor) -> Tensor:
        """Certain of every token of the two captions of the picture in memory; wavers between those two."""
        logits = torch.zeros(*tokens.shape, self.tokenizer.vocab_size)
        length = tokens.shape[1]
        for row, picture in enumerate(memory[:, 0].argmax(1).tolist()):
            visible = tokens[row] != 4
            fits = [
                [
                    torch.equal(truth[visible], tokens[row][visible])
                    for truth in self.tokenizer.encode_batch(texts, length)
                ]
                for texts in map(captions_of, range(13))
            ]
            self.asked.append(int(any(second for _, second in fits)))
            for fit, truth in zip(
                fits[picture], self.tokenizer.encode_batch(captions_of(picture), length), strict=True
            ):
                if fit:
                    logits[row, torch.arange(length), truth] = 30.0
        return logits

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        assert mask.shape == (len(images), 1, 1) and mask.all()  # one 32-pixel unit: hidden
        return images + 0.5


def held_out(
    tmp_path: Path, tokenizer: Tokenizer, count: int = 13, batch_size: int = 6, **options: Any
) -> EvalSet:
    shard = write_shard(tmp_path / "val-000000.tar", count, **options)
    return EvalSet([str(shard)], tokenizer, 32, 12, batch_size=batch_size)


def test_known_answers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """13 pictures in batches of 6, 6 and 1: perfect scores, and none with the pictures shuffled."""
    eval_set = held_out(tmp_path, tokenizer)
    model = Knowing(tokenizer).train()
    counts = unigram_counts([tmp_path / "val-000000.tar"], tokenizer)
    before = torch.get_rng_state()
    result = evaluate_model(model, eval_set, tokenizer, unigram=counts, reconstruct=8, keep_images=True)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert model.seen == [6, 6, 1]  # encoded once each
    counted = {"images": 13, "captions": 26, "masked_tokens": 3 * 13, "reconstructed": 8}
    assert result.counts.keys() == counted.keys() and result.counts["masked_tokens"] >= 26
    assert counted | {"masked_tokens": result.counts["masked_tokens"]} == result.counts
    retrieval = result.scores["retrieval"]
    assert retrieval["text_to_image/R@1"].value == 1 and retrieval["image_to_text/R@1"].value == 1
    assert retrieval["text_to_image/R@1"].baselines == {"chance": pytest.approx(1 / 13), "shuffled": 0}
    assert retrieval["image_to_text/R@1"].baselines["chance"] == pytest.approx(1 / 13)
    perplexity = result.scores["perplexity"]["perplexity"]
    assert perplexity.value < 1.01
    assert perplexity.baselines["shuffled"] > 20
    assert 10 < perplexity.baselines["unigram"] < tokenizer.vocab_size
    assert result.scores["mim"]["error"].value == pytest.approx(0.5, abs=1e-5)
    material = result.material
    assert material.keys[0] == "val-000000/000" and material.captions[12] == captions_of(12)
    assert material.thumbnails is not None and material.thumbnails[7].float().mean() == 70
    assert (material.restored[0] > material.thumbnails[0]).all()
    scalars = result.scalars()
    assert (
        scalars["text_to_image/R@10"] == 1
        and scalars["perplexity/unigram"] == perplexity.baselines["unigram"]
    )
    assert json.loads(json.dumps(result.to_json()))["scores"]["retrieval"]["text_to_image/R@1"]["value"] == 1
    assert any("R@1" in line and "100.0%" in line and "chance 7.7%" in line for line in result.lines())


def test_unigram_counts_are_the_captions_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shard = write_shard(tmp_path / "train-000000.tar", 5)
    counts = unigram_counts([shard], tokenizer)
    expected = [token for i in range(5) for text in captions_of(i) for token in tokenizer.encode(text)]
    assert counts.sum() == len(expected) and len(counts) == tokenizer.vocab_size
    assert all(counts[token] == expected.count(token) for token in set(expected))
    half = unigram_counts([shard], tokenizer, most=3)  # pictures 0, 2, 4
    assert half.sum() == len(
        [t for i in (0, 2, 4) for text in captions_of(i) for t in tokenizer.encode(text)]
    )


def test_parts_of_a_set(tmp_path: Path, tokenizer: Tokenizer) -> None:
    eval_set = held_out(tmp_path, tokenizer)
    model = Knowing(tokenizer)

    def run(**options: Any) -> Any:
        return evaluate_model(model, eval_set, tokenizer, **options)  # type: ignore[arg-type]

    few = run(max_images=8)
    assert few.counts["images"] == 8 and few.counts["captions"] == 16 and model.seen == [6, 2]
    assert few.scores["retrieval"]["text_to_image/R@1"].baselines["chance"] == 1 / 8
    first = run(captions="first")
    assert first.counts["captions"] == 13
    assert first.material.captions == [captions_of(i)[:1] for i in range(13)]
    assert first.material.image_of_text.tolist() == list(range(13))
    assert first.scores["retrieval"]["text_to_image/R@1"].value == 1
    model.asked.clear()
    asked = run(asked=1)
    assert model.asked == [0, 1] * 12 + [0, 0]  # one of two captions, in turns; the same again, shuffled
    assert asked.counts["captions"] == 26 and asked.counts["masked_tokens"] < run().counts["masked_tokens"]
    assert asked.scores["perplexity"]["perplexity"].value < 1.01  # captions stay with their pictures
    assert run(tasks=("retrieval",)).scores.keys() == {"retrieval"}
    assert run(seed=1).scores["perplexity"] != run().scores["perplexity"]
    assert run(seed=1).to_json() == run(seed=1).to_json()


def test_broken_pictures_are_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    eval_set = held_out(tmp_path, tokenizer, broken=(0, 3))
    result = evaluate_model(Knowing(tokenizer), eval_set, tokenizer)  # type: ignore[arg-type]
    assert result.counts["images"] == 11 and len(eval_set.broken) == 2
    assert result.scores["retrieval"]["text_to_image/R@1"].value == 1


def test_refusals_come_before_any_compute(tmp_path: Path, tokenizer: Tokenizer) -> None:
    eval_set = held_out(tmp_path, tokenizer)
    for options, message in (
        ({"tasks": ("vqa",)}, "unknown tasks.*vqa.*supported: retrieval, perplexity"),
        ({"max_images": 1}, "at least 2 pictures.*got 1"),
        ({"scenes": True}, "generate must be 2 or more; got 0"),
        ({"captions": "some"}, "'all' or 'first'; got 'some'"),
        ({"views": 3}, "3 views of a picture; supported: 1, 5, 14"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_model(None, eval_set, tokenizer, **options)  # type: ignore[arg-type]


def test_a_real_model_on_the_built_in_corpus() -> None:
    """Untrained Aurora with everything asked for: scores are finite and repeatable, and hold in bf16."""
    paths = micro.corpus()
    tokenizer = Tokenizer.load(paths.tokenizer)
    torch.manual_seed(0)
    model = Aurora(micro.MODEL)
    eval_set = EvalSet([str(p) for p in paths.heldout], tokenizer, 32, 12, batch_size=5)

    def run(**options: Any) -> Any:
        return evaluate_model(model, eval_set, tokenizer, generate=7, scenes=True, reconstruct=7, **options)

    result = run(keep_images=True)
    assert set(result.scores) == {"retrieval", "perplexity", "scenes", "mim"}
    assert len(result.material.generated) == 7 and len(result.material.masks) == 7
    assert torch.allclose(result.material.image_embeddings.norm(dim=1), torch.ones(12), atol=1e-4)
    values = result.scalars()
    assert all(0 <= value < float("inf") for value in values.values())
    assert run().scalars() == values
    assert run(autocast=torch.bfloat16).scalars()["mim/error"] == pytest.approx(values["mim/error"], rel=0.1)


# The command


def saved(run: Path, objectives: ObjectiveConfig) -> Path:
    """A run directory with one checkpoint of an untrained model."""
    paths = micro.corpus()
    data = DataConfig(tuple(map(str, paths.train)), tuple(map(str, paths.heldout)), str(paths.tokenizer))
    model = dataclasses.replace(micro.MODEL, decoder_dropout=0.0)
    config = PretrainConfig(model=model, data=data, objectives=objectives)
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    engine = TorchEngine(Aurora(config.model), config, cpu, Precision("fp32", ""), Ranks(0, 0, 1))
    rng = {f"{name}.0": state for name, state in rng_state(cpu).items()}
    snapshot = Snapshot(7, engine.state(), rng, {}, "fp32", 1, 1.0, 0)
    checkpoint.save(run / "checkpoints", snapshot, config, paths.tokenizer, 3)
    return run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("runs") / "mine", PretrainConfig().objectives)


def evaluate(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_perplexity_of_a_model_that_never_learned_words_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved(tmp_path / "photos", ObjectiveConfig(mlm=0.0))
    code, out, err = evaluate("perplexity", "--checkpoint", run, capsys=capsys)
    assert code == 2 and out == "" and "objectives.mlm is 0" in err
    assert not list(run.rglob("perplexity.json"))
    code, out, _ = evaluate("retrieval", "--checkpoint", run, "--max-images", 8, capsys=capsys)
    assert code == 0 and "R@1" in out


def test_the_command_as_typed(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "scores.json"
    done = micro.command(
        "-m", "train.evaluate", "perplexity", "--checkpoint", str(run_dir), "--output", str(out)
    )
    assert done.returncode == 0, done.stderr
    assert "step 7" in done.stdout and "unigram" in done.stdout and str(out) in done.stdout
    record = json.loads(out.read_text())
    paths = micro.corpus()
    assert record["task"] == "perplexity" and record["checkpoint"]["step"] == 7
    assert record["counts"]["images"] == 12 and record["counts"]["captions"] == 60
    assert record["tokenizer"]["sha256"] == Tokenizer.load(paths.tokenizer).sha
    assert record["data"]["shards"] == [str(p) for p in paths.heldout]
    assert record["unigram_from"] == [str(p) for p in paths.train]
    assert record["command"].startswith("python -m train.evaluate perplexity --checkpoint")
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["scores"]["perplexity"]["perplexity"]) == {"value", "shuffled", "unigram"}


def test_retrieval_with_options(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--split picks shards of a folder; the default output lies in the checkpoint."""
    write_shard(tmp_path / "train-000000.tar", 4)
    write_shard(tmp_path / "val-000000.tar", 5)
    write_shard(tmp_path / "val-000001.tar", 3, broken=(1,))
    options = ("retrieval", "--checkpoint", run_dir / "checkpoints" / "step-000007", "--data", tmp_path)
    code, out, err = evaluate(*options, "--split", "val", "--captions", "first", capsys=capsys)
    assert code == 0 and "001" in err and "left out" in err
    record = json.loads((run_dir / "checkpoints" / "step-000007" / "retrieval.json").read_text())
    assert record["counts"] == {"images": 7, "captions": 7} and record["data"]["split"] == "val"
    assert record["data"]["broken_left_out"] == 1
    assert record["scores"]["retrieval"]["text_to_image/R@5"]["chance"] == pytest.approx(5 / 7)
    code, out, err = evaluate(*options, capsys=capsys)
    assert code == 2 and "several splits (train, val); choose one with --split" in err
    code, out, err = evaluate(*options, "--split", "test", capsys=capsys)
    assert code == 2 and "no shards of split 'test'; there are: train, val" in err


def test_the_views_of_a_picture_have_one_embedding(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what load_pretrained makes of the same files; scores of other views stand beside the first."""
    folder, model = tmp_path / "checkpoint", load_pretrained(run_dir)
    shutil.copytree(
        run_dir / "checkpoints" / "step-000007", folder, ignore=shutil.ignore_patterns("retrieval*")
    )
    found: dict[str, Tensor] = {}
    real = measure.retrieval
    monkeypatch.setattr(
        measure,
        "retrieval",
        lambda m, seed: found.update(zip(m.keys, m.image_embeddings, strict=True)) or real(m, seed),
    )
    index = shards.index(shards.expand([str(path) for path in micro.corpus().heldout]))
    pictures = {index.key(i): Image.open(BytesIO(index.image(i))) for i in range(len(index))}
    for views in (1, 14, 5):
        code, _, err = evaluate("retrieval", "--checkpoint", folder, "--views", views, capsys=capsys)
        assert code == 0, err
        expected = model.image_embedding([pictures[key] for key in found], views=views)
        torch.testing.assert_close(torch.stack(list(found.values())), expected, rtol=1e-3, atol=1e-4)
    records = [json.loads(path.read_text())["data"]["views"] for path in sorted(folder.glob("retrieval*"))]
    assert sorted(records) == [1, 5, 14]
    code, _, err = evaluate("retrieval", "--checkpoint", folder, capsys=capsys)
    assert code == 0 and len(list(folder.glob("retrieval*"))) == 3  # the run's own: 1, measured again


def test_the_last_evaluation_alone_takes_all_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    real = EvalSet.batches

    def batches(self: EvalSet, views: int = 1) -> Iterator[EvalBatch]:
        passes.append(views)
        return real(self, views)

    monkeypatch.setattr(EvalSet, "batches", batches)
    more = ["--steps", "3", "--eval-every", "1", "--eval-views", "5"]
    assert pretrain(micro.arguments(tmp_path / "run", *more)) == 0
    assert passes == [1, 1, 5]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["views"] for line in lines if line["kind"] == "eval"] == passes
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"]["evaluation_views"] == 5
    assert "the embeddings of 5 views of each picture" in (tmp_path / "run" / "report.html").read_text()


def test_scores_of_other_data_stand_beside_the_first(run_dir: Path, tmp_path: Path) -> None:
    """Nothing that was measured is written over by what was measured on other pictures."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(
        run_dir / "checkpoints" / "step-000007", folder, ignore=shutil.ignore_patterns("retrieval*")
    )
    first, twin = micro.corpus().heldout[0], write_shard(tmp_path / "twin-000000.tar", 5)
    for data in (first, twin, first, twin):
        assert main(["retrieval", "--checkpoint", str(folder), "--device", "cpu", "--data", str(data)]) == 0
    few = ["--data", str(first), "--max-images", "4"]
    assert main(["retrieval", "--checkpoint", str(folder), "--device", "cpu", *few]) == 0
    found = {
        path.name: json.loads(path.read_text())["data"]["shards"] for path in folder.glob("retrieval*.json")
    }
    assert found == {
        "retrieval.json": [str(first)],
        "retrieval-2.json": [str(twin)],
        "retrieval-3.json": [str(first)],
    }


def test_errors_are_one_sentence(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = write_shard(tmp_path / "bare-000000.tar", 3, captions=False)
    good = ("retrieval", "--checkpoint", run_dir)
    for words, message in (
        (("retrieval", "--checkpoint", tmp_path / "nowhere"), "nowhere does not exist"),
        (("retrieval", "--checkpoint", tmp_path), "has no finished checkpoint"),
        ((*good, "--data", tmp_path / "none-*.tar"), "none-*.tar"),
        ((*good, "--data", bare), "has a caption"),
        ((*good, "--max-images", "0"), "--max-images must be at least 1; got 0"),
        ((*good, "--output", tmp_path), "is a directory"),
        ((*good, "--output", bare / "scores.json"), "bare-000000.tar is a file, not a folder"),
        ((*good, "--output", tmp_path / "a/b/c.json", "--data", bare), "has a caption"),
        ((*good, "--device", "tpu"), "tpu"),
    ):
        code, out, err = evaluate(*words, capsys=capsys)
        assert code == 2 and out == "", (words, out)
        assert err.startswith("error: ") and message in err and err.count("\n") == 1, err
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []  # nothing was begun


def test_another_tokenizer_is_refused(
    run_dir: Path, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer.model that was swapped would give every word another meaning."""
    copy = tmp_path / "step-000007"
    copy.mkdir()
    for file in (run_dir / "checkpoints" / "step-000007").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tokenizer.save(copy / "tokenizer.model")
    code, _, err = evaluate("perplexity", "--checkpoint", copy, capsys=capsys)
    assert code == 2 and "tokenizer.model" in err


def test_training_shards_that_are_gone_cost_the_baseline_only(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_shard(tmp_path / "val-000000.tar", 4)
    loaded = checkpoint.load_model(run_dir)
    gone = dataclasses.replace(loaded.config.data, train=("gone/train-000000.tar",))
    moved = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, data=gone))
    monkeypatch.setattr("train.evaluate.__main__.load_model", lambda path: moved)
    options = ("perplexity", "--checkpoint", run_dir, "--data", shard, "--output", tmp_path / "out.json")
    code, out, err = evaluate(*options, capsys=capsys)
    assert code == 0 and "no word-frequency baseline" in err and "--unigram-from" in err
    assert "unigram" not in out and json.loads((tmp_path / "out.json").read_text())["unigram_from"] == []
    code, out, _ = evaluate(*options, "--unigram-from", shard, capsys=capsys)
    assert code == 0 and "unigram" in out
