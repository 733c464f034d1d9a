"""Options that several commands of the benchmark have, checked while they are read; and how such a command ends."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


def positive_float(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"it must be a number above 0, got {text!r}")
    return number


def positive_int(text: str) -> int:
    """1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it must be 1, 2, ..., got {text!r}")
    return int(text)


def folder_path(text: str) -> Path:
    """A folder to write into, there or not yet."""
    path = Path(text)
    first = _first_there(path)
    if not first.is_dir():
        raise argparse.ArgumentTypeError(f"{first} is no folder")
    if not os.access(first, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{first} cannot be written into")
    return path


def file_path(text: str) -> Path:
    """A file to write, there or not yet."""
    path = Path(text)
    if (
        _first_there(path).absolute() != path.absolute() or not path.exists()
    ):  # or a link to what is not there
        folder_path(str(path.resolve().parent))
    elif path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    elif not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def _first_there(path: Path) -> Path:
    """Of a path and its parents."""
    for place in (path, *path.absolute().parents):
        try:
            place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:  # too long a name, a closed folder
            raise argparse.ArgumentTypeError(f"{place}: {error.strerror}") from None
        return place
    return Path(path.anchor)


def regular_expression(text: str) -> str:
    """As the module "re" reads them."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def end_with(main: Callable[[], int]) -> NoReturn:
    """End this process with what `main` returns; with 130 and no traceback after Ctrl-C."""
    try:
        status = main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
