from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import micro
import numpy as np
import pytest
import torch
from PIL import Image

from dataload.images import normalize
from models import Aurora
from models.generation import generate
from models.objectives import ObjectiveConfig
from train import checkpoint
from train.checkpoint import LoadedModel, Snapshot, load_model
from train.config import PretrainConfig
from train.engine import Ranks, TorchEngine, rng_state
from train.generate.__main__ import main
from train.generate.writing import KnownPieces, one_line
from train.machine import Precision


def saved(run: Path, objectives: ObjectiveConfig) -> Path:
    config = PretrainConfig(
        model=dataclasses.replace(micro.MODEL, decoder_dropout=0.0), objectives=objectives
    )
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    model = Aurora(config.model)
    # untrained captions of all pictures are alike; larger weights tell them apart
    for parameter in model.parameters():
        parameter.data.mul_(2)
    engine = TorchEngine(model, config, cpu, Precision("fp32", ""), Ranks(0, 0, 1))
    rng = {f"{name}.0": state for name, state in rng_state(cpu).items()}
    snapshot = Snapshot(7, engine.state(), rng, {}, "fp32", 1, 1.0, 0)
    checkpoint.save(run / "checkpoints", snapshot, config, micro.corpus().tokenizer, 3)
    return run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("runs") / "mine", PretrainConfig().objectives)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three pictures: of the model's own size (a crop would change it), wide, and gray."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths = [folder / name for name in ("a.png", "b c.jpg", "d.png")]
    for path, shape in zip(paths, ((32, 32, 3), (40, 90, 3), (50, 50)), strict=True):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return paths


def run(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str], str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def direct(loaded: LoadedModel, path: Path) -> str:
    """The caption of a picture that has the model's size, by the model alone."""
    pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy())[None]
    with torch.no_grad():
        memory = loaded.model.memory(loaded.model.encode_image(normalize(pixels)))
    return loaded.tokenizer.decode(generate(cut(loaded), memory, max_length=12)[0])


def cut(loaded: LoadedModel) -> Any:
    """The model without the rows of its vocabulary that the tokenizer has no pieces for."""
    model, pieces = loaded.model, loaded.tokenizer.vocab_size
    return SimpleNamespace(
        start=model.start, step=lambda tokens, state: model.step(tokens, state)[:, :pieces]
    )


def test_captions_by_path_in_order(
    run_dir: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines, err = run("--checkpoint", run_dir, *pictures, capsys=capsys)
    assert code == 0 and err == ""
    assert [line.split(": ")[0] for line in lines] == [str(path) for path in pictures]
    caption = direct(load_model(run_dir), pictures[0])
    assert caption and lines[0] == f"{pictures[0]}: {one_line(caption)}"
    assert len({line.split(": ")[1] for line in lines}) > 1  # the pictures are looked at
    one_by_one = [run("--checkpoint", run_dir, path, capsys=capsys)[1] for path in pictures]
    assert [line for one in one_by_one for line in one] == lines


def test_broken_pictures_are_named_and_the_others_done(
    run_dir: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut, text, missing = tmp_path / "cut.jpg", tmp_path / "text.jpg", tmp_path / "missing.jpg"
    cut.write_bytes(pictures[1].read_bytes()[:300])
    text.write_text("no picture")
    code, lines, err = run(
        "--checkpoint", run_dir, cut, pictures[0], text, missing, tmp_path, pictures[2], capsys=capsys
    )
    assert code == 1
    assert [line.split(": ")[0] for line in lines] == [str(pictures[0]), str(pictures[2])]
    assert [line.split(": ")[0] for line in err.splitlines()] == [
        str(p) for p in (cut, text, missing, tmp_path)
    ]
    assert "not a picture that can be read" in err and "No such file" in err and "directory" in err
    code, lines, err = run("--checkpoint", run_dir, missing, capsys=capsys)
    assert code == 1 and lines == [] and "missing.jpg" in err


def test_json_lines(
    run_dir: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.jpg"
    code, lines, _ = run("--checkpoint", run_dir, "--json", pictures[1], missing, capsys=capsys)
    caption, error = map(json.loads, lines)
    assert code == 1
    assert caption["image"] == str(pictures[1]) and len(caption["captions"]) == 1
    assert error["image"] == str(missing) and "No such file" in error["error"]


def test_methods(run_dir: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    def lines(*options: object) -> list[str]:
        code, out, err = run("--checkpoint", run_dir, pictures[0], *options, capsys=capsys)
        assert code == 0, err
        return out

    sampled = lines("--method", "sample", "--num", 5, "--seed", 3)
    assert len(sampled) == 5 and len(set(sampled)) > 1
    assert sampled == lines("--method", "sample", "--num", 5, "--seed", 3)
    assert sampled != lines("--method", "sample", "--num", 5, "--seed", 4)
    greedy = lines()
    assert lines("--method", "sample", "--top-k", 1) == greedy  # the likeliest token alone
    assert lines("--method", "sample", "--top-p", 1e-6, "--num", 2) == greedy * 2
    assert lines("--method", "beam", "--beams", 1) == greedy
    assert len(lines("--method", "beam", "--beams", 3)) == 1
    tokenizer = load_model(run_dir).tokenizer
    short = lines("--max-length", 4)[0].removeprefix(f"{pictures[0]}: ")
    assert greedy[0].startswith(f"{pictures[0]}: {short}") and 0 < len(tokenizer.encode(short)) <= 4


def test_ids_beyond_the_tokenizer_are_never_said(run_dir: Path) -> None:
    """The model has 1,024 rows, its tokenizer fewer pieces; the plain model does say such ids."""
    loaded = load_model(run_dir)
    memory = torch.randn(16, 5, micro.MODEL.decoder_width, generator=torch.Generator().manual_seed(0))
    plain = generate(loaded.model, memory, method="sample", generator=torch.Generator().manual_seed(0))
    assert max(max(ids) for ids in plain) >= loaded.tokenizer.vocab_size
    speaker = KnownPieces(loaded.model, loaded.tokenizer)
    for method in ("greedy", "beam", "sample"):
        for ids in generate(speaker, memory, method=method):  # type: ignore[arg-type]
            loaded.tokenizer.decode(ids)  # raises IndexError for an id outside


def test_a_caption_stays_on_its_line() -> None:
    assert one_line("a dog\r\nruns \x1b[31m fast\u2028 ") == "a dog runs [31m fast"


def test_options_that_do_not_fit(
    run_dir: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        (("--checkpoint", tmp_path / "nowhere"), "nowhere does not exist"),
        (("--checkpoint", run_dir, "--num", 2), "--num 2 needs --method sample"),
        (("--checkpoint", run_dir, "--num", 0), "at least 1; got 0"),
        (("--checkpoint", run_dir, "--max-length", 99), "from 3 to 12"),
        (("--checkpoint", run_dir, "--method", "sample", "--temperature", 0), "temperature"),
        (("--checkpoint", run_dir, "--temperature", 2), "--temperature 2 needs --method sample, not greedy"),
        (
            ("--checkpoint", run_dir, "--method", "beam", "--seed", 3),
            "--seed 3 needs --method sample, not beam",
        ),
        (
            ("--checkpoint", run_dir, "--method", "greedy", "--beams", 3),
            "--beams 3 needs --method beam, not greedy",
        ),
        (
            ("--checkpoint", run_dir, "--method", "sample", "--beams", 2),
            "--beams 2 needs --method beam, not sample",
        ),
        (("--checkpoint", run_dir, "--device", "tpu"), "tpu"),
    ):
        code, lines, err = run(*options, pictures[0], capsys=capsys)
        assert code == 2 and lines == [], options
        assert err.startswith("error: ") and message in err and err.count("\n") == 1, err


def test_the_command_as_typed(run_dir: Path, pictures: list[Path]) -> None:
    done = micro.command("-m", "train.generate", "--checkpoint", str(run_dir), str(pictures[1]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{pictures[1]}: ") and done.stderr == ""


def test_captions_of_a_model_that_never_learned_to_caption_are_refused(
    tmp_path: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    photos = saved(tmp_path / "photos", ObjectiveConfig(caption=0.0))
    code, lines, err = run("--checkpoint", photos, pictures[0], capsys=capsys)
    assert code == 2 and lines == [] and "objectives.caption is 0" in err and "evaluate retrieval" in err
