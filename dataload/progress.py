"""How far a tool is: a bar on a terminal, plain lines elsewhere (logs, pipes), always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
EVERY = 10.0  # seconds between plain lines; a tool that is done sooner prints none


class Progress:
    """Counts `unit`s done, of `total` where that is known. Use as a context manager, or call `close`.

    Anything else that is printed while a bar is on the screen goes through `say`.
    """

    def __init__(self, unit: str, total: int | None = None, done: int = 0) -> None:
        """`done`: units that an earlier run did; they do not count for the rate."""
        self._unit, self._total = unit, total
        self._first = self.done = done
        self._started = self._said = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit=f" {unit}", file=sys.stderr, dynamic_ncols=True)

    def step(self, count: int = 1) -> None:
        """`count` more units are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._said >= EVERY:
            self._said = now
            of = "" if self._total is None else f" of {self._total:,}"
            rate = (self.done - self._first) / (now - self._started)
            self.say(f"{self.done:,}{of} {self._unit}, {rate:,.0f} per second")

    def say(self, line: str) -> None:
        """Prints a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Takes the bar off."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def counted(things: Iterable[T], unit: str, total: int | None = None) -> Iterator[T]:
    """The things, one after the other, with a `Progress` beside them."""
    with Progress(unit, total) as progress:
        for thing in things:
            yield thing
            progress.step()
