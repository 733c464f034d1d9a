"""The command of a run: what begins it anew, and what goes on with it, in words that a shell takes."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from train.engine import Ranks

BEGUN = "command.txt"  # in a run's directory: what began it, and below that what went on with it


def command_line(typed: Sequence[str], ranks: Ranks, program: str = "train.pretrain") -> str:
    """The command with these words."""
    launcher = [python(), "-m"]
    if ranks.size > 1:
        nodes = ["--nnodes", str(_nodes(ranks))] if _nodes(ranks) > 1 else []
        here = os.environ.get("LOCAL_WORLD_SIZE", str(ranks.size))
        launcher = [*torchrun(), *nodes, "--nproc-per-node", here, "-m"]
    return shlex.join([*launcher, program, *typed])


def command_to_resume(typed: Sequence[str], out: Path, ranks: Ranks, program: str = "train.pretrain") -> str:
    """The command as typed, with --out and --resume auto in place of what was said about them. What launches it on several
    machines (addresses, numbers of machines, a scheduler's script) is not known here."""
    anew = ["--out", str(out), "--resume", "auto"]
    if _nodes(ranks) > 1:
        return f"the same launcher command with {shlex.join(anew)}, on every machine"
    return command_line([*_without(typed, "--out", "--resume"), *anew], ranks, program)


def command_that_began(
    typed: Sequence[str], out: Path, start: Path | None, ranks: Ranks, program: str = "train.pretrain"
) -> str:
    """What begins the run in `out` anew. start: the checkpoint that it goes on from; of one of its own, the command that its
    first start has kept (`keep`) counts, not the one that was typed to go on."""
    own = start is not None and start.resolve().is_relative_to(out.resolve())
    if own and (first := begun_by(start)):
        return first
    return command_line(_without(typed, "--resume") if start is None or own else typed, ranks, program)


def begun_by(start: Path | None) -> str | None:
    """What began the run whose step directory `start` is, as far as is known."""
    known = start.parent.parent / BEGUN if start and start.parent.name == "checkpoints" else None
    try:
        lines = known.read_text(encoding="utf-8", errors="replace").splitlines() if known else []
    except OSError:  # there is none, or it is someone else's
        return None
    return lines[0] if lines else None


def keep(out: Path, begun: str, typed: str) -> None:
    """Write down what began the run, for those who go on with it, and what was typed to do so."""
    known = out / BEGUN
    raw = {"encoding": "utf-8", "errors": "surrogateescape"}  # paths need be no UTF-8
    before = known.read_text(**raw).splitlines() if known.is_file() else []
    lines = [*before, typed] if before[:1] == [begun] else [begun]
    known.write_text("\n".join(lines) + "\n", **raw)


def python() -> str:
    """What a shell in this folder starts this Python by."""
    found, own = shutil.which("python"), Path(sys.executable)
    if found and Path(found).parent == own.parent:
        return "python"
    return str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)


def torchrun() -> list[str]:
    """The same for torchrun."""
    found = shutil.which("torchrun")
    beside = found is not None and Path(found).parent == Path(sys.executable).parent
    return ["torchrun"] if beside else [python(), "-m", "torch.distributed.run"]


def _without(typed: Sequence[str], *options: str) -> list[str]:
    """The words but for these options and their values."""
    kept, skip = [], False
    for word in typed:
        if not skip and word.split("=")[0] not in options:
            kept.append(word)
        skip = not skip and word in options
    return kept


def _nodes(ranks: Ranks) -> int:
    """Machines that take part, as torchrun says, or the ranks per machine that any launcher says."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    return max(int(os.environ.get("GROUP_WORLD_SIZE", 1)), -(-ranks.size // max(here, 1)))
