"""Which of several processes hangs, and where.

Every rank notes its progress, and a thread publishes it in the store through which the ranks have met. A rank that makes none
for `limit` seconds looks at the others' notes: those that wait in a collective have got further than the one they wait for. All
that still can say so and exit, so that a launcher can start the run anew. A process that gives no sign of life for that long is
named also while others may take their time, in a checkpoint or an evaluation.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from train.engine import Ranks
from train.engines.meeting import ROUND

EXIT_CODE = 1
ANSWER = timedelta(seconds=20)  # the store has to
WAITING = re.compile(
    r"[/\\]torch[/\\]distributed[/\\]|[/\\]deepspeed[/\\]comm[/\\]"
)  # files of code that waits for other ranks
SILENT = 4  # looks without a sign of life: stopped, or its machine is gone


@dataclass
class Seen:
    """What is known of a rank: its last note, and when notes and progress in them last changed (this process's clock)."""

    note: dict[str, Any]
    alive: float
    moved: float


class Watchdog:
    """Watches the ranks of one run; does nothing with a single one, or without a limit.

    `beat` is called at every place where a step can stay; it only sets two attributes.
    """

    def __init__(self, ranks: Ranks, limit: float) -> None:
        self.ranks, self.limit = ranks, limit
        self._count, self._place, self._patient = 0, "start", 0
        self._over = threading.Event()
        self._main = threading.get_ident()
        self._thread: threading.Thread | None = None

    def start(self) -> Watchdog:
        """Begin, once the ranks have met."""
        if self.ranks.size > 1 and self.limit:
            self._period = min(5.0, self.limit / 5)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """The run is over."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=self._period)

    def beat(self, place: str) -> None:
        """This rank has come to `place`. All ranks come to the same places in the same order."""
        self._count += 1
        self._place = place

    @contextmanager
    def patient(self, place: str) -> Iterator[None]:
        """Inside, this rank may take its time, and the others wait for it (an evaluation)."""
        self.beat(place)
        self._patient += 1
        try:
            yield
        finally:
            self._patient -= 1
            self.beat(f"after {place}")

    def _watch(self) -> None:
        store = None
        seen: dict[int, Seen] = {}
        # since: as moved, but it begins anew while somebody may take his time
        begun = since = moved = time.monotonic()
        own, look = -1, 0
        # The first note at once: it says which process this is.
        while not self._over.wait(self._period if look else 0):
            look += 1
            now = time.monotonic()
            if self._count != own:
                own, since, moved = self._count, now, now
            stuck = now - since > self.limit
            try:
                store = store or self._store()
                self._publish(store, look, stuck)
                self._read(store, seen, now)
            except (RuntimeError, ValueError) as error:  # what keeps the notes is gone, or does not answer
                if stuck and not self._over.is_set():
                    self._leave(
                        [f"rank 0, which keeps the ranks' notes, does not answer ({str(error)[:80]})"],
                        now - since,
                    )
                continue
            if self._excused(seen, now):
                since, stuck = now, False
            gone = now - moved > self.limit and self._gone(seen, begun)
            if not (stuck or gone) or self._over.is_set():
                continue
            # The others publish where they are. Those that wait speak before the one that holds them up cuts them off; when
            # rank 0 goes, the notes go with it, so what it says is read as soon as it is said.
            for _ in range(2 if gone or self._waits() else 6):
                time.sleep(self._period / 2)
                try:
                    self._read(store, seen, time.monotonic())
                except (RuntimeError, ValueError):
                    break
            if self._count != own or self._over.is_set():
                continue
            if lost := self._gone(seen, begun):
                self._leave(culprits(seen, lost), now - moved)
            elif stuck:
                self._leave(culprits(seen, self._silent(seen)), now - since)
        self._say_over(store, look + 1)

    def _say_over(self, store: Any, look: int) -> None:
        """A last note: from now on this rank's silence means nothing."""
        try:
            self._publish(store or self._store(), look, False, over=True)
        except (RuntimeError, ValueError):
            pass  # nobody is left to read it

    def _store(self) -> Any:
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*where, is_master=False, wait_for_workers=False, timeout=ANSWER)
        return dist.PrefixStore(f"watchdog/{os.environ.get(ROUND, '')}", store)

    def _publish(self, store: Any, look: int, stuck: bool, *, over: bool = False) -> None:
        note = {
            "look": look, "count": self._count, "place": self._place, "patient": self._patient > 0,
            "host": socket.gethostname(), "pid": os.getpid(), "stack": self._stack() if stuck else "",
            "waits": stuck and self._waits(), "over": over,
        }  # fmt: skip
        store.set(str(self.ranks.rank), json.dumps(note))

    def _read(self, store: Any, seen: dict[int, Seen], now: float) -> None:
        for rank in range(self.ranks.size):
            if not store.check([str(rank)]):
                continue
            note = json.loads(store.get(str(rank)))
            before = seen.get(rank)
            if before is None:
                seen[rank] = Seen(note, now, now)
                continue
            before.alive = now if note["look"] != before.note["look"] else before.alive
            before.moved = now if note["count"] != before.note["count"] else before.moved
            before.note = note

    def _lives(self, one: Seen, now: float) -> bool:
        return now - one.alive < SILENT * self._period

    def _excused(self, seen: Mapping[int, Seen], now: float) -> bool:
        """Whether this rank, or a living one that it may be waiting for, takes its time. One that has got further waits for
        this rank, and is no excuse."""
        return self._patient > 0 or any(
            one.note["patient"] and one.note["count"] <= self._count and self._lives(one, now)
            for one in seen.values()
        )

    def _gone(self, seen: Mapping[int, Seen], begun: float) -> set[int]:
        """Ranks without a sign of life for `limit` seconds that have not said that they are done."""
        now = time.monotonic()
        return {
            rank
            for rank in self._silent(seen)
            if now - (seen[rank].alive if rank in seen else begun) > self.limit
            and not (rank in seen and seen[rank].note["over"])
        }

    def _silent(self, seen: Mapping[int, Seen]) -> set[int]:
        now = time.monotonic()
        return {
            rank
            for rank in range(self.ranks.size)
            if rank not in seen or seen[rank].note["over"] or not self._lives(seen[rank], now)
        }

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._main)
        return "".join(traceback.format_stack(frame)[-3:]) if frame else ""

    def _waits(self) -> bool:
        """Whether the main thread is in a collective, or in a backward pass, where gradients are reduced."""
        found = traceback.extract_stack(sys._current_frames().get(self._main))
        return any(WAITING.search(frame.filename) or frame.name == "_engine_run_backward" for frame in found)

    def _leave(self, found: list[str], seconds: float) -> None:
        lines = [
            f"error: rank {self.ranks.rank}: no progress for {seconds:.0f} s (hang_timeout) at: {self._place}",
            *found,
        ]
        print("\n  ".join(lines), file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)  # the main thread is in a call that does not return


def culprits(seen: Mapping[int, Seen], silent: set[int]) -> list[str]:
    """Who holds up the others, in words."""
    if silent:
        return [_lost(seen, rank) for rank in sorted(silent)]
    least, most = (pick(one.note["count"] for one in seen.values()) for pick in (min, max))
    behind = [rank for rank, one in sorted(seen.items()) if one.note["count"] == least]
    if least == most:  # in the same micro-step, then: some of them wait there for those that do not
        behind = [rank for rank in behind if not seen[rank].note["waits"]] or behind
    if least == most and len(behind) == len(seen):
        head = "all ranks stand at the same place; where each is:"
        return [
            head,
            *(f"rank {rank}{_where(seen, rank)}\n{one.note['stack']}" for rank, one in sorted(seen.items())),
        ]
    waiting = next(one.note["place"] for one in seen.values() if one.note["count"] == most)
    return [
        f"rank {rank} hangs at: {seen[rank].note['place']}{_where(seen, rank)}; the others wait for it at: {waiting}\n"
        f"{seen[rank].note['stack']}"
        for rank in behind
    ]


def _lost(seen: Mapping[int, Seen], rank: int) -> str:
    last = f", last seen at: {seen[rank].note['place']}" if rank in seen else ""
    over = rank in seen and seen[rank].note["over"]
    what = "has left the run" if over else "hangs: it gives no sign of life"
    return f"rank {rank} {what}{last}{_where(seen, rank)}"


def _where(seen: Mapping[int, Seen], rank: int) -> str:
    return f" (process {seen[rank].note['pid']} on {seen[rank].note['host']})" if rank in seen else ""
