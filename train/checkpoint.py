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

Several ranks write a part each: model-00001-of-00004.safetensors and so on (train/engines/pieces.py). Which engine wrote it,
on how many ranks, does not matter to who reads it. train/saving.py writes beside the training.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataload.tokenizer import Tokenizer
from train.config import PretrainConfig, from_dict, to_dict
from train.engine import EngineState
from train.engines.pieces import Piece, PiecesError, Stored, as_pieces, write_pieces
from train.families import family_of
from train.multimodal.config import PerceiverPretrainConfig
from train.optim import with_aliases
from train.tasks.config import FinetuneConfig, PerceiverFinetuneConfig

FORMAT = 1
HASHED_AT_ONCE = 8
STEP = re.compile(r"step-(\d+)$")
TEMPORARY = ".unfinished-"
ASIDE = "set-aside-"


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


def save(directory: Path, snapshot: Snapshot, config: PretrainConfig, tokenizer: Path, keep: int) -> Path:
    """Write `directory`/step-N from one process, point `latest` at it, remove all but the newest `keep`. Returns the step
    directory. Raises CheckpointError where the disk refuses (full, read-only).
    """
    work = unfinished(directory, snapshot.step)
    try:
        start(work)
        sums = write_part(work, kinds_of(snapshot.engine), 0, 1)
        final = commit(work, snapshot, config, tokenizer, sums)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise CheckpointError(
            f"could not save {step_directory(directory, snapshot.step)}: {error}"
        ) from error
    prune(directory, keep)
    return final


def step_directory(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies once it is whole."""
    return directory / f"step-{step:06d}"


def unfinished(directory: Path, step: int) -> Path:
    """Where it is written: a directory of another name. The rename is the last act, so a crash at any moment leaves either
    the whole checkpoint or none."""
    return directory / f"{TEMPORARY}{step_directory(directory, step).name}"


def start(work: Path) -> None:
    """An empty directory. Raises OSError."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)


def kinds_of(state: EngineState) -> dict[str, dict[str, Piece]]:
    """What goes into files: kind -> pieces by name."""
    kinds = {"model": as_pieces(state.model), "optimizer": as_pieces(state.optimizer)}
    return kinds if state.ema is None else {**kinds, "ema": as_pieces(state.ema)}


def write_part(work: Path, kinds: Mapping[str, Mapping[str, Piece]], rank: int, size: int) -> dict[str, str]:
    """Write the files of one rank of `size`; returns the SHA-256 of each by name. Raises OSError."""
    suffix = f"-{rank + 1:05d}-of-{size:05d}" if size > 1 else ""
    names = {f"{kind}{suffix}.safetensors": pieces for kind, pieces in kinds.items()}
    return {name: write_pieces(work / name, pieces) for name, pieces in names.items()}


def commit(
    work: Path, snapshot: Snapshot, config: PretrainConfig, tokenizer: Path, sums: Mapping[str, str]
) -> Path:
    """Once every rank's files are on disk: write what is left, with all checksums, and give the directory its name. Returns
    that. Raises OSError."""
    final = work.with_name(work.name.removeprefix(TEMPORARY))
    found = dict(sums)
    found["rng.safetensors"] = write_pieces(
        work / "rng.safetensors", as_pieces({name: state.cpu() for name, state in snapshot.rng.items()})
    )
    write_config(work / "config.json", config)
    shutil.copyfile(tokenizer, work / "tokenizer.model")
    for name in ("config.json", "tokenizer.model"):
        found[name] = sha256(work / name)
        _sync(work / name)
    state: dict[str, Any] = {
        "format": FORMAT,
        "step": snapshot.step,
        "samples": snapshot.step * config.batch_size,
        "loader": snapshot.loader,
        "precision": snapshot.precision,
        "world_size": snapshot.world_size,
        "seconds": snapshot.seconds,
        "skipped": snapshot.skipped,
        "ema_updates": snapshot.engine.ema_updates,
        "optimizer_groups": snapshot.engine.groups,
        "torch": torch.__version__,
        "sha256": dict(sorted(found.items())),
    }
    write_state(work, state)
    _sync(work)
    former = final.with_name(f"{TEMPORARY}former-{final.name}")
    if final.exists():  # it stays until the new one has its name
        shutil.rmtree(former, ignore_errors=True)
        final.rename(former)
    work.rename(final)
    shutil.rmtree(former, ignore_errors=True)
    _replace_text(final.parent / "latest", final.name + "\n")
    _sync(final.parent)
    return final


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """state.json, which vouches for the files in state["sha256"] and for itself. Raises OSError."""
    state["sha256"]["state.json"] = _own_sha(state)
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    _sync(folder / "state.json")


def prune(directory: Path, keep: int, every: int = 0, new: Path | None = None) -> None:
    """Remove all but the newest `keep`; one whose step is a multiple of `every` stays for good (0: none does), and so does
    `new`, which has just been written."""
    for old in step_directories(directory)[keep:]:
        if old != new and (not every or step_of(old) % every):
            shutil.rmtree(old)


def set_aside(directory: Path, after: int) -> list[Path]:
    """Rename the checkpoints of later steps, which a run that goes on from step `after` leaves behind: they would be taken for
    its newest. Returns what they are called now. Raises OSError."""
    renamed = []
    for later in step_directories(directory):
        if step_of(later) > after:
            aside = later.with_name(f"{ASIDE}{later.name}")
            shutil.rmtree(aside, ignore_errors=True)
            renamed.append(later.rename(aside))
    return renamed


def read(path: Path, *, verified: bool = False) -> tuple[Snapshot, PretrainConfig]:
    """Verify and open one step directory; tensors are read when they are asked for. Raises CheckpointError for damage of any
    kind. verified: `verify` has just been called, by any rank.
    """
    state = _state(path) if verified else verify(path)
    if state.get("exported"):
        raise CheckpointError(
            f"{path} is an exported model: weights, without the optimizer's state. Give it as --checkpoint to "
            "train.finetune or train.evaluate; --resume needs the run's own checkpoints"
        )
    model, optimizer, rng = (stored(path, kind, state) for kind in ("model", "optimizer", "rng"))
    ema = stored(path, "ema", state) if _files(state, "ema") else None
    engine = EngineState(model, optimizer, state["optimizer_groups"], ema, state["ema_updates"])
    kept = {name: state[name] for name in ("step", "loader", "precision", "world_size", "seconds", "skipped")}
    return Snapshot(engine=engine, rng=dict(rng), **kept), read_config(path)


def stored(path: Path, kind: str, state: Mapping[str, Any]) -> Stored:
    """The tensors of one kind ("model", "ema", "optimizer", "rng") of a step directory whose state.json says `state`."""
    try:
        return Stored([path / name for name in _files(state, kind)])
    except PiecesError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _files(state: Mapping[str, Any], kind: str) -> list[str]:
    part = re.compile(rf"{kind}(-\d+-of-\d+)?\.safetensors")
    return [name for name in state["sha256"] if part.fullmatch(name)]


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
    state = _state(path)
    recorded = {name: digest for name, digest in state["sha256"].items() if name != "state.json"}
    for name in recorded:
        if not (path / name).is_file():
            raise CheckpointError(f"{path} is damaged: {name} is missing")
    try:
        with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
            sums = dict(zip(recorded, pool.map(lambda name: sha256(path / name), recorded), strict=True))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    for name, found in sums.items():
        if found != recorded[name]:
            size = (path / name).stat().st_size
            raise CheckpointError(
                f"{path} is damaged: {name} ({size:,} bytes) differs from its recorded checksum"
            )
    return state


def _state(path: Path) -> dict[str, Any]:
    """state.json, which vouches for itself."""
    try:
        state = json.loads((path / "state.json").read_text())
        recorded = dict(state["sha256"])
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no checkpoint: it has no state.json") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: state.json cannot be read ({error})") from None
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {state.get('format')!r}; this version reads format {FORMAT}"
        )
    if recorded.get("state.json") != _own_sha(state):
        raise CheckpointError(f"{path} is damaged: state.json differs from its recorded checksum")
    return dict(state)


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
    return sorted(
        (entry for entry in directory.iterdir() if STEP.match(entry.name)), key=step_of, reverse=True
    )


def step_of(directory: Path) -> int:
    """The step of a step directory."""
    match = STEP.match(directory.name)
    assert match, directory
    return int(match[1])


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
    averaged = ema and bool(_files(state, "ema"))
    with torch.device("meta"):
        model: Any = family_of(config).model(config)
    weights = {name: _single(tensor) for name, tensor in stored(step, "model", state).items()}
    try:
        model.load_state_dict(with_aliases(weights, model), assign=True)
        if averaged:
            model.load_state_dict(dict(stored(step, "ema", state)), strict=False, assign=True)
    except RuntimeError as error:  # torch lists every name
        first = str(error).splitlines()[1:2] or [str(error)]
        raise CheckpointError(
            f"{step} does not fit this version's model: {first[0].strip()[:300]}"
        ) from error
    tokenizer = Tokenizer.load(step / "tokenizer.model")
    averaged = averaged or bool(state.get("averaged"))  # an exported one
    return LoadedModel(model.to(device).eval(), tokenizer, config, state["step"], step, averaged)


def _single(tensor: Tensor) -> Tensor:
    """fp32 of what was exported in a half type."""
    return tensor.float() if tensor.is_floating_point() else tensor


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
