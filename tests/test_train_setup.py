"""What a resumed run says, and how a stopped one is to be gone on with."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train import commands
from train.commands import (
    begun_by,
    command_line,
    command_that_began,
    command_to_resume,
    keep,
    python,
    torchrun,
)
from train.engine import Ranks, gather_rng, rng_state
from train.setup import _go_on_from


@pytest.mark.parametrize(("now", "anew"), [(4, True), (2, False), (1, False)])
def test_new_ranks_of_a_resumed_run_are_said(now: int, anew: bool) -> None:
    """On rank 0, which has its random state in every checkpoint."""
    device, said = torch.device("cpu"), list[str]()
    states = rng_state(device)
    snapshot: Any = SimpleNamespace(
        engine=None, loader=None, step=3, seconds=1.0, skipped=0, world_size=2,
        rng=gather_rng(states, Ranks(0, 0, 1)) | {"cpu.1": states["cpu"]},
    )  # fmt: skip
    run: Any = SimpleNamespace(
        engine=SimpleNamespace(load=lambda state: None, device=device),
        data=SimpleNamespace(loader=SimpleNamespace(load_state_dict=lambda state: None)),
        ranks=Ranks(0, 0, now), saver=SimpleNamespace(), say=said.append, out=Path("run"),
    )  # fmt: skip
    _go_on_from(run, snapshot, None)
    assert said == ["resume      written by 2 ranks: dropout of the new ones is seeded anew"] * anew
    said.clear()
    snapshot.rng = {}
    snapshot.world_size = now
    _go_on_from(run, snapshot, None)
    assert said == ["resume      written on another kind of device: dropout is seeded anew"]


def test_what_begins_a_run_anew_is_what_began_it(tmp_path: Path) -> None:
    """Whatever was typed to go on with it; a run that starts from another's checkpoint needs that one again."""
    one, out, own = Ranks(0, 0, 1), tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-000003"
    first = command_that_began(["aurora-tiny", "--resume", "auto", "--steps", "9"], out, None, one)
    assert first.endswith(" -m train.pretrain aurora-tiny --steps 9")
    out.mkdir()
    older = command_that_began(
        ["--resume", "auto", "--steps", "9"], out, own, one
    )  # nothing was written down
    assert older.endswith(" -m train.pretrain --steps 9")
    keep(out, first, first)
    assert command_that_began(["--resume", "auto"], out, own, one) == first
    keep(out, first, "again")
    assert (out / "command.txt").read_text().splitlines() == [first, "again"]
    assert command_that_began(["--resume", "auto"], out, own, one) == first
    (out / "command.txt").write_bytes(b"python caf\xe9\n")
    assert begun_by(own) == "python caf\ufffd"
    keep(out, "python caf\udce9", "again")
    assert (out / "command.txt").read_bytes() == b"python caf\xe9\nagain\n"
    other = command_that_began(["--resume", str(own)], tmp_path / "new", own, one)
    assert other.endswith(f" -m train.pretrain --resume {own}")


def test_commands_start_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python` where that is it; its path where another one is found first, or none."""
    own = tmp_path / ".venv" / "bin"
    own.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("python", "torchrun"):
        (own / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(own / "python"))
    monkeypatch.setenv("PATH", str(own))
    assert (python(), torchrun()) == ("python", ["torchrun"])
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.chdir(tmp_path)
    assert (python(), torchrun()[0]) == (".venv/bin/python", ".venv/bin/python")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert python() == str(own / "python")


def test_how_to_go_on_with_one_machine_and_with_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "python", lambda: "python")
    monkeypatch.setattr(commands, "torchrun", lambda: ["torchrun"])
    typed, out = ["aurora-tiny", "--out", "a", "--steps", "9"], Path("a")
    again = "aurora-tiny --steps 9 --out a --resume auto"
    for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert command_to_resume(typed, out, Ranks(0, 0, 1)) == f"python -m train.pretrain {again}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    one = command_to_resume(typed, out, Ranks(0, 0, 4))
    assert one == f"torchrun --nproc-per-node 4 -m train.pretrain {again}"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    several = command_to_resume(typed, out, Ranks(0, 0, 8))
    assert several == "the same launcher command with --out a --resume auto, on every machine"
    monkeypatch.delenv("GROUP_WORLD_SIZE")  # another launcher
    assert command_to_resume(typed, out, Ranks(0, 0, 8)) == several
    assert command_line(typed, Ranks(0, 0, 8)).startswith("torchrun --nnodes 2 --nproc-per-node 4 -m")
