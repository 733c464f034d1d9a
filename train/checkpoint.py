"""Checkpoints: directories that appear whole or not at all, verified when read, without any unpickling.

runs/NAME/checkpoints/
    latest                       text: the newest step directory's name
    step-000123/
        model.safetensors        weights under the model's own parameter names
        ema.safetensors          averaged weights, where the run keeps them
        optimizer.safetensors    exp_avg.NAME, exp_avg_sq.NAME, step.NAME
        rng.safetensors          generator states, uint8, by rank
        config.json              the resolved configuration
        tokenizer.model          the run's SentencePiece model
        state.json               step, data position, optimizer groups; SHA-256 of every file (itself too)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dataload.tokenizer import Tokenizer
from train.config import PretrainConfig, from_dict, to_dict
from train.engine import EngineState
from train.families import AuroraFamily, family_of
from train.multimodal import PerceiverPretrainConfig
from train.optim import with_aliases
from train.tasks.config import FinetuneConfig, PerceiverFinetuneConfig

FORMAT = 1
STEP = re.compile(r"step-(\d+)$")
TEMPORARY = ".unfinished-"


class CheckpointError(ValueError):
    """A checkpoint that is absent, damaged, or does not fit; the message says which and why."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that makes a run go on exactly: after `step` optimizer steps."""

    step: int
    engine: EngineState
    rng: dict[str, Tensor]
    loader: dict[str, Any]
    precision: str
    world_size: int
    seconds: float
    skipped: int


@dataclass(frozen=True)
class LoadedModel:
    """A trained model as `load_model` gives it."""

    model: Any
    tokenizer: Tokenizer
    config: PretrainConfig
    step: int
    path: Path
    averaged: bool

    def must_be_aurora(self, command: str) -> None:
        """Raises CheckpointError for a model of another family, which `command` cannot use as yet."""
        family = family_of(self.config).name
        if family != AuroraFamily.name:
            raise CheckpointError(
                f"{self.path} is a {family} checkpoint; {command} reads {AuroraFamily.name}'s alone as yet. "
                "Its scores stand in the run's summary.json and report.html"
            )


def save(directory: Path, snapshot: Snapshot, config: PretrainConfig, tokenizer: Path, keep: int) -> Path:
    """Write `directory`/step-N, point `latest` at it, remove all but the newest `keep`. Returns the step
    directory.

    Files are written into a directory of another name and synced to disk; the rename is the last act, so a
    crash at any moment leaves either the whole checkpoint or none. Raises CheckpointError where the disk
    refuses (full, read-only).
    """
    final = directory / f"step-{snapshot.step:06d}"
    work = directory / f"{TEMPORARY}{final.name}"
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        _write_files(work, snapshot, config, tokenizer)
        for file in work.iterdir():
            shutil.copymode(
                work / "config.json", file
            )  # safetensors writes files that only their owner may read
            _sync(file)
        _sync(work)
        if final.exists():  # a damaged one that the run went back beyond
            shutil.rmtree(final)
        work.rename(final)
        _replace_text(directory / "latest", final.name + "\n")
        _sync(directory)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise CheckpointError(f"could not save {final}: {error}") from error
    for old in step_directories(directory)[keep:]:
        shutil.rmtree(old)
    return final


def _write_files(work: Path, snapshot: Snapshot, config: PretrainConfig, tokenizer: Path) -> None:
    engine = snapshot.engine
    save_file(_on_cpu(engine.model), work / "model.safetensors")
    save_file(_on_cpu(engine.optimizer), work / "optimizer.safetensors")
    save_file(_on_cpu(snapshot.rng), work / "rng.safetensors")
    if engine.ema is not None:
        save_file(_on_cpu(engine.ema), work / "ema.safetensors")
    write_config(work / "config.json", config)
    shutil.copyfile(tokenizer, work / "tokenizer.model")
    state: dict[str, Any] = {
        "format": FORMAT,
        "step": snapshot.step,
        "samples": snapshot.step * config.batch_size,
        "loader": snapshot.loader,
        "precision": snapshot.precision,
        "world_size": snapshot.world_size,
        "seconds": snapshot.seconds,
        "skipped": snapshot.skipped,
        "ema_updates": engine.ema_updates,
        "optimizer_groups": engine.groups,
        "torch": torch.__version__,
        "sha256": {file.name: sha256(file) for file in sorted(work.iterdir())},
    }
    state["sha256"]["state.json"] = _own_sha(state)
    (work / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def read(path: Path) -> tuple[Snapshot, PretrainConfig]:
    """Verify and load one step directory. Raises CheckpointError for damage of any kind."""
    state = verify(path)
    files = {name: _load(path / f"{name}.safetensors") for name in ("model", "optimizer", "rng")}
    ema = _load(path / "ema.safetensors") if "ema.safetensors" in state["sha256"] else None
    engine = EngineState(
        files["model"], files["optimizer"], state["optimizer_groups"], ema, state["ema_updates"]
    )
    kept = {name: state[name] for name in ("step", "loader", "precision", "world_size", "seconds", "skipped")}
    return Snapshot(engine=engine, rng=files["rng"], **kept), read_config(path)


def write_config(file: Path, config: PretrainConfig) -> None:
    """The resolved configuration as JSON."""
    file.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def read_config(path: Path) -> PretrainConfig:
    """The configuration of one step directory."""
    found = json.loads((path / "config.json").read_text())
    perceiver = "latent_width" in found.get("model", {})
    if "task" in found:
        kind: type[PretrainConfig] = PerceiverFinetuneConfig if perceiver else FinetuneConfig
    else:
        kind = PerceiverPretrainConfig if perceiver else PretrainConfig
    config: PretrainConfig = from_dict(kind, found)
    return config


def verify(path: Path) -> dict[str, Any]:
    """Compare every file with its recorded SHA-256; returns state.json. Raises CheckpointError naming the
    file that differs.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        recorded = dict(state["sha256"])
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no checkpoint: it has no state.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: state.json cannot be read ({error})") from None
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {state.get('format')!r}; this version reads format {FORMAT}"
        )
    if recorded.pop("state.json", None) != _own_sha(state):
        raise CheckpointError(f"{path} is damaged: state.json differs from its recorded checksum")
    for name, expected in recorded.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path} is damaged: {name} is missing")
        if sha256(path / name) != expected:
            size = (path / name).stat().st_size
            raise CheckpointError(
                f"{path} is damaged: {name} ({size:,} bytes) differs from its recorded checksum"
            )
    return state


def find(path: Path) -> list[Path]:
    """The step directories that `path` means, newest first: itself, or those of a run or of its checkpoints
    directory.
    """
    if (path / "state.json").is_file():
        return [path]
    return step_directories(path / "checkpoints" if (path / "checkpoints").is_dir() else path)


def step_directories(directory: Path) -> list[Path]:
    """Finished checkpoints in `directory`, newest first. An empty list where there are none, or no such
    directory.
    """
    if not directory.is_dir():
        return []
    found = [(int(match[1]), entry) for entry in directory.iterdir() if (match := STEP.match(entry.name))]
    return [entry for _, entry in sorted(found, reverse=True)]


def newest_intact(path: Path, say: Callable[[str], None]) -> Path | None:
    """The newest step directory under `path` that verifies; those passed over are said. None where there is
    none at all.

    Raises CheckpointError where there are some, all damaged.
    """
    candidates = find(path)
    for candidate in candidates:
        try:
            verify(candidate)
        except CheckpointError as error:
            say(f"resume      passed over: {error}")
        else:
            return candidate
    if candidates:
        raise CheckpointError(f"none of the {len(candidates)} checkpoints in {path} is intact")
    return None


def load_model(path: str | Path, device: torch.device | str = "cpu", *, ema: bool = True) -> LoadedModel:
    """The model, in eval mode, of a step directory, a checkpoints directory or a run directory (then its
    newest checkpoint).

    ema: take the averaged weights where there are some. Raises FileNotFoundError where there is no
    checkpoint, and CheckpointError for a damaged one.
    """
    path = Path(path)
    candidates = find(path)
    if not candidates:
        why = "has no finished checkpoint" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{path} {why}; give a run (runs/NAME) or one of its checkpoints "
            "(runs/NAME/checkpoints/step-000100)"
        )
    step = candidates[0]
    state, config = verify(step), read_config(step)
    averaged = ema and "ema.safetensors" in state["sha256"]
    with torch.device("meta"):
        model: Any = family_of(config).model(config)
    model.load_state_dict(with_aliases(_load(step / "model.safetensors"), model), assign=True)
    if averaged:
        model.load_state_dict(_load(step / "ema.safetensors"), strict=False, assign=True)
    tokenizer = Tokenizer.load(step / "tokenizer.model")
    return LoadedModel(model.to(device).eval(), tokenizer, config, state["step"], step, averaged)


def remove_unfinished(directory: Path) -> None:
    """Delete what a killed process left half written."""
    for entry in directory.glob(f"{TEMPORARY}*"):
        shutil.rmtree(entry)


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _own_sha(state: dict[str, Any]) -> str:
    others = {name: digest for name, digest in state["sha256"].items() if name != "state.json"}
    return hashlib.sha256(json.dumps({**state, "sha256": others}, sort_keys=True).encode()).hexdigest()


def _load(file: Path) -> dict[str, Tensor]:
    """Tensors in memory of their own: the file may be removed or replaced afterwards."""
    try:
        return {name: tensor.clone() for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file or directory."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no directories
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace_text(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.new")
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(file)
