"""`python -m train.export`: one file of whole tensors, whatever the checkpoint is made of."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import MODEL, corpus
from safetensors.torch import load_file
from test_train_checkpoint import CONFIG, snapshot, trained

from dataload.tokenizer import Tokenizer
from models import PERCEIVER_SIZES, Aurora, PerceiverIO, load_pretrained
from models.aurora.encoder import remembered_offsets
from models.perceiver import Piece as Pictures
from train import checkpoint
from train.checkpoint import CheckpointError, LoadedModel
from train.engines.pieces import Piece, PiecesError, Stored, as_pieces, share_of, write_pieces
from train.export.__main__ import at_once, main
from train.export.program import check_program, export_encoder
from train.multimodal.config import PerceiverPretrainConfig
from train.tasks.config import PerceiverFinetuneConfig, TaskConfig

PERCEIVER = replace(PERCEIVER_SIZES["tiny"], encoder_layers=1, latent_layers=1, latents=12)


def by_ranks(directory: Path, size: int, step: int = 2) -> Path:
    """The checkpoint that `size` ranks of DDP would write."""
    one = trained(step)
    whole = snapshot(one, step)
    work = checkpoint.unfinished(directory, step)
    checkpoint.start(work)
    sums: dict[str, str] = {}
    for rank in range(size):
        kinds = {kind: getattr(whole.engine, kind) for kind in ("model", "optimizer", "ema")}
        part = {kind: share_of(dict(tensors), rank, size) for kind, tensors in kinds.items()}
        sums |= checkpoint.write_part(work, part, rank, size)
    return checkpoint.commit(work, whole, CONFIG, corpus().tokenizer, sums)


@pytest.mark.parametrize("size", [1, 3])
def test_weights_are_whole_and_averaged(
    size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_ranks(tmp_path / "run/checkpoints", size)
    one = trained()
    assert one.ema
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    assert "averaged weights of step 2" in capsys.readouterr().out
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == dict(one.model.named_parameters()).keys()
    assert all(torch.equal(found[name], weight) for name, weight in one.ema.weights.items())
    assert (tmp_path / "out/tokenizer.model").read_bytes() == corpus().tokenizer.read_bytes()

    other = [str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--raw", "--dtype", "bf16"]
    assert main(other) == 2  # programs and scores of the first would stand beside it
    assert "out holds an export already, or other files of its names (model.saf" in capsys.readouterr().err
    (tmp_path / "out/state.json").unlink()
    assert main(other) == 2 and "choose another --output" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    assert main(other) == 0
    found = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(found[name], p.bfloat16()) for name, p in one.model.named_parameters())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "state.json",
        "tokenizer.model",
    ]
    # what reads a run reads it, in fp32
    loaded, used = checkpoint.load_model(tmp_path / "out"), load_pretrained(tmp_path / "out")
    for name, weight in loaded.model.named_parameters():
        assert weight.dtype == torch.float32 and torch.equal(weight, found[name].float())
        assert torch.equal(used.model.get_parameter(name), weight)
    assert loaded.step == 2 and not loaded.averaged and loaded.config == CONFIG
    card = (tmp_path / "out/README.md").read_text()
    assert "load_pretrained" in card and "step 2; pre-trained" in card and loaded.tokenizer.sha[:16] in card


def test_what_is_exported_does_not_mix_with_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = by_ranks(tmp_path / "run/checkpoints", 2)
    with pytest.raises(FileNotFoundError, match="train.export makes one file"):
        load_pretrained(tmp_path / "run")
    assert main(["--checkpoint", str(tmp_path / "run"), "--output", str(step)]) == 2
    assert "choose another --output" in capsys.readouterr().err and checkpoint.verify(step)
    for inside in ("run", "run/checkpoints"):
        before = sorted((tmp_path / "run").rglob("*"))
        assert main([str(step), "--output", str(tmp_path / inside)]) == 2
        assert f"{inside} is a run's directory; choose another --output" in capsys.readouterr().err
        assert sorted((tmp_path / "run").rglob("*")) == before
    out = tmp_path / "out"
    # the scores that lie beside the checkpoint are in the card; exporting what was exported changes nothing
    scores = {"task": "retrieval", "scores": {"R@1": {"value": 0.25}}, "counts": {"pictures": 4}}
    (step / "retrieval.json").write_text(json.dumps(scores))
    assert main(["--checkpoint", str(tmp_path / "run"), "--output", str(out)]) == 0
    assert '"R@1"' in (out / "README.md").read_text()
    assert main([str(out), "--output", str(tmp_path / "again")]) == 0
    assert "averaged weights of step 2" in capsys.readouterr().out
    files = ("model.safetensors", "config.json")
    assert all((out / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    with pytest.raises(CheckpointError, match="is an exported model"):
        checkpoint.read(out)
    with pytest.raises(SystemExit):
        main(["--output", str(out)])
    assert "one run or checkpoint is needed" in capsys.readouterr().err


def test_an_export_that_fails_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_ranks(tmp_path / "run/checkpoints", 1)

    def failing(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    command = [str(tmp_path / "run"), "--output", str(tmp_path / "out")]
    with monkeypatch.context() as full:
        full.setattr("train.export.__main__.write_card", failing)
        assert main(command) == 2
        assert "No space left" in capsys.readouterr().err and not (tmp_path / "out").exists()
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine.txt").write_text("mine")
        assert main(command) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert main([*command[:2], str(tmp_path / "run/checkpoints/step-000002/sub")]) == 2
    assert "step-000002, a checkpoint or an export; choose another" in capsys.readouterr().err
    assert main([*command, "--program", "torch"]) == 0
    assert f"{tmp_path / 'out/encoder.pt2'}: the model's numbers within" in capsys.readouterr().out
    assert (tmp_path / "out/mine.txt").read_text() == "mine" and checkpoint.verify(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".unfinished*"))


def test_exports_at_once_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second to end is refused, and leaves the first one's alone; one that is stopped amid its moves takes them back."""
    out = tmp_path / "a/out"
    with pytest.raises(CheckpointError, match="holds an export already"):
        with at_once(out) as late:
            with at_once(out) as early:
                for folder, text in ((late, '{"exported": 2}'), (early, '{"exported": 1}')):
                    for name in ("model.safetensors", "state.json"):
                        (folder / name).write_text(text)
    found = {path.name: path.read_text() for path in out.iterdir()}
    assert found == dict.fromkeys(("model.safetensors", "state.json"), '{"exported": 1}')
    whole = Path.replace

    def stopped(path: Path, target: Path) -> Path:
        if path.name == "state.json":
            raise KeyboardInterrupt
        return whole(path, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        with at_once(tmp_path / "b/out") as folder:
            for name in ("model.safetensors", "state.json"):
                (folder / name).write_text(name)
    assert not (tmp_path / "b").exists()


def test_programs_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_ranks(tmp_path / "run/checkpoints", 1)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    out = tmp_path / "out"
    assert main([str(tmp_path / "run"), "--output", str(out), "--program", "onnx"]) == 2
    assert "pip install 'auroraio[onnx]'" in capsys.readouterr().err and not out.exists()
    sounds = PerceiverFinetuneConfig(task=TaskConfig("audio"))
    with pytest.raises(ValueError, match="fine-tuned for audio"):
        check_program(["torch"], sounds)
    with pytest.raises(ValueError, match="supported: torch, onnx"):
        check_program(["coreml"], CONFIG)


@pytest.mark.slow
def test_programs_give_the_models_numbers(tmp_path: Path) -> None:
    """torch.export's and ONNX's, for any number of pictures, also where nothing has run before them."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'auroraio[onnx]'")
    torch.manual_seed(0)
    config = replace(
        CONFIG, model=replace(MODEL, depths=(2, 1, 1, 1))
    )  # the second block's windows are shifted
    tokenizer = Tokenizer.load(corpus().tokenizer)
    remembered_offsets.cache_clear()
    loaded = LoadedModel(Aurora(config.model).eval(), tokenizer, config, 1, tmp_path, False)
    made = export_encoder(loaded, tmp_path, ("torch", "onnx"))
    assert [one.path.name for one in made] == ["encoder.pt2", "encoder.onnx"]
    assert all(one.difference < 2e-6 for one in made)
    session = onnxruntime.InferenceSession(str(tmp_path / "encoder.onnx"))
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    for count in (1, 5):
        images = torch.randn(count, 3, 32, 32)
        with torch.no_grad():
            maps = loaded.model.encode_image(images)
            wanted = [loaded.model.image_embedding(maps), *maps]
            for a, b in zip(program(images), wanted, strict=True):
                torch.testing.assert_close(a, b)
        for name, b in zip(("embedding", "map4", "map8", "map16", "map32"), wanted, strict=True):
            (a,) = session.run([name], {"images": images.numpy()})
            torch.testing.assert_close(torch.from_numpy(a), b, atol=2e-5, rtol=2e-5)


def test_a_program_of_perceiverio(tmp_path: Path) -> None:
    config = PerceiverPretrainConfig(model=PERCEIVER)
    torch.manual_seed(0)
    model = PerceiverIO(PERCEIVER).eval()
    loaded = LoadedModel(model, Tokenizer.load(corpus().tokenizer), config, 1, tmp_path, False)
    (made,) = export_encoder(loaded, tmp_path)
    assert made.difference < 2e-6
    # side by side as packed
    images = torch.randn(3, 3, PERCEIVER.image_size, PERCEIVER.image_size)
    with torch.no_grad():
        packed = model.encode({"image": Pictures(images, torch.arange(3))}, 3)
        embedding, latents = torch.export.load(made.path).module()(images)
        torch.testing.assert_close(latents, packed)
        torch.testing.assert_close(embedding, model.embedding(packed, "image"))


def test_sharded_and_whole_checkpoints_read_alike(tmp_path: Path) -> None:
    a, b = (checkpoint.read(by_ranks(tmp_path / str(size), size))[0] for size in (1, 4))
    for kind in ("model", "optimizer", "ema"):
        one, other = getattr(a.engine, kind), getattr(b.engine, kind)
        assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    loaded = [checkpoint.load_model(tmp_path / size) for size in ("1", "4")]
    states = [one.model.state_dict() for one in loaded]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_part_is_named_and_the_one_before_is_taken(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_ranks(tmp_path / "checkpoints", 2, step=1)
    file = by_ranks(tmp_path / "checkpoints", 2, step=2) / "optimizer-00002-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x01
    match damage:
        case "flip":
            file.write_bytes(data)
        case "truncate":
            file.write_bytes(data[:-8])
        case _:
            file.unlink()
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "step-000002 is damaged: optimizer-00002-of-00002.safetensors" in said.err
    assert "weights of step 1" in said.out
    with pytest.raises(CheckpointError, match="optimizer-00002-of-00002"):
        checkpoint.read(file.parent)


def test_a_run_without_checkpoints_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "has no finished checkpoint" in capsys.readouterr().err


def test_files_are_safetensors(tmp_path: Path) -> None:
    """The library reads what is written here: every dtype, no dimension, no numbers."""
    tensors = {
        "a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.tensor(3.5),
        "d": torch.arange(5, dtype=torch.uint8), "e": torch.zeros(0, 4), "f": torch.tensor([True, False]),
        "g": torch.arange(6).view(2, 3).T,
    }  # fmt: skip
    digest = write_pieces(tmp_path / "x.safetensors", as_pieces(tensors))
    assert digest == checkpoint.sha256(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].shape == tensor.shape
        for name, tensor in tensors.items()
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_shares_are_all_of_it_once(size: int, tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.tensor(3.5),
        "e": torch.zeros(0, 4),
    }
    files = [tmp_path / f"{rank}" for rank in range(size)]
    for rank, file in enumerate(files):
        write_pieces(file, share_of(tensors, rank, size))
    found = Stored(files)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items()) and len(found) == 4
    assert torch.equal(found.part("a", 4, 11), tensors["a"].flatten()[4:11])


@pytest.mark.parametrize(
    "pieces, said",
    [
        ([(0, 4), (6, 4)], "numbers 4 to 6 are missing"),
        ([(0, 6), (4, 6)], "numbers 4 to 6 are there twice"),
        ([(0, 4)], "4 of its 10 numbers are there"),
    ],
)
def test_parts_that_do_not_fit_are_refused(pieces: list[tuple[int, int]], said: str, tmp_path: Path) -> None:
    for i, (start, length) in enumerate(pieces):
        write_pieces(tmp_path / str(i), {"a": Piece(torch.zeros(length), start, (2, 5))})
    with pytest.raises(PiecesError, match=f"a: .*{said}"):
        Stored([tmp_path / str(i) for i in range(len(pieces))])


def test_old_checkpoints_go_but_for_every_nth(tmp_path: Path) -> None:
    for step in range(1, 8):
        (tmp_path / f"step-{step:06d}").mkdir()
    checkpoint.prune(tmp_path, keep=2, every=3)
    assert [checkpoint.step_of(path) for path in checkpoint.step_directories(tmp_path)] == [7, 6, 3]
