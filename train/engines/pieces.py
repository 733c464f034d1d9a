"""Tensors that are spread over ranks: what part of each this rank holds, and how the parts go into files and come back.

A piece is a run of a tensor's numbers in row-major order. Every way of sharding that the engines use is one: DDP keeps whole
tensors, FSDP2 shards rows, DeepSpeed shards flat buffers. So one file format serves them all, and any number of ranks under any
engine reads what another wrote.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CHUNK = 16 * 2**20  # bytes hashed and written at a time
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class PiecesError(ValueError):
    """Files that do not hold what they should; the message says which tensor or file, and what is wrong."""


@dataclass(frozen=True)
class Piece:
    """Numbers `start` to `start + len(values)` of a tensor of shape `shape`, in row-major order."""

    values: Tensor
    """1-D."""
    start: int
    shape: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether these are all of the tensor's numbers."""
        return self.values.numel() == math.prod(self.shape)

    @classmethod
    def of(cls, tensor: Tensor) -> Piece:
        """All of a tensor."""
        return cls(tensor.detach().reshape(-1), 0, tuple(tensor.shape))


Tensors = Mapping[str, Tensor | Piece]


def as_pieces(tensors: Tensors) -> dict[str, Piece]:
    """Whole tensors become pieces too."""
    return {name: t if isinstance(t, Piece) else Piece.of(t) for name, t in tensors.items()}


def share_of(tensors: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Piece]:
    """The part of tensors that all ranks hold alike which `rank` of `size` writes: as many bytes on each."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    low, high = total * rank // size, total * (rank + 1) // size
    found, place = {}, 0
    for name, tensor in tensors.items():
        each = tensor.element_size()
        # A number belongs to the rank in whose share its first byte lies.
        start, stop = (min(max(-(-(edge - place) // each), 0), tensor.numel()) for edge in (low, high))
        if stop > start:
            found[name] = Piece(tensor.detach().reshape(-1)[start:stop], start, tuple(tensor.shape))
        place += tensor.numel() * each
        if tensor.numel() == 0 and rank == 0:
            found[name] = Piece.of(tensor)
    return found


def write_pieces(file: Path, tensors: Mapping[str, Piece]) -> str:
    """Write a safetensors file; returns its SHA-256, taken of the bytes on their way to the disk. Whole tensors have their
    shape; others are 1-D, and the file's metadata says where they belong. The file is synced. Raises OSError.

    The format is that of the safetensors library, which reads these files; it is written here because the library's writer
    would leave the checksum to a second reading.
    """
    header: dict[str, object] = {}
    placed: dict[str, list[int]] = {}
    offset, ordered = 0, sorted(tensors.items(), key=lambda item: (-item[1].values.element_size(), item[0]))
    for name, piece in ordered:
        size = piece.values.numel() * piece.values.element_size()
        shape = list(piece.shape) if piece.whole else [piece.values.numel()]
        header[name] = {
            "dtype": DTYPES[piece.values.dtype],
            "shape": shape,
            "data_offsets": [offset, offset + size],
        }
        if not piece.whole:
            placed[name] = [piece.start, *piece.shape]
        offset += size
    if placed:
        header = {"__metadata__": {"pieces": json.dumps(placed)}, **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        for block in _blocks(len(text).to_bytes(8, "little") + text, [piece for _, piece in ordered]):
            digest.update(block)
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _blocks(head: bytes, pieces: list[Piece]) -> Iterator[bytes | memoryview]:
    yield head
    for piece in pieces:
        if piece.values.numel():
            data = memoryview(cast(Any, piece.values.contiguous().view(torch.uint8).numpy()))
            yield from (data[i : i + CHUNK] for i in range(0, len(data), CHUNK))


@dataclass
class _Entry:
    shape: tuple[int, ...]
    parts: list[tuple[int, int, Path]] = field(default_factory=list)  # start, stop, file


class Stored(Mapping[str, Tensor]):
    """Tensors by name in one or several files of pieces; only what is asked for is read.

    Raises PiecesError where a file cannot be read, or where pieces overlap or are missing.
    """

    def __init__(self, files: list[Path]) -> None:
        self._entries: dict[str, _Entry] = {}
        for file in files:
            with _opened(file) as stream:
                placed = json.loads((stream.metadata() or {}).get("pieces", "{}"))
                for name in stream.keys():
                    length = math.prod(own := tuple(stream.get_slice(name).get_shape()))
                    start, *shape = placed.get(name, (0, *own))
                    entry = self._entries.setdefault(name, _Entry(tuple(shape)))
                    if entry.shape != tuple(shape):
                        raise PiecesError(f"{name} has shape {list(entry.shape)} and, in {file}, {shape}")
                    entry.parts.append((start, start + length, file))
        for name, entry in self._entries.items():
            entry.parts.sort(key=lambda part: part[:2])
            at = 0
            for start, stop, file in entry.parts:
                if start != at:
                    what = "missing" if start > at else "there twice"
                    raise PiecesError(
                        f"{name}: numbers {min(at, start)} to {max(at, start)} are {what} ({file})"
                    )
                at = stop
            if at != math.prod(entry.shape):
                raise PiecesError(f"{name}: {at:,} of its {math.prod(entry.shape):,} numbers are there")

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own."""
        shape = self._entries[name].shape
        return self.part(name, 0, math.prod(shape)).view(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._entries[name].shape

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Numbers start to stop of a tensor, 1-D, in memory of their own."""
        found = []
        for low, high, file in self._entries[name].parts:
            if low < stop and high > start or (low == high and start == stop):
                with _opened(file) as stream:
                    values = stream.get_tensor(name).reshape(-1)
                found.append(values[max(start - low, 0) : stop - low].clone())
        return torch.cat(found) if len(found) != 1 else found[0]


def part_of(tensors: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    """Numbers start to stop of a tensor, read from files or taken from memory."""
    if isinstance(tensors, Stored):
        return tensors.part(name, start, stop)
    return tensors[name].reshape(-1)[start:stop]


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise PiecesError(f"{file} cannot be read: {error}") from error
