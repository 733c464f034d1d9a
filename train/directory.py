"""Which directory a run writes into, what it goes on from, and the lock that keeps other runs out of it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from train import checkpoint
from train.checkpoint import CheckpointError
from train.config import ConfigError, PretrainConfig
from train.telemetry.log import Progress

LOCK = "running.lock"  # in a run's directory, while a run writes there
LAUNCH = "launch.txt"  # in a run's directory: which launcher has started it

TRIES, PAUSE = 5, 0.05  # seconds between them
_held: dict[str, Lock] = {}  # of this process, by the lock's real path


class TakenError(ConfigError):
    """Another run writes into this directory."""

    @classmethod
    def of(cls, out: Path, by: str) -> TakenError:
        """by: who that is, as far as is known."""
        return cls(
            f"{out} is written by another run at this moment ({by}): wait for its end, or take another --out"
        )


class Lock:
    """A run's directory, made where it is missing, for this process alone: until `close`, or its end in any way.

    Raises TakenError where another run has it, and ConfigError where the directory cannot be made or written into. Where the
    file system, or Windows, knows no locks, `known` is False and nobody is kept out.

    A record lock of POSIX is held by the process: its children do not hold it on. It goes when the process closes the file,
    whoever opened it: within the process nothing else may open it, and a second run is refused by a list of those it has.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.path, self.known = out, out / LOCK, True
        self._name = os.path.realpath(self.path)
        if self._name in _held:
            raise TakenError.of(out, "in this process")
        self._made = [path for path in (out, *out.parents) if not path.exists()]
        try:
            self._file = self._locked()
        except TakenError:
            raise
        except OSError as error:
            self._unmake()
            raise ConfigError(f"{out} cannot be written into: {error}") from error
        _held[self._name] = self

    def _locked(self) -> IO[str]:
        """The file, locked. Whoever looks at a lock has it for a moment, and a start that fails removes what it made: so what
        is in the way is asked again."""
        for attempt in range(TRIES):
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                file = open(self.path, "a+")
            except FileNotFoundError:
                if attempt == TRIES - 1:
                    raise
                continue
            try:
                import fcntl

                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                by = _writer(file)
                file.close()
                if attempt == TRIES - 1:
                    raise TakenError.of(self.out, by) from None
                time.sleep(PAUSE)
                continue
            except (ImportError, OSError):
                self.known = False
            if not self.known or _is_there(self.path, file):
                break
            file.close()  # whoever had it has removed it between our two calls: a lock on nothing
        else:
            raise TakenError.of(self.out, "another process")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        return file

    def close(self) -> None:
        """Let others in. What was made and holds nothing by now goes: the run did not come to its first file."""
        if _held.pop(self._name, None) is None:
            return
        with suppress(OSError):
            self.path.unlink()
        self._file.close()
        self._unmake()

    def _unmake(self) -> None:
        for path in self._made:
            with suppress(OSError):
                path.rmdir()


def give_up(lock: Lock) -> None:
    """Close the lock of a run that does not come to its first step, and take back what says that it was begun."""
    if not _occupied(lock.out):
        with suppress(OSError):
            (lock.out / LAUNCH).unlink()
    lock.close()


def look(out: Path) -> None:
    """Raises TakenError and ConfigError where a `Lock` would, and makes nothing."""
    path = out / LOCK
    nearest = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        why = "no folder" if not nearest.is_dir() else "not writable"
        raise ConfigError(f"{out} cannot be written into: {nearest} is {why}")
    if os.path.realpath(path) in _held:
        raise TakenError.of(out, "in this process")
    try:
        import fcntl

        with open(path) as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise TakenError.of(out, _writer(file)) from None
    except (ImportError, OSError):
        return


def _is_there(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _writer(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "another process"


def find_run(
    config: PretrainConfig, progress: Progress, take: Callable[[Path], Lock | None], again: bool = False
) -> tuple[Path, Path | None, Lock | None]:
    """(directory of the run, step directory to go on from or None, what `take`, which is `Lock` or `look`, gives).

    The directory is taken before a checkpoint is chosen: until then another run may still write one. again: a launcher has
    started the command anew after a fault; what its first start has saved is gone on with, and no other run. Raises
    ConfigError, CheckpointError or FileNotFoundError.
    """
    first = Path(config.out or f"runs/{config.name}")
    chosen, places = _where(config, first, again)
    out, held = (chosen, take(chosen)) if chosen else _new(first, take)
    try:
        start = next(filter(None, (checkpoint.newest_intact(place, progress.say) for place in places)), None)
        if not places and _occupied(out):
            raise ConfigError(
                f"{out} holds a run already: --resume auto goes on with it, another --out starts anew"
            )
    except BaseException:
        if held:
            held.close()
        raise
    if config.resume == "auto" and start is None:
        progress.say(f"resume      {out} has no checkpoint yet: starting at step 0")
    return out, start, held


def _where(config: PretrainConfig, first: Path, again: bool) -> tuple[Path | None, list[Path]]:
    """The run's directory, None for a new one by this name, and where to look for what it goes on from: the first that has
    a checkpoint."""
    if again and config.resume != "auto":
        for out in [first] if config.out else reversed(_named(first)):
            if (out / LAUNCH).is_file() and (out / LAUNCH).read_text() == launch():
                return out, [out, *([Path(config.resume)] if config.resume else [])]
    if not config.resume:
        return (first if config.out else None), []
    if config.resume == "auto":
        taken = [first] if config.out else [out for out in _named(first) if _occupied(out)]
        out = taken[-1] if taken else first
        return out, [out]
    source = Path(config.resume)
    if not source.exists():
        raise FileNotFoundError(
            f"--resume {source}: no such directory; auto finds the newest checkpoint of runs/{config.name}"
        )
    found = checkpoint.find(source)
    if not found:
        raise CheckpointError(f"--resume {source}: there is no finished checkpoint in it")
    owner = found[0].parent.parent if found[0].parent.name == "checkpoints" else None
    return Path(config.out) if config.out else owner, [source]


def _new(first: Path, take: Callable[[Path], Lock | None]) -> tuple[Path, Lock | None]:
    """runs/NAME, or runs/NAME-2 ...: the first behind all that hold a run and that nobody writes into."""
    taken = [out for out in _named(first) if _occupied(out)]
    number = _number(first, taken[-1]) + 1 if taken else 1
    while True:
        out = first if number == 1 else first.with_name(f"{first.name}-{number}")
        number += 1
        try:
            held = take(out)
        except TakenError:
            continue
        if not _occupied(out):  # since we looked
            return out, held
        if held:
            held.close()


def _named(first: Path) -> list[Path]:
    """Those of runs/NAME, runs/NAME-2 ... that exist, in that order."""
    there = first.parent.iterdir() if first.parent.is_dir() else ()
    return sorted((out for out in there if _number(first, out)), key=lambda out: _number(first, out))


def _number(first: Path, out: Path) -> int:
    """1 of runs/NAME, 2 of runs/NAME-2; 0 of any other."""
    if out.name == first.name:
        return 1
    number = out.name.removeprefix(f"{first.name}-")
    return int(number) if number != out.name and number.isdecimal() and int(number) > 1 else 0


def launch() -> str:
    """What all starts of a command by one launcher have in common; "" without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{name} {os.getppid()}" if name in ("", "none") else name


def _occupied(out: Path) -> bool:
    return bool(checkpoint.step_directories(out / "checkpoints"))
