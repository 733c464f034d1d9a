"""Checkpoints: whole or absent, verified, read back bit for bit, and loaded for use."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from micro import MODEL, ROOT, corpus

from models import Aurora
from train import checkpoint
from train.checkpoint import CheckpointError, Snapshot
from train.config import PretrainConfig
from train.engine import Ranks, TorchEngine, rng_state
from train.machine import Precision

CONFIG = PretrainConfig(model=MODEL, ema_decay=0.9)


def engine(seed: int = 0, config: PretrainConfig = CONFIG) -> TorchEngine:
    torch.manual_seed(seed)
    return TorchEngine(Aurora(MODEL), config, torch.device("cpu"), Precision("fp32", ""), Ranks(0, 0, 1))


def trained(steps: int = 2, seed: int = 0) -> TorchEngine:
    one = engine(seed)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in one.model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        one._sums = {"itc": torch.ones(())}
        one.step(lr=1e-2)
    return one


def snapshot(one: TorchEngine, step: int = 2) -> Snapshot:
    rng = {f"{name}.0": state for name, state in rng_state(one.device).items()}
    return Snapshot(step, one.state(), rng, {"captioned": 5, "manifest": {"hash": "x"}}, "fp32", 1, 12.5, 0)


def save(directory: Path, one: TorchEngine, step: int = 2, keep: int = 3) -> Path:
    return checkpoint.save(directory, snapshot(one, step), CONFIG, corpus().tokenizer, keep)


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    one = trained()
    path = save(tmp_path, one)
    expected = torch.get_rng_state()
    back, config = checkpoint.read(path)
    assert config == CONFIG
    assert torch.equal(back.rng["cpu.0"], expected)
    assert (back.step, back.loader, back.seconds, back.precision) == (
        2,
        {"captioned": 5, "manifest": {"hash": "x"}},
        12.5,
        "fp32",
    )
    other = engine(seed=1)
    other.load(back.engine)
    assert other.ema and other.ema.updates == 2
    a, b = one.state(), other.state()
    for kind in ("model", "optimizer", "ema"):
        mine, theirs = getattr(a, kind), getattr(b, kind)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), kind


def test_only_safe_formats_are_written(tmp_path: Path) -> None:
    names = {file.name for file in save(tmp_path, trained()).iterdir()}
    assert names == {
        "model.safetensors", "ema.safetensors", "optimizer.safetensors", "rng.safetensors",
        "config.json", "state.json", "tokenizer.model",
    }  # fmt: skip


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    if os.name == "nt":
        pytest.skip("needs a POSIX system: Windows has other permissions")
    wanted = tmp_path / "ordinary"
    wanted.touch()
    for file in save(tmp_path / "c", trained()).iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(wanted.stat().st_mode), file.name


@pytest.mark.parametrize(
    "name",
    [f"{name}.safetensors" for name in ("model", "optimizer", "ema", "rng")]
    + ["config.json", "tokenizer.model"],
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    path = save(tmp_path, trained())
    file = path / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 3] ^= 0x10
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-1])
    else:
        file.unlink()
    said = f"{name} is missing" if damage == "remove" else rf"{name} \([\d,]+ bytes\) differs"
    for read in (checkpoint.read, checkpoint.load_model):
        with pytest.raises(CheckpointError, match=f"step-000002 is damaged: {said}"):
            read(path)


def test_changed_state_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, trained())
    file = path / "state.json"
    text = file.read_text()
    file.write_text(text.replace('"captioned": 5', '"captioned": 6'))
    with pytest.raises(CheckpointError, match=r"state\.json differs"):
        checkpoint.read(path)
    file.write_text(text[:-40])
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        checkpoint.read(path)
    file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        checkpoint.read(path)


def test_newest_intact_passes_over_the_damaged_and_says_so(tmp_path: Path) -> None:
    one = trained()
    for step in (2, 4, 10):
        save(tmp_path / "checkpoints", one, step)
    (tmp_path / "checkpoints/step-000010/rng.safetensors").write_bytes(b"")
    said: list[str] = []
    assert checkpoint.newest_intact(tmp_path, said.append) == tmp_path / "checkpoints/step-000004"
    assert len(said) == 1 and "step-000010 is damaged: rng.safetensors (0 bytes)" in said[0]
    for step in (2, 4):
        (tmp_path / f"checkpoints/step-{step:06d}/state.json").write_text("")
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        checkpoint.newest_intact(tmp_path, said.append)
    assert checkpoint.newest_intact(tmp_path / "nothing", said.append) is None


def test_newest_are_kept_in_the_order_of_steps(tmp_path: Path) -> None:
    one = trained()
    for step in (999_999, 1_000_000, 1_000_001):
        save(tmp_path, one, step, keep=2)
    assert [path.name for path in checkpoint.step_directories(tmp_path)] == ["step-1000001", "step-1000000"]
    assert (tmp_path / "latest").read_text() == "step-1000001\n"


def test_a_damaged_checkpoint_is_replaced_when_the_run_comes_by_again(tmp_path: Path) -> None:
    path = save(tmp_path, trained())
    (path / "model.safetensors").write_bytes(b"")
    assert save(tmp_path, trained()) == path
    checkpoint.verify(path)


def test_a_crash_while_saving_leaves_no_checkpoint(tmp_path: Path) -> None:
    """SIGKILL after the files are written and before the rename: only an unfinished directory stays, and it
    is cleaned up.
    """
    code = (
        "import os, sys, signal; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path; from test_train_checkpoint import save, trained\n"
        "one = trained(); rename = Path.rename\n"
        "def killed(self, target):\n"
        "    if '.unfinished' in self.name: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return rename(self, target)\n"
        f"Path.rename = killed; save(Path({str(tmp_path)!r}), one)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -9
    assert [entry.name for entry in tmp_path.iterdir()] == [".unfinished-step-000002"]
    assert checkpoint.find(tmp_path) == []
    checkpoint.remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_named_and_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, trained(), 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"could not save .*step-000002.*No space left"):
        save(tmp_path, trained(), 2, keep=1)
    assert [path.name for path in checkpoint.find(tmp_path)] == ["step-000001"]
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_model_for_use_is_the_trained_one(tmp_path: Path) -> None:
    one = trained()
    step = save(tmp_path / "run/checkpoints", one)
    one.model.eval()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        raw = one.model.encode_image(image)[3]
        with one.scored_weights() as model:
            averaged = model.encode_image(image)[3]
    assert not torch.equal(raw, averaged)
    for place in (step, step.parent, step.parent.parent, str(step)):
        loaded = checkpoint.load_model(place)
        assert loaded.averaged and not loaded.model.training
        assert (loaded.step, loaded.path, loaded.config) == (2, step, CONFIG)
        assert loaded.tokenizer.sha == checkpoint.sha256(corpus().tokenizer)
        with torch.no_grad():
            assert torch.equal(loaded.model.encode_image(image)[3], averaged)
    plain = checkpoint.load_model(step, ema=False)
    assert not plain.averaged
    with torch.no_grad():
        assert torch.equal(plain.model.encode_image(image)[3], raw)


def test_a_loaded_model_can_be_trained_further(tmp_path: Path) -> None:
    loaded = checkpoint.load_model(save(tmp_path, trained()))
    loaded.model.encode_image(torch.randn(1, 3, 32, 32))[3].sum().backward()
    assert loaded.model.encoder.stem.weight.grad is not None


@pytest.mark.parametrize(
    "place, said", [("nowhere", "does not exist"), ("empty", "has no finished checkpoint")]
)
def test_no_checkpoint_is_said(tmp_path: Path, place: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{place} {said}; give a run"):
        checkpoint.load_model(tmp_path / place)


def test_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, trained())
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99; this version reads format 1"):
        checkpoint.read(path)


def test_averaging_may_start_at_a_resume(tmp_path: Path) -> None:
    without = engine(config=dataclasses.replace(CONFIG, ema_decay=0.0))
    state = without.state()
    assert state.ema is None
    one = engine(seed=1)
    one.load(state)
    assert one.ema
    assert all(torch.equal(one.ema.weights[name], p) for name, p in without.model.named_parameters())


def test_weights_of_another_model_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, trained())
    checkpoint.write_config(
        path / "config.json", dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, width=32))
    )
    state = json.loads((path / "state.json").read_text())
    state["sha256"]["config.json"] = checkpoint.sha256(path / "config.json")
    checkpoint.write_state(
        path, {**state, "sha256": {k: v for k, v in state["sha256"].items() if k != "state.json"}}
    )
    with pytest.raises(CheckpointError, match=r"does not fit this version's model: .*size mismatch for "):
        checkpoint.load_model(path)
