"""Ctrl-C and SIGTERM: finish the current micro-step, save, say how to resume."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """Raised inside `interruptible()` blocks, which may be abandoned at any point (evaluation)."""


class Stop:
    """Remembers the first SIGINT or SIGTERM. A second SIGINT ends the process at once.

    stop = Stop().install()
    while not stop: ...
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._interruptible = False

    def install(self) -> Stop:
        """Take over both signals."""
        self._former = {
            number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def uninstall(self) -> None:
        """Give both signals back to whoever had them."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM: what shells show for them."""
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
