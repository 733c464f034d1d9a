"""What a resumed run says, and how a stopped one is to be gone on with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train.engine import Ranks, gather_rng, rng_state
from train.setup import _command, _go_on_from, _resume_command


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


def test_how_to_go_on_with_one_machine_and_with_several(monkeypatch: pytest.MonkeyPatch) -> None:
    typed, out = ["aurora-tiny", "--out", "a", "--steps", "9"], Path("a")
    again = "aurora-tiny --steps 9 --out a --resume auto"
    for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert _resume_command(typed, out, Ranks(0, 0, 1)) == f"python -m train.pretrain {again}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    one = _resume_command(typed, out, Ranks(0, 0, 4))
    assert one == f"torchrun --nproc-per-node 4 -m train.pretrain {again}"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    several = _resume_command(typed, out, Ranks(0, 0, 8))
    assert several == "the same launcher command with --out a --resume auto, on every machine"
    monkeypatch.delenv("GROUP_WORLD_SIZE")  # another launcher
    assert _resume_command(typed, out, Ranks(0, 0, 8)) == several
    assert _command(typed, Ranks(0, 0, 8)).startswith("torchrun --nnodes 2 --nproc-per-node 4 -m")
