"""Scoring over several ranks: what each found is gathered once, doubles go, and rank 0 scores once.

    found = score_over_ranks({key: caption, ...}, lambda captions: score_captions(captions, references), expected=keys)

Scores of shards do not average to the score of the set (CIDEr, mAP, mIoU, AP), so nothing is scored before it is gathered.
Samplers fill the last batch with samples that another rank has too; those are told by their ids. The result does not
depend on the number of ranks: what is scored is sorted by id.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
R = TypeVar("R")
SampleId = int | str


def gather_samples(
    mine: Mapping[SampleId, T], expected: Collection[SampleId] | None = None
) -> dict[SampleId, T] | None:
    """What all ranks found, by sample id, sorted; on rank 0 (or without torch.distributed), None elsewhere.

    Of a sample that several ranks have, that of the lowest rank counts. `expected`: the ids that there should be, on
    rank 0; ValueError where one is missing or another is there. Every rank has to call this, and answers travel as
    Python objects on the CPU: hand over texts, numbers and numpy arrays, no tensors on a GPU.
    """
    parts: list[Mapping[SampleId, T] | None]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        rank = dist.get_rank()
        parts = [None] * dist.get_world_size()
        dist.gather_object(dict(mine), parts if rank == 0 else None, dst=0)
        if rank:
            return None
    else:
        parts = [mine]
    joined: dict[SampleId, T] = {}
    for part in reversed(parts):
        joined |= part or {}
    if expected is not None:
        wanted = set(expected)
        missing, extra = wanted - joined.keys(), joined.keys() - wanted
        if missing or extra:
            first = min(missing or extra, key=_order)
            raise ValueError(
                f"{len(missing):,} of {len(wanted):,} samples were answered by no rank, {len(extra):,} answers are "
                f"for no sample that is asked; the first is {first!r}"
            )
    return {number: joined[number] for number in sorted(joined, key=_order)}


def score_over_ranks(
    mine: Mapping[SampleId, T],
    score: Callable[[dict[SampleId, T]], R],
    expected: Collection[SampleId] | None = None,
) -> R:
    """`score` of what all ranks found, run on rank 0 alone; every rank gets the result.

    An error on rank 0 is raised on every rank: the others would wait for ever.
    """
    answer: list[Any] = [None, None]
    try:
        everything = gather_samples(mine, expected)
        if everything is not None:
            answer[0] = score(everything)
    except Exception as error:
        if not _several():
            raise
        answer[1] = _portable(error)
    if _several():
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    result: R = answer[0]
    return result


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same, where its kind cannot travel."""
    try:
        pickle.dumps(error)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _order(number: SampleId) -> tuple[bool, SampleId]:
    return isinstance(number, str), number
