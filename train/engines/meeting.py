"""How ranks meet, so that a round after a fault is not met by the one before it.

torchrun's agent keeps one store for all rounds of a run, and torch writes the addresses of every round under the same keys
(torch 2.13; pytorch issue 135712). After a restart a rank that is early reads where a process that is gone was listening,
and fails with "connection refused". Restart counts do not tell rounds apart: every agent has its own, and the loss or the
coming of a node leaves some of them as they are. So the ranks of a round first agree on a name for it, and meet under that.

    rank r     writes a word of its own as hello/r, and waits until it stands in `round`
    rank 0     puts all words that it finds, and its own as the name, into `round`, again whenever one changes
    rank r     has seen its word, which only a living rank 0 can have read: writes NAME/here/r, and takes the name
    rank 0     takes it once all are here
"""

from __future__ import annotations

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

ROUND = "AURORAIO_ROUND"  # the environment variable that keeps the name, for what also looks into the store
PAUSE = 0.02


def meet(backend: str, rank: int, size: int, timeout: timedelta) -> None:
    """torch's `init_process_group`, for every round that a launcher begins. Raises DistError or TimeoutError."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # rank 0 keeps a new store
        dist.init_process_group(backend, timeout=timeout)
        return
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*where, is_master=False, timeout=timeout)
    os.environ[ROUND] = name = agree(store, rank, size, timeout)
    dist.init_process_group(
        backend, store=dist.PrefixStore(name, store), rank=rank, world_size=size, timeout=timeout
    )


def agree(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name that all ranks of this round get, and no other round had. Raises TimeoutError."""
    own, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    others = range(1, size)
    hellos = [f"hello/{other}" for other in others]
    if rank:
        store.set(f"hello/{rank}", own)
    heard: list[str] = []
    while time.monotonic() < end:
        if rank:
            if store.check(["round"]):
                called = json.loads(store.get("round"))
                if own in called["heard"]:
                    name: str = called["name"]
                    store.set(f"{name}/here/{rank}", "")
                    return name
        else:
            if not hellos:
                return own
            if store.check(hellos) and heard != (found := [store.get(key).decode() for key in hellos]):
                heard = found
                store.set("round", json.dumps({"name": own, "heard": heard}))
            if heard and store.check([f"{own}/here/{other}" for other in others]):
                return own
        time.sleep(PAUSE)
    raise TimeoutError(f"rank {rank}: the other ranks of this round did not come within {timeout}")
