"""The classes of a task: names and ids from what the command line says and from what the data lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from train.config import ConfigError
from train.tasks.config import TaskConfig

SHOWN = 12  # names in a message


def with_ids(task: TaskConfig, listed: Mapping[str, str], where: str) -> TaskConfig:
    """`task` with names and ids of its classes, in the order in which they were given; all that are listed where none were.

    listed: id -> name, as the data has them; where: what lists them, for messages. Raises ConfigError for a name or an id
    that is not listed, for a name that several ids have, and for numbers of names and ids that differ.
    """
    if not task.classes and not task.class_ids:
        return replace(task, classes=tuple(listed.values()), class_ids=tuple(listed))
    if task.classes and task.class_ids and len(task.classes) != len(task.class_ids):
        raise ConfigError(
            f"task.classes has {len(task.classes)} names and task.class_ids {len(task.class_ids)} ids; one id for each name "
            "is needed"
        )
    ids = task.class_ids or tuple(_ids_of(task.classes, listed, where))
    for field, given in (("classes", task.classes), ("class_ids", ids)):
        if twice := [one for one, count in Counter(given).items() if count > 1]:
            raise ConfigError(f"task.{field} has {twice[0]!r} twice")
    if unknown := [one for one in ids if one not in listed]:
        raise ConfigError(f"task.class_ids: {_some(unknown)} not in {where}; there are {_some(list(listed))}")
    return replace(task, classes=task.classes or tuple(listed[one] for one in ids), class_ids=ids)


def _ids_of(names: Sequence[str], listed: Mapping[str, str], where: str) -> list[str]:
    ids: dict[str, list[str]] = {}
    for number, name in listed.items():
        ids.setdefault(name, []).append(number)
    if unknown := [name for name in names if name not in ids]:
        raise ConfigError(f"task.classes: {_some(unknown)} not in {where}; there are {_some(list(ids))}")
    if several := [name for name in names if len(ids[name]) > 1]:
        raise ConfigError(
            f"task.classes: {several[0]!r} has several ids in {where}, {_some(ids[several[0]])}; give task.class_ids too"
        )
    return [ids[name][0] for name in names]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more
