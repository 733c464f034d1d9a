"""Checkpoints beside the training: every rank copies its part to main memory, and a thread writes it while steps go on.

begin    the state is copied (this is what training waits for), a thread of each rank writes and syncs its files
poll     after each step, while a checkpoint is being written: are all ranks done? Then rank 0 gives it its name
finish   waits for that

All ranks call each of these at the same step. A rank that cannot write (a full disk) makes the checkpoint fail on all; the one
before it stays. The next is not begun before this one is finished, so at most one is in main memory.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train import checkpoint
from train.checkpoint import Snapshot
from train.config import PretrainConfig
from train.engine import Ranks
from train.engines.pieces import Piece


class SaveError(RuntimeError):
    """The last checkpoint of a run could not be written; the message says why."""


@dataclass
class _Writing:
    """A checkpoint on its way to the disk."""

    snapshot: Snapshot
    work: Path
    thread: threading.Thread | None = None
    sums: dict[str, str] | None = None
    error: str = ""
    moved: bool = False  # to its name

    @property
    def over(self) -> bool:
        return self.thread is None or not self.thread.is_alive()


class Saver:
    """Writes the checkpoints of one run into `directory`.

    say: tells rank 0's user. `saved` is the newest checkpoint that is whole, `stalled` the seconds that training has waited for
    checkpoints so far, `written` how many there were.
    """

    def __init__(
        self,
        directory: Path,
        config: PretrainConfig,
        tokenizer: Path,
        ranks: Ranks,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self.directory, self.config, self.tokenizer, self.ranks, self.device = (
            directory, config, tokenizer, ranks, device,
        )  # fmt: skip
        self.say = say
        self.saved: Path | None = None
        self.stalled = 0.0
        self.written = 0
        self._writing: _Writing | None = None
        self._copies: dict[str, Tensor] = {}
        self._pruning: threading.Thread | None = None

    def begin(self, make: Callable[[], Snapshot], *, wait: bool) -> None:
        """Save what `make` returns; it is called once the former checkpoint is out of the way. wait: until it is on the disk.

        Raises SaveError where that was asked for and does not come about.
        """
        started = time.monotonic()
        self.finish(must=False)
        snapshot = make()
        work = checkpoint.unfinished(self.directory, snapshot.step)
        writing = _Writing(snapshot, work)
        if self.ranks.first:
            try:
                checkpoint.start(work)
            except OSError as error:
                writing.error = str(error)
        if self.ranks.size > 1:
            dist.barrier()  # the directory is there
        kinds = checkpoint.kinds_of(snapshot.engine)
        if self.config.save_async and not wait:
            kinds = {kind: self._copied(kind, pieces) for kind, pieces in kinds.items()}
        else:
            kinds = {kind: {name: _on_cpu(p) for name, p in pieces.items()} for kind, pieces in kinds.items()}
        # Tensors are in `kinds` now, and must not be kept alive by the snapshot.
        writing.snapshot = replace(
            snapshot, engine=replace(snapshot.engine, model={}, optimizer={}, ema=None)
        )
        writing.thread = threading.Thread(
            target=self._write, args=(writing, kinds), name="checkpoint", daemon=True
        )
        self._writing = writing
        writing.thread.start()
        if wait or not self.config.save_async:
            self._finish(must=wait)
        self.stalled += time.monotonic() - started

    def writes(self, step: int) -> bool:
        """Whether the checkpoint of this step is being written."""
        return self._writing is not None and self._writing.snapshot.step == step

    def poll(self) -> None:
        """Between two steps: conclude the checkpoint that is being written, if every rank has written its part."""
        if self._writing is None:
            return
        over = torch.tensor(float(self._writing.over), device=self.device)
        if self.ranks.size > 1:
            dist.all_reduce(over, dist.ReduceOp.MIN)
        if over.item():
            started = time.monotonic()
            self._finish(must=False)
            self.stalled += time.monotonic() - started

    def finish(self, *, must: bool = True) -> None:
        """Wait for what is being written. Raises SaveError where it `must` succeed and did not."""
        started = time.monotonic()
        self._finish(must=must)
        if self._pruning is not None:
            self._pruning.join()
            self._pruning = None
        if must:
            self.stalled += time.monotonic() - started

    def _write(self, writing: _Writing, kinds: dict[str, dict[str, Piece]]) -> None:
        try:
            writing.sums = checkpoint.write_part(writing.work, kinds, self.ranks.rank, self.ranks.size)
        except Exception as error:  # of whatever kind: the other ranks have to hear of it
            writing.error = writing.error or in_words(error)

    def _finish(self, *, must: bool) -> None:
        writing, self._writing = self._writing, None
        if writing is None:
            return
        assert writing.thread
        writing.thread.join()
        found: list[Any] = [(writing.sums, writing.error)]
        if self.ranks.size > 1:
            found = [None] * self.ranks.size
            dist.all_gather_object(found, (writing.sums, writing.error))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(found) if error]
        if not errors and self.ranks.first:
            sums = {name: digest for part, _ in found for name, digest in part.items()}
            errors += self._named(writing, sums)
        if self.ranks.size > 1:
            box = [errors]
            dist.broadcast_object_list(box, src=0)
            errors = box[0]
        if not errors:
            self.saved = checkpoint.step_directory(self.directory, writing.snapshot.step)
            self.written += 1
            return
        self._failed(writing, errors, must=must)

    def _named(self, writing: _Writing, sums: dict[str, str]) -> list[str]:
        """On rank 0, once all parts are there. Returns what went wrong."""
        try:
            new = checkpoint.commit(writing.work, writing.snapshot, self.config, self.tokenizer, sums)
        except Exception as error:
            return [f"rank 0: {in_words(error)}"]
        keep = (self.directory, self.config.keep_checkpoints, self.config.keep_every, new)
        self._pruning = threading.Thread(
            target=checkpoint.prune, args=keep, name="old checkpoints", daemon=True
        )
        self._pruning.start()
        return []

    def _failed(self, writing: _Writing, errors: list[str], *, must: bool) -> None:
        if self.ranks.first:
            shutil.rmtree(writing.work, ignore_errors=True)
        final = checkpoint.step_directory(self.directory, writing.snapshot.step)
        newest = f"the newest is {self.saved}" if self.saved else "none has been saved yet"
        said = f"could not save {final}: {'; '.join(errors[:3])} ({newest})"
        if must:
            raise SaveError(said)
        self.say(f"{said}; training goes on, the next one is tried in its turn")

    def _copied(self, kind: str, pieces: dict[str, Piece]) -> dict[str, Piece]:
        """The same numbers in main memory, in tensors that are used again for the next checkpoint: new pages would cost more
        than the copy."""
        found = {}
        for name, piece in pieces.items():
            key = f"{kind}.{name}"
            room = self._copies.get(key)
            if room is None or room.shape != piece.values.shape or room.dtype != piece.values.dtype:
                room = torch.empty_like(piece.values, device="cpu", pin_memory=piece.values.is_cuda)
                self._copies[key] = room
            room.copy_(piece.values, non_blocking=True)
            found[name] = replace(piece, values=room)
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return found


def in_words(error: Exception) -> str:
    """An OSError says what it is; others are named."""
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def _on_cpu(piece: Piece) -> Piece:
    return replace(piece, values=piece.values.detach().cpu())
