"""What the options of `train.evaluate` ask for, of any kind of model."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from dataload import shards
from train.checkpoint import LoadedModel


def check_request(args: argparse.Namespace, output: Path) -> None:
    """What does not depend on the checkpoint. Raises ValueError or OSError."""
    for name in ("max_images", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}")
    if output.is_dir():
        raise IsADirectoryError(f"--output {output} is a directory; a file is needed")
    folder = next(folder for folder in output.resolve().parents if folder.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"--output {output}: {folder} is a file, not a folder")
    if not os.access(output if output.exists() else folder, os.W_OK):
        raise PermissionError(f"{output} cannot be written; choose another place with --output")


def choose_split(paths: list[shards.Address], split: str, folder: bool) -> list[shards.Address]:
    """The shards of `split`, by their names SPLIT-000000.tar.

    A folder that holds several splits is refused without a choice: scoring training pictures flatters.
    """
    splits = {path: re.sub(r"-\d+$", "", path.name.removesuffix(".tar")) for path in paths}
    names = ", ".join(sorted(set(splits.values())))
    if split:
        chosen = [path for path in paths if splits[path] == split]
        if not chosen:
            raise ValueError(f"no shards of split {split!r}; there are: {names}")
        return chosen
    if folder and len(set(splits.values())) > 1:
        raise ValueError(f"the folder holds several splits ({names}); choose one with --split")
    return paths


def views_of(args: argparse.Namespace, loaded: LoadedModel) -> int:
    """How many views of each picture retrieval takes: --views, or what the run's last evaluation took."""
    asked: int | None = getattr(args, "views", None)
    return loaded.config.eval_views if asked is None else asked
