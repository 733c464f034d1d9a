"""Ctrl-C, SIGTERM and SIGUSR1: finish the current micro-step, save, say how to resume."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Schedulers warn by either of the last two. Windows has no SIGUSR1.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Interrupted(Exception):
    """Raised inside `interruptible()` blocks, which may be abandoned at any point (evaluation)."""


class Stop:
    """Remembers the first SIGINT, SIGTERM or SIGUSR1. A second SIGINT ends the process at once.

    stop = Stop().install()
    while not stop: ...
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._interruptible = False

    def install(self) -> Stop:
        """Take over these signals."""
        self._former = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def uninstall(self) -> None:
        """Give these signals back to whoever had them."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, 138 after SIGUSR1: what shells show for them."""
        return 128 + (self.signal or signal.SIGTERM)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that the first signal ends with `Interrupted`."""
        if self.signal:
            raise Interrupted
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = self.signal is None
        if first:
            self.signal = signal.Signals(number)
        # From now on Ctrl-C is the operating system's own: it ends even a step that hangs. A SIGTERM changes
        # nothing any more: launchers send one after a Ctrl-C, while that is being served.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if first and self._interruptible:
            raise Interrupted
