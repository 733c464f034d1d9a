"""Segmentations of a text drawn at random, for subword regularisation, from a seed of one's own.

    unigram   of all segmentations one, in proportion to its probability to the power of alpha: forward filtering, backward
              sampling over the lattice of pieces (arXiv:1804.10959)
    BPE       each merge that is due is left out with probability alpha (BPE-dropout, arXiv:1910.13267)

SentencePiece draws them too, by the same rules, but 0.2.3 salts its random numbers anew in each process, whatever the seed, so
that no run could be repeated or resumed.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator
from typing import Any

UNKNOWN_PENALTY = 10.0
"""So much less than the least likely piece is a character that no piece has, to SentencePiece."""


class Segmenter:
    """Of one SentencePiece model, unigram or BPE. Thread-safe."""

    def __init__(self, processor: Any) -> None:
        """processor: a sentencepiece.SentencePieceProcessor."""
        self._normalize, self._unknown = processor.normalize, processor.unk_id()
        count = processor.get_piece_size()
        usable = [
            i
            for i in range(count)
            if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i) or processor.is_unused(i))
        ]  # fmt: skip
        self._ids: dict[str, int] = {processor.id_to_piece(i): i for i in usable}
        self._scores = [processor.get_score(i) for i in range(count)]
        self._longest = max(map(len, self._ids), default=1)
        self._floor = min((self._scores[i] for i in usable), default=0.0) - UNKNOWN_PENALTY
        bytes_of = {processor.id_to_piece(i): i for i in range(count) if processor.is_byte(i)}
        self._bytes = [bytes_of[f"<0x{byte:02X}>"] for byte in range(256)] if len(bytes_of) == 256 else None
        try:  # only unigram models know the n best
            self.unigram = bool(processor.nbest_encode("a", nbest_size=1))
        except RuntimeError:
            self.unigram = False

    def __call__(self, text: str, alpha: float, seed: int) -> list[int]:
        """Ids of one segmentation; the same for the same arguments, everywhere."""
        draw = random.Random(seed).random
        normal = self._normalize(text)
        pieces = self._lattice(normal, alpha, draw) if self.unigram else self._merged(normal, alpha, draw)
        return list(self._known(pieces))

    def _known(self, pieces: list[str]) -> Iterator[int]:
        """Ids; what has none is spelled in bytes, or is unknown, once for all in a row."""
        last = None
        for piece in pieces:
            one = self._ids.get(piece)
            if one is not None:
                yield one
            elif self._bytes is not None:
                for byte in piece.encode("utf-8", "surrogatepass"):
                    yield self._bytes[byte]
            elif last != self._unknown:
                yield self._unknown
            last = self._unknown if one is None else one

    def _lattice(self, text: str, alpha: float, draw: Any) -> list[str]:
        ids, scores, end = self._ids, self._scores, len(text)
        # arrived[place]: (start, log-weight of all ways to its end) of each piece that ends there
        arrived: list[list[tuple[int, float]]] = [[] for _ in range(end + 1)]
        ways = [0.0] + [-math.inf] * end
        for start in range(end):
            if start:
                ways[start] = _log_sum([weight for _, weight in arrived[start]])
            found = False
            for stop in range(start + 1, min(end, start + self._longest) + 1):
                one = ids.get(text[start:stop])
                if one is not None:
                    arrived[stop].append((start, ways[start] + alpha * scores[one]))
                    found |= stop == start + 1
            if not found:
                arrived[start + 1].append((start, ways[start] + alpha * self._floor))
        pieces = []
        while end:
            options = arrived[end]
            highest = max(weight for _, weight in options)
            shares = [math.exp(weight - highest) for _, weight in options]
            left = draw() * sum(shares)
            start = options[-1][0]
            for (candidate, _), share in zip(options, shares, strict=True):
                left -= share
                if left < 0:
                    start = candidate
                    break
            pieces.append(text[start:end])
            end = start
        return pieces[::-1]

    def _merged(self, text: str, alpha: float, draw: Any) -> list[str]:
        """Merges in the order of their scores, the leftmost of equals first; one that is left out is not asked again."""
        pieces: list[str] = list(text)
        before, after = list(range(-1, len(text) - 1)), [*range(1, len(text)), -1]
        due: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                both = pieces[left] + pieces[right]
                if both in self._ids:
                    heapq.heappush(due, (-self._scores[self._ids[both]], left, right, both))

        for left in range(len(text) - 1):
            offer(left, left + 1)
        while due:
            _, left, right, both = heapq.heappop(due)
            if not pieces[left] or not pieces[right] or pieces[left] + pieces[right] != both:
                continue  # one of them was merged with another meanwhile
            if alpha and draw() < alpha:
                continue
            pieces[left], pieces[right] = both, ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [piece for piece in pieces if piece]


def _log_sum(values: list[float]) -> float:
    highest = max(values)
    return highest + math.log(sum(math.exp(value - highest) for value in values))
