"""What an address is, and what is known of the file behind it."""

from __future__ import annotations

import re
from dataclasses import dataclass


def is_address(pattern: str) -> bool:
    """Whether this is PROTOCOL://..., and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", pattern) is not None


@dataclass(frozen=True)
class Remote:
    """A file behind an address. `str` gives the address as it was written; `shown`, for messages and reports,
    leaves out a password and a query, where signatures are."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"Remote({self.shown!r})"

    @property
    def protocol(self) -> str:
        """ "s3", "https" ..."""
        return self.url.split("://", 1)[0].lower()

    @property
    def shown(self) -> str:
        """The address without user, password and query."""
        return re.sub(r"://[^/@]*@", "://", bare(self.url))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return bare(self.url).rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> Remote:
        """The folder."""
        return Remote(bare(self.url).rstrip("/").rsplit("/", 1)[0])

    def beside(self, suffix: str) -> Remote:
        """The file of this name with a suffix, in the same place."""
        path = bare(self.url)
        return Remote(path + suffix + self.url[len(path) :])


def bare(url: str) -> str:
    """An address without its query."""
    return re.split(r"[?#]", url, maxsplit=1)[0] if url.lower().startswith("http") else url


@dataclass(frozen=True)
class Facts:
    """What a server says of a file."""

    size: int
    stamp: str
    """ETag, or a time; empty where it says neither"""
    ranges: bool
    """whether it says that it gives parts of the file"""


class NoRanges(OSError):
    """The server sends the whole file where a part was asked for."""
