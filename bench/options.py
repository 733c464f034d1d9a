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
    """A time that is more than none, in the option's unit."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: a number above 0 is")
    return number


def positive_int(text: str) -> int:
    """1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count: 1, 2, ... are")
    return int(text)


def folder_path(text: str) -> Path:
    """A folder, there or not yet."""
    path = Path(text)
    first = next(place for place in (path, *path.absolute().parents) if place.exists() or place.is_symlink())
    if not first.is_dir():
        raise argparse.ArgumentTypeError(f"{first} is no folder")
    if not os.access(first, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{first} cannot be written into")
    return path


def regular_expression(text: str) -> str:
    """A regular expression, as the module "re" reads them."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def end_with(main: Callable[[], int], kept: str = "") -> NoReturn:
    """End this process with what `main` returns; with 130 and no traceback after Ctrl-C. kept: what is there then."""
    try:
        status = main()
    except KeyboardInterrupt:
        print(f"\ninterrupted{': ' * bool(kept)}{kept}", file=sys.stderr)
        status = 130
    sys.exit(status)
